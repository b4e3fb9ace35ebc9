"""Router-weighted: a mixture of experts as one linear map, every expert with its mean weight over a corpus.

    F = sum_e w_e F_e    F_e: the Gaussian map of expert e; w_e: what its router gave it, on average

A is that of any block: experts share its attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.linear.approximations import attention_map, block_parts, ffn_map
from sd_lens.linear.lone_token import Streams, mlp_input
from sd_lens.linear.maps import LinearMap
from sd_lens.models.views import Block, BlockWeights, MixtureWeights


@dataclass(frozen=True, eq=False)
class RouterWeighted:
    """The weights of the experts of some blocks; made by `capture_router_weights`, or by hand.

    The map is that of a token for which every expert has its mean weight. No token need be one: a router sends each
    to a few of them.

    Attributes:
        layers: the blocks that are mixtures of experts, 0-based; row i of `weights` belongs to block `layers[i]`.
        weights: of the experts; a shared expert is the last.
        n_tokens: the tokens they are means over, 0 if made by hand.
        name: of this linearization.

    Source: docs/singular_defects.md.
    """

    layers: tuple[int, ...]
    weights: Float64[Tensor, "layer expert"]
    n_tokens: int = 0
    name: ClassVar[str] = "router-weighted"

    def __str__(self) -> str:
        n_experts = self.weights.shape[1]
        row, expert = divmod(int(self.weights.argmax()), n_experts)
        return (
            f"RouterWeighted: {len(self.layers)} blocks of {n_experts} experts over {self.n_tokens} tokens; "
            f"largest weight {float(self.weights[row, expert]):.3g} of expert {expert} in block {self.layers[row]}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block and expert."""
        n = self.weights.shape[1]
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(n)],
                "expert": [*range(n)] * len(self.layers),
                "weight": self.weights.flatten().numpy(),
            }
        )

    def maps(self, block: Block) -> tuple[LinearMap, LinearMap]:
        """A and F of a block; those of the Gaussian closed form if it has a single MLP.

        Raises:
            InputError: for a mixture whose weights are not here, or are those of another number of experts.
            NotSupportedError: as `ffn_map`.
            NumericalError: as `ffn_map`.
        """
        if isinstance(block, BlockWeights):
            return block_parts(block)
        if block.layer not in self.layers:
            raise InputError(f"no router weights for block {block.layer}, only for {', '.join(map(str, self.layers))}")
        weights = self.weights[self.layers.index(block.layer)]
        if len(weights) != len(block.experts):
            raise InputError(
                f"block {block.layer} has {len(block.experts)} experts, not {len(weights)}: capture this model"
            )
        A = attention_map(block.experts[0])
        parts = [(w, ffn_map(expert)) for w, expert in zip(weights.tolist(), block.experts, strict=True) if w != 0]
        F = LinearMap(
            A.shape,
            lambda x: sum((w * (F_e @ x) for w, F_e in parts), start=torch.zeros_like(x)),
            lambda y: sum((w * (F_e.T @ y) for w, F_e in parts), start=torch.zeros_like(y)),
            A.dtype,
            A.device,
        )
        return A, F


def router_weights(block: MixtureWeights, x: Streams) -> Float[Tensor, "token expert"]:
    """What the router of a block gives each expert, from the streams that the MLP reads; 0 where it is not run."""
    router, read = block.router, mlp_input(block.experts[0], x)
    probabilities = (read @ router.W.to(x.dtype)).softmax(dim=-1)
    top = probabilities.topk(router.top_k, dim=-1)
    values = top.values / top.values.sum(dim=-1, keepdim=True) if router.renormalized else top.values
    weights = torch.zeros_like(probabilities).scatter(-1, top.indices, values)
    if router.W_shared is None:
        return weights
    return torch.cat([weights, (read @ router.W_shared.to(x.dtype)).sigmoid()[:, None]], dim=-1)
