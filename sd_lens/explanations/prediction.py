"""The norm of a token that carries the defect direction, block by block, from the weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import block_map
from sd_lens.linear.jacobians import jacobian_maps
from sd_lens.linear.lone_token import after_block
from sd_lens.linear.maps import computing_dtype
from sd_lens.models.blocks import wanted_blocks
from sd_lens.observations.high_norm import DECAY_GROWTH


@dataclass(frozen=True, eq=False)
class PredictedNorms:
    """A stream with the defect direction, carried from one block to the end; blocks are 0-based.

    Attributes:
        layers: the block after which the stream was given, and all behind it.
        linear: norm after each of them, by the local linear picture: every block is replaced by its tangent at
            the direction, with the length that the token then has along it.
        exact: the same with the blocks themselves.
        rate: `u . (f(x) - x) / |x|` at `x = |x| u`, the tangent's point: what the block f adds along the unit direction
            u, per length. It is the eigenvalue that a decay (`R x = -x`) makes negative, with the norms' 1/rms;
            0 for the first of `layers`.
        streams: `exact`'s streams, in front of each block of `layers` but the first; for `Jacobian`.
    """

    layers: tuple[int, ...]
    linear: Float64[Tensor, " layer"]
    exact: Float64[Tensor, " layer"]
    rate: Float64[Tensor, " layer"]
    streams: Float[Tensor, "block d_model"]

    @property
    def decay_layers(self) -> tuple[int, ...]:
        """Blocks that take away at least a third of the token's length along the direction."""
        return tuple(
            layer for layer, rate in zip(self.layers, self.rate.tolist(), strict=True) if rate <= DECAY_GROWTH - 1
        )

    def __str__(self) -> str:
        return (
            f"PredictedNorms: {float(self.linear[0]):,.5g} after block {self.layers[0]}, "
            f"{float(self.linear[-1]):,.5g} after block {self.layers[-1]}; decay blocks {self.decay_layers}"
        )

    __repr__ = __str__

    def to_dataframe(self, observed: Float64[Tensor, " n_layers"] | None = None) -> pd.DataFrame:
        """One row per block; with `observed`, the relative error of `linear`'s logarithm.

        Args:
            observed: norms after every block of the model, such as `found.initial.median`.

        Raises:
            InputError: if `observed` has not one positive norm for each block.
        """
        table = pd.DataFrame(
            {
                "layer": self.layers,
                "linear": self.linear.numpy(),
                "exact": self.exact.numpy(),
                "rate": self.rate.numpy(),
            }
        )
        if observed is None:
            return table
        if len(observed) != self.layers[-1] + 1 or not bool((observed > 0).all()):
            raise InputError(f"expected {self.layers[-1] + 1} positive norms, one per block; got {len(observed)}")
        seen = observed[list(self.layers)].numpy()
        logs = torch.log(observed[list(self.layers)])
        return table.assign(observed=seen, log_error=((self.linear.log() - logs) / logs.abs()).numpy())


@torch.no_grad()
def predict_norms(
    model: Any, direction: Float[Tensor, " d_model"], norm: float, layer: int, *, progress: bool = True
) -> PredictedNorms:
    """Carry a stream of a given norm along `direction` from the end of block `layer` to the end of the model.

    No text is run. The blocks are those of a token that sees only itself, as the initial token of a text does. The
    direction's sign matters: a defect that decays need not do so turned round.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        direction: of the stream, such as `forecast(model).direction` or `found.direction`; any length but 0.
        norm: of the stream after block `layer`.
        layer: 0-based, such as the last explosion block; not the last block.
        progress: show a progress bar.

    Raises:
        InputError: for a block that does not exist or is the last, a direction of another width, a norm that is not
            positive.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: if the stream overflows.

    Source: Wang et al. 2025, section 3 (decay), with each block linearised at the direction.
    """
    n_layers = model.cfg.n_layers
    if not 0 <= layer < n_layers - 1:
        raise InputError(f"layer={layer}: expected a block with others behind it, 0 to {n_layers - 2}")
    if not (isinstance(norm, int | float) and 0 < norm < math.inf):
        raise InputError(f"norm={norm!r}: expected a positive number")
    blocks = wanted_blocks(model, range(layer + 1, n_layers))
    length = float(direction.double().norm())
    if direction.shape != (blocks[0].d_model,) or not 0 < length < math.inf:
        raise InputError(f"expected a direction of {blocks[0].d_model} entries, finite and not 0")
    weight = blocks[0].W_in
    unit = (direction.double() / length).to(weight.device, computing_dtype(weight.dtype))
    tangent = exact = norm * unit
    linear_norms, exact_norms, rates, streams = [float(norm)], [float(norm)], [0.0], []
    for block in tqdm(blocks, desc="predicted norms", unit="block", disable=not progress, leave=False):
        streams.append(exact)
        along = (tangent @ unit) * unit
        written = after_block(block, along[None])[0] - along
        L = block_map(*jacobian_maps(block, along), parallel=block.parallel)
        rates.append(float(written @ unit) / float(tangent @ unit))
        tangent = along + written + L @ (tangent - along)
        exact = after_block(block, exact[None])[0]
        linear_norms.append(float(tangent.norm()))
        exact_norms.append(float(exact.norm()))
        if not (math.isfinite(linear_norms[-1]) and math.isfinite(exact_norms[-1])):
            raise NumericalError(f"the predicted stream is not finite after block {block.layer}")
    return PredictedNorms(
        layers=tuple(range(layer, n_layers)),
        linear=torch.tensor(linear_norms, dtype=torch.float64),
        exact=torch.tensor(exact_norms, dtype=torch.float64),
        rate=torch.tensor(rates, dtype=torch.float64),
        streams=torch.stack(streams).cpu(),
    )
