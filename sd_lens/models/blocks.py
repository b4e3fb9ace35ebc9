"""One view of a block's weights, whatever the wrapper or the architecture.

This module and `linear_layers.py` alone know how HookedTransformer and TransformerBridge store weights, and which
architectures there are. Everything above them reads `BlockWeights`, or `LinearGroup`s to quantize.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import InputError, NotSupportedError
from sd_lens.models.hooks import architecture_of

NormKind = Literal["rms", "layer"]

SUPPORTED = (
    "FalconForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MptForCausalLM",
    "OPTForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
"""Architectures whose view is tested; a HookedTransformer built from a configuration of one's own has none."""


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

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_in.shape[0]


def block_writes(model: Any, layer: int) -> BlockWrites:
    """How block `layer` (0-based) of a `HookedTransformer` or `TransformerBridge` writes to the residual stream.

    Any architecture with these weights will do; whether its stream really is the sum of these writes shows
    when they are added up.

    Raises:
        InputError: if there is no such block.
        NotSupportedError: for attention without output weights per head, or weights that are not floating-point.
    """
    block = _block(model, layer)
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if attn is None or mlp is None:
        raise NotSupportedError(f"not supported yet: block {layer} has not both attention and MLP")
    W_O = _tensor(attn, "W_O")
    if W_O is None or W_O.ndim != 3 or not W_O.is_floating_point():
        raise NotSupportedError(f"not supported yet: block {layer} has no floating-point W_O per head")
    return BlockWrites(
        layer=layer,
        W_O=W_O,
        b_O=_bias(attn, "b_O"),
        W_out=_tensor(mlp, "W_out"),
        b_out=_bias(mlp, "b_out"),
        attention_post_gain=_post_gain(model.cfg, block, "ln1_post"),
        mlp_post_gain=_post_gain(model.cfg, block, "ln2_post"),
    )


def block_weights(model: Any, layer: int) -> BlockWeights:
    """The view of block `layer` (0-based) of a `HookedTransformer` or `TransformerBridge`.

    Raises:
        InputError: if there is no such block.
        NotSupportedError: for an architecture that is not in `SUPPORTED`, or a variant of one that its linear maps do
            not cover.
    """
    cfg = model.cfg
    block = _block(model, layer)
    _check_supported(model, block)
    attn, mlp = block.attn, block.mlp
    if not mlp.W_in.is_floating_point():
        raise NotSupportedError(f"not supported yet: weights stored as {mlp.W_in.dtype}; dequantise them first")
    W_gate = _tensor(mlp, "W_gate")
    b_V = _bias(attn, "b_V")
    b_in, b_gate = _tensor(mlp, "b_in"), _tensor(mlp, "b_gate")
    if W_gate is not None and b_in is not None and bool((b_in != 0).any()):
        # HookedTransformer adds b_in after the product with the gate, Hugging Face before it.
        raise NotSupportedError("not supported yet: a gated MLP with biases")
    return BlockWeights(
        layer=layer,
        attention_norm=_norm(cfg, block.ln1),
        mlp_norm=_norm(cfg, getattr(block, "ln2", block.ln1)),
        W_V=_value_heads(cfg, attn.W_V.detach()),
        W_O=attn.W_O.detach(),
        W_in=mlp.W_in.detach(),
        W_gate=W_gate,
        W_out=mlp.W_out.detach(),
        b_in=None if W_gate is not None else b_in,
        b_gate=b_gate,
        act_fn=_activation(model),
        attention_post_gain=_post_gain(cfg, block, "ln1_post"),
        mlp_post_gain=_post_gain(cfg, block, "ln2_post"),
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
        b_V=None if b_V is None else _value_heads(cfg, b_V),
        b_O=_bias(attn, "b_O"),
        b_out=_bias(mlp, "b_out"),
    )


def check_layer(model: Any, layer: int) -> None:
    """Whether the model has a block `layer`, 0-based.

    Raises:
        InputError: if not.
    """
    _check_index(layer, model.cfg.n_layers)


def check_architecture(name: str) -> None:
    """Whether the view covers an architecture.

    Raises:
        NotSupportedError: if not.
    """
    if name not in SUPPORTED:
        raise NotSupportedError(f"not supported yet: {name}; supported are {', '.join(SUPPORTED)}")


def wanted_layers(n_layers: int, layers: Iterable[int] | None) -> tuple[int, ...]:
    """Some blocks, or all `n_layers` of them.

    Raises:
        InputError: if none is named, or one does not exist.
    """
    wanted = tuple(range(n_layers) if layers is None else layers)
    if not wanted:
        raise InputError("layers is empty: name at least one block")
    for layer in wanted:
        _check_index(layer, n_layers)
    return wanted


def wanted_blocks(model: Any, layers: Iterable[int] | None) -> list[BlockWeights]:
    """The views of some blocks, or of all; an unsupported one is reported before any work is done.

    Raises:
        InputError: if none is named, or one does not exist.
        NotSupportedError: as `block_weights`.
    """
    return [block_weights(model, layer) for layer in wanted_layers(model.cfg.n_layers, layers)]


def _check_index(layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise InputError(f"block {layer} does not exist: the model has blocks 0 to {n_layers - 1}")


def _block(model: Any, layer: int) -> Any:
    if not hasattr(model, "blocks"):
        raise NotSupportedError("not supported yet: models that are not causal decoders")
    check_layer(model, layer)
    return model.blocks[layer]


def _check_supported(model: Any, block: Any) -> None:
    cfg = model.cfg
    needs_second = not getattr(cfg, "parallel_attn_mlp", False)
    if not hasattr(block, "ln1") or (needs_second and not hasattr(block, "ln2")):
        raise NotSupportedError("not supported yet: blocks without a norm before attention and MLP")
    if getattr(cfg, "num_experts", None) or any(_tensor(block.mlp, n) is None for n in ("W_in", "W_out")):
        raise NotSupportedError("not supported yet: mixture-of-experts MLPs")
    # Names last: they catch what no attribute shows, such as Granite's scaled residual writes.
    architecture = architecture_of(model)
    if architecture is not None:
        check_architecture(architecture)
    original = _original_config(model)
    if getattr(original, "do_layer_norm_before", True) is False:
        raise NotSupportedError("not supported yet: norms behind the residual sum (OPT-350m)")
    if getattr(getattr(original, "attn_config", None), "clip_qkv", None):
        raise NotSupportedError("not supported yet: clipped queries, keys and values (clip_qkv of MPT)")


def _original_config(model: Any) -> Any:
    """The transformers configuration behind a bridge; None for a HookedTransformer, which keeps none."""
    return getattr(getattr(model, "original_model", None), "config", None)


def _activation(model: Any) -> str:
    """The MLP's activation. The bridge's `cfg.act_fn` knows only what the configuration calls `hidden_act`."""
    if architecture_of(model) == "MptForCausalLM":
        return "gelu"  # fixed in its code, not in its configuration
    return str(getattr(_original_config(model), "activation", None) or model.cfg.act_fn)


def _tensor(module: Any, name: str) -> Tensor | None:
    """A weight, or None where the wrapper has none (TransformerLens: None, missing, or AttributeError)."""
    value = getattr(module, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _bias(module: Any, name: str) -> Tensor | None:
    """A bias that does something: HookedTransformer keeps zeros where there is none."""
    bias = _tensor(module, name)
    return None if bias is None or not bool((bias != 0).any()) else bias


def _post_gain(cfg: Any, block: Any, name: str) -> Tensor | None:
    """What multiplies a block's normalized write, None without such a norm."""
    if not hasattr(block, name):
        return None
    gain = _gain(cfg, getattr(block, name))
    if gain is None:
        raise NotSupportedError(f"not supported yet: {name} without a gain")
    return gain


def _gain(cfg: Any, norm: Any) -> Tensor | None:
    """A norm's gain. Gemma stores it less 1, which HookedTransformer adds on loading and the bridge does not."""
    gain = _tensor(norm, "w")
    return gain if gain is None or not getattr(cfg, "rmsnorm_uses_offset", False) else 1 + gain


def _norm(cfg: Any, norm: Any) -> Norm:
    kinds: dict[str, NormKind] = {"RMS": "rms", "RMSPre": "rms", "LN": "layer", "LNPre": "layer"}
    if cfg.normalization_type not in kinds:
        raise NotSupportedError(f"not supported yet: normalization {cfg.normalization_type!r}")
    return Norm(kinds[cfg.normalization_type], _gain(cfg, norm), _tensor(norm, "b"), float(cfg.eps))


def _value_heads(cfg: Any, values: Tensor) -> Tensor:
    """One `W_V`, or `b_V`, per key-value head: HookedTransformer repeats each for all heads that share it."""
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    return values[:: cfg.n_heads // n_kv] if values.shape[0] == cfg.n_heads else values
