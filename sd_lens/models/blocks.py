"""From a model to the views of its blocks.

This module, `experts.py` and `linear_layers.py` alone know how HookedTransformer and TransformerBridge store weights,
and which architectures there are. Everything above them reads the views, or `LinearGroup`s to quantize.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from sd_lens.errors import InputError, NotSupportedError
from sd_lens.models.experts import expert_mlps, is_mixture, router
from sd_lens.models.hooks import architecture_of
from sd_lens.models.views import Block, BlockWeights, BlockWrites, MixtureWeights, Norm, NormKind, one_mlp

MIXTURES = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
"""Those of `SUPPORTED` that have mixtures of experts, in some blocks or all."""

SUPPORTED = (
    "FalconForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MptForCausalLM",
    "OPTForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", *MIXTURES,
)  # fmt: skip
"""Architectures whose view is tested; a HookedTransformer built from a configuration of one's own has none."""


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
    """The view of block `layer` (0-based), which has a single MLP.

    Raises:
        InputError: if there is no such block.
        NotSupportedError: as `block_view`; for a mixture of experts.
    """
    return one_mlp(block_view(model, layer))


def block_view(model: Any, layer: int) -> Block:
    """The view of block `layer` (0-based) of a `HookedTransformer` or `TransformerBridge`.

    Raises:
        InputError: if there is no such block.
        NotSupportedError: for an architecture that is not in `SUPPORTED`, or a variant of one that its linear maps do
            not cover.
    """
    block = _block(model, layer)
    _check_supported(model, block)
    if not is_mixture(block):
        return _weights(model, layer, block.mlp)
    mlps = expert_mlps(block.mlp)
    first = _weights(model, layer, mlps[0])
    experts = (
        replace(first, W_in=mlp.W_in.detach(), W_gate=mlp.W_gate.detach(), W_out=mlp.W_out.detach()) for mlp in mlps
    )
    return MixtureWeights(tuple(experts), router(model.cfg, block.mlp))


def _weights(model: Any, layer: int, mlp: Any) -> BlockWeights:
    """The view of a block with `mlp` as its MLP."""
    cfg, block = model.cfg, model.blocks[layer]
    attn = block.attn
    if not mlp.W_in.is_floating_point():
        raise NotSupportedError(f"not supported yet: weights stored as {mlp.W_in.dtype}; dequantise them first")
    W_gate = _tensor(mlp, "W_gate")
    b_V = _bias(attn, "b_V")
    b_in, b_neurons = _bias(mlp, "b_in"), None
    if W_gate is not None and _original_config(model) is None:
        b_in, b_neurons = None, b_in  # HookedTransformer adds it behind the product with the gate
    return BlockWeights(
        layer=layer,
        attention_norm=_norm(cfg, block.ln1),
        mlp_norm=_norm(cfg, getattr(block, "ln2", block.ln1)),
        W_V=_value_heads(cfg, attn.W_V.detach()),
        W_O=attn.W_O.detach(),
        W_in=mlp.W_in.detach(),
        W_gate=W_gate,
        W_out=mlp.W_out.detach(),
        b_in=b_in,
        b_gate=_bias(mlp, "b_gate"),
        act_fn=_activation(model),
        attention_post_gain=_post_gain(cfg, block, "ln1_post"),
        mlp_post_gain=_post_gain(cfg, block, "ln2_post"),
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
        b_V=None if b_V is None else _value_heads(cfg, b_V),
        b_O=_bias(attn, "b_O"),
        b_out=_bias(mlp, "b_out"),
        b_neurons=b_neurons,
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


def wanted_views(model: Any, layers: Iterable[int] | None, *, mixtures: bool = True) -> list[Block]:
    """The same, with mixtures of experts among them unless `mixtures` is False.

    Raises:
        InputError: as `wanted_blocks`.
        NotSupportedError: as `block_view`, or as `block_weights`.
    """
    view = block_view if mixtures else block_weights
    return [view(model, layer) for layer in wanted_layers(model.cfg.n_layers, layers)]


def wanted_mixtures(model: Any, layers: Iterable[int] | None) -> list[MixtureWeights]:
    """The views of some blocks that are mixtures of experts, or of all that are.

    Raises:
        InputError: as `wanted_blocks`; if one that is named has a single MLP, or all blocks have.
        NotSupportedError: as `block_view`.
    """
    found = wanted_views(model, layers)
    for block in found:
        if layers is not None and isinstance(block, BlockWeights):
            raise InputError(f"block {block.layer} has no experts but a single MLP")
    mixtures = [block for block in found if isinstance(block, MixtureWeights)]
    if not mixtures:
        raise InputError("the model has no mixtures of experts: every block has a single MLP")
    return mixtures


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
    if not is_mixture(block) and any(_tensor(block.mlp, n) is None for n in ("W_in", "W_out")):
        raise NotSupportedError("not supported yet: MLPs without W_in and W_out")
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
