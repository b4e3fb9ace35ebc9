"""Running a model with hooks: names checked, firings counted, edits that bite, the model always restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.errors import HookError, InputError

Callback = Callable[[Tensor], Tensor | None]

_UNHEARD_PATTERNS = ("OPTForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "XGLMForCausalLM")
_SHARED_NORM = "HookedTransformer would edit attention's input only, the bridge the MLP's too; edit hook_resid_pre"
# Where one of TransformerLens's wrappers fires a hook and then ignores, or half ignores, what it returns:
# end of the point's name, architectures (None: all), and what to do instead.
_READ_ONLY: tuple[tuple[str, tuple[str, ...] | None, str], ...] = (
    (
        "hook_resid_mid",
        None,
        "the bridge would edit the MLP's input only; edit hook_attn_out, which adds to the same stream",
    ),
    ("attn.hook_pattern", _UNHEARD_PATTERNS, "the bridge would ignore it; edit attn.hook_z"),
    ("attn.hook_attn_scores", _UNHEARD_PATTERNS, "the bridge would ignore it; edit attn.hook_z"),
    ("ln1.hook_normalized", ("GPTJForCausalLM",), _SHARED_NORM),
    ("ln1.hook_scale", ("GPTJForCausalLM",), _SHARED_NORM),
)


class _AllFired(Exception):  # noqa: N818 - a signal, not an error
    """Every requested hook point has fired: nothing after it is of interest."""


def run_with_hooks(
    model: Any, tokens: Int[Tensor, "batch pos"], callbacks: Mapping[str, Callback], *, gradients: bool = False
) -> None:
    """Run `model` on `tokens` up to the last of the hook points that `callbacks` names.

    The run ends as soon as every callback was called once, which spares the blocks behind and the
    unembedding (for SmolLM2 a fifth of the time, for long batches most of the memory). An exception ends
    it, because `stop_at_layer` means two things: at the last layer HookedTransformer returns the residual,
    the bridge computes the logits.

    Args:
        model: `HookedTransformer` or `TransformerBridge`.
        tokens: token ids; rows padded on the right are fine, since a causal model's real tokens never see it.
        callbacks: hook-point name to function of the activation. What it returns, if not None, replaces the
            activation; dtype and shape must stay. A point that fires repeatedly (`ln1` in HookedTransformer)
            calls back only once, unless the callback edits.
        gradients: record operations for automatic differentiation. A captured activation can be dead to it
            in the bridge: return a clone, and differentiate with respect to that.

    Raises:
        HookError: if a name is not a hook point of this model, a point did not fire, or an edit is impossible.
        InputError: if a token id is outside the vocabulary.
    """
    _check_tokens(model, tokens)
    fired: set[str] = set()
    editing: set[str] = set()

    def once(name: str) -> Callback:
        def callback(activation: Tensor) -> Tensor | None:
            if name in fired and name not in editing:
                return None
            result = callbacks[name](activation)
            fired.add(name)
            if result is not None:
                editing.add(name)
                _check_edit(model, name, activation, result)
            if len(fired) == len(callbacks):
                raise _AllFired
            return result

        return callback

    with torch.set_grad_enabled(gradients), hooked(model, {name: once(name) for name in callbacks}):
        try:
            model(tokens.to(model.cfg.device), return_type=None)
        except _AllFired:
            return
    check_fired(callbacks, fired)


def logits_with_hooks(
    model: Any, tokens: Int[Tensor, "batch pos"], callbacks: Mapping[str, Callback], *, gradients: bool = False
) -> Float[Tensor, "batch pos d_vocab"]:
    """The same to the end of the model; returns the logits. Points that fire repeatedly call back each time.

    Raises:
        HookError: as `run_with_hooks`.
        InputError: as `run_with_hooks`.
    """
    _check_tokens(model, tokens)
    with torch.set_grad_enabled(gradients), hooked(model, callbacks) as fired:
        logits: Tensor = model(tokens.to(model.cfg.device), return_type="logits")
    check_fired(callbacks, fired)
    return logits


@contextmanager
def hooked(model: Any, callbacks: Mapping[str, Callback]) -> Iterator[set[str]]:
    """While the block runs, `callbacks` see, and may edit, the activations of every forward pass.

    Yields the names that have fired so far. Hooks are TransformerLens's own, in a context: they are
    removed when the block ends, however it ends.

    Raises:
        HookError: if a name is not a hook point of this model; when a callback returns a tensor at a point
            where a wrapper would ignore it, or of another shape or dtype (HookedTransformer would go on
            with it, the bridge would fail).
    """
    unknown = [name for name in callbacks if name not in model.hook_dict]
    if unknown:
        raise HookError(f"the model has no hook point {unknown[0]!r}; see model.hook_dict for its names")
    fired: set[str] = set()

    def hook_for(name: str) -> Callable[..., Tensor | None]:
        def hook(activation: Tensor, hook: Any = None) -> Tensor | None:
            result = callbacks[name](activation)
            fired.add(name)
            if result is not None:
                _check_edit(model, name, activation, result)
            return result

        return hook

    try:
        context = model.hooks(fwd_hooks=[(name, hook_for(name)) for name in callbacks])
        context.__enter__()
    except ValueError as error:  # TransformerLens: points that a flag has to switch on first
        raise HookError(str(error)) from error
    try:
        yield fired
    finally:
        context.__exit__(None, None, None)


def residual_stream_points(n_layers: int) -> list[str]:
    """Names of the residual stream before block 0 and after each block: `n_layers + 1` points."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]


def architecture_of(model: Any) -> str | None:
    """The transformers class that the model was made from, where the wrapper knows it."""
    return getattr(model.cfg, "original_architecture", None) or getattr(model.cfg, "architecture", None)


def check_fired(callbacks: Mapping[str, Callback], fired: set[str]) -> None:
    """Whether every point has fired that should have.

    Raises:
        HookError: if one exists in the model but did not.
    """
    missing = [name for name in callbacks if name not in fired]
    if missing:
        raise HookError(f"hook point {missing[0]!r} exists in the model but did not fire")


def _check_edit(model: Any, name: str, before: Tensor, after: Tensor) -> None:
    for ending, architectures, advice in _READ_ONLY:
        if name.endswith(ending) and (architectures is None or architecture_of(model) in architectures):
            raise HookError(f"{name} can be read, not edited: {advice}")
    if after.shape != before.shape or after.dtype != before.dtype:
        raise HookError(
            f"the edit of {name} returned {tuple(after.shape)} in {after.dtype} "
            f"for {tuple(before.shape)} in {before.dtype}: shape and dtype must stay"
        )


def _check_tokens(model: Any, tokens: Tensor) -> None:
    if tokens.numel() == 0:
        raise InputError("there are no tokens to run: the text is empty; pass prepend_bos=True or another text")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {model.cfg.d_vocab} tokens")
