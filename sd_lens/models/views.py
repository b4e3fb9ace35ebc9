"""One view of a block's weights, whatever the wrapper or the architecture.

`blocks.py` makes these views; everything above the models reads nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import NotSupportedError

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True, eq=False)
class Norm:
    """The norm in front of attention or MLP.

    Attributes:
        kind: `"rms"`, or `"layer"` (which subtracts the mean).
        gain: `[d_model]`, what multiplies the normalized stream; None if folded into the weights.
        bias: `[d_model]`, what is added to it; None if there is none.
        eps: added to the mean square under the root.
    """

    kind: NormKind
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class BlockWrites:
    """How a block writes to the residual stream: the tensors behind its activations, in their own dtype.

    Attributes:
        layer: 0-based index of the block.
        W_O: output weights, one per head.
        b_O: bias of attention's output, None if absent or zero.
        W_out: from the neurons to the stream; None where no single matrix does that (mixtures of experts).
        b_out: bias of the MLP's output, None if absent or zero.
        attention_post_gain: gain of the RMSNorm behind attention (Gemma 2, 3), None without one.
        mlp_post_gain: the same behind the MLP.
    """

    layer: int
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None  # noqa: N815 - TransformerLens's name
    W_out: Float[Tensor, "d_mlp d_model"] | None
    b_out: Float[Tensor, " d_model"] | None
    attention_post_gain: Float[Tensor, " d_model"] | None
    mlp_post_gain: Float[Tensor, " d_model"] | None


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """The tensors of one block, in TransformerLens's orientation (rows: `x @ W`), in their own dtype.

    Attributes:
        layer: 0-based index of the block.
        attention_norm: in front of attention.
        mlp_norm: in front of the MLP; where parallel blocks have a single norm, that.
        W_V: value weights; under grouped-query attention one per key-value head.
        W_O: output weights, one per head; head `h` reads value head `h // (n_heads // n_key_value_heads)`.
        W_in: into the MLP's neurons (the linear branch when gated).
        W_gate: the branch inside the activation, or None when ungated.
        W_out: from the neurons back to the residual stream.
        b_in: bias of `W_in`, None if absent.
        b_gate: bias of `W_gate`, None if absent.
        act_fn: the activation's name.
        attention_post_gain: gain of the RMSNorm behind attention (Gemma 2, 3), None without one.
        mlp_post_gain: the same behind the MLP.
        parallel: whether the MLP reads the stream in front of attention instead of that behind it.
        b_V: bias of the values, one per key-value head, None if absent.
        b_O: bias of attention's output, None if absent or zero.
        b_out: bias of the MLP's output, None if absent or zero.
        b_neurons: added to gated neurons behind the gate, by HookedTransformer alone (its `b_in`), None if zero.
    """

    layer: int
    attention_norm: Norm
    mlp_norm: Norm
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    W_in: Float[Tensor, "d_model d_mlp"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_in: Float[Tensor, " d_mlp"] | None
    b_gate: Float[Tensor, " d_mlp"] | None
    act_fn: str
    attention_post_gain: Float[Tensor, " d_model"] | None = None
    mlp_post_gain: Float[Tensor, " d_model"] | None = None
    parallel: bool = False
    b_V: Float[Tensor, "kv_head d_head"] | None = None  # noqa: N815 - TransformerLens's name
    b_O: Float[Tensor, " d_model"] | None = None  # noqa: N815 - TransformerLens's name
    b_out: Float[Tensor, " d_model"] | None = None
    b_neurons: Float[Tensor, " d_mlp"] | None = None

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_in.shape[0]


@dataclass(frozen=True, eq=False)
class Router:
    """Which experts a token runs through, and with which weights: the largest of `softmax(x @ W)`.

    Attributes:
        W: from the MLP's input, behind its norm.
        top_k: how many experts a token runs through.
        renormalized: whether their weights are divided by their sum.
        W_shared: of an expert that every token runs through, the last one, with weight `sigmoid(x @ W_shared)`; None
            without one.
    """

    W: Float[Tensor, "d_model expert"]
    top_k: int
    renormalized: bool
    W_shared: Float[Tensor, " d_model"] | None


@dataclass(frozen=True, eq=False)
class MixtureWeights:
    """A block whose MLP is a mixture of experts.

    Attributes:
        experts: the block with each of them as its MLP; a shared expert is the last.
        router: weighs them.
    """

    experts: tuple[BlockWeights, ...]
    router: Router

    @property
    def layer(self) -> int:
        """0-based index of the block."""
        return self.experts[0].layer

    @property
    def mlp_norm(self) -> Norm:
        """In front of router and experts."""
        return self.experts[0].mlp_norm

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads the stream in front of attention instead of that behind it."""
        return self.experts[0].parallel

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.experts[0].d_model


Block = BlockWeights | MixtureWeights


def one_mlp(block: Block) -> BlockWeights:
    """The block, if its MLP is a single one.

    Raises:
        NotSupportedError: for a mixture of experts.
    """
    if isinstance(block, MixtureWeights):
        raise NotSupportedError(
            f"not supported yet: a mixture of experts as one MLP (block {block.layer}); expert_defects looks at each "
            "expert, and singular_defects, singular_spectra and defect_eigenvalues take "
            "linearization=capture_router_weights(model, texts)"
        )
    return block
