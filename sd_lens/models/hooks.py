"""Running a model with hooks: names checked, firings counted, the model always restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sd_lens.errors import HookError, InputError

Callback = Callable[[Tensor], Tensor | None]


class _AllFired(Exception):  # noqa: N818 - a signal, not an error
    """Every requested hook point has fired: nothing after it is of interest."""


def run_with_hooks(model: Any, tokens: Int[Tensor, "batch pos"], callbacks: Mapping[str, Callback]) -> None:
    """Run `model` on `tokens` up to the last of the hook points that `callbacks` names.

    Gradients are off. The run ends as soon as every callback was called once, which spares the blocks
    behind and the unembedding (for SmolLM2 a fifth of the time, for long batches most of the memory). An
    exception ends it, because `stop_at_layer` means two things: at the last layer HookedTransformer returns
    the residual, the bridge computes the logits.

    Args:
        model: `HookedTransformer` or `TransformerBridge`.
        tokens: token ids; rows padded on the right are fine, since a causal model's real tokens never see it.
        callbacks: hook-point name to function of the activation. What it returns, if not None, replaces the
            activation; dtype and shape must stay. A point that fires repeatedly (`ln1` in HookedTransformer)
            calls back only once.

    Raises:
        HookError: if a name is not a hook point of this model, or a point did not fire.
        InputError: if a token id is outside the vocabulary.
    """
    unknown = [name for name in callbacks if name not in model.hook_dict]
    if unknown:
        raise HookError(f"the model has no hook point {unknown[0]!r}; see model.hook_dict for its names")
    _check_tokens(model, tokens)
    fired: set[str] = set()

    def hook_for(name: str) -> Callable[..., Tensor | None]:
        def hook(activation: Tensor, hook: Any = None) -> Tensor | None:
            if name in fired:
                return None
            result = callbacks[name](activation)
            fired.add(name)
            if len(fired) == len(callbacks):
                raise _AllFired
            return result

        return hook

    with torch.no_grad(), ExitStack() as stack:
        try:
            stack.enter_context(model.hooks(fwd_hooks=[(name, hook_for(name)) for name in callbacks]))
        except ValueError as error:  # TransformerLens: points that a flag has to switch on first
            raise HookError(str(error)) from error
        try:
            model(tokens.to(model.cfg.device), return_type=None)
        except _AllFired:
            return
    missing = [name for name in callbacks if name not in fired]
    raise HookError(f"hook point {missing[0]!r} exists in the model but did not fire")


def residual_stream_points(n_layers: int) -> list[str]:
    """Names of the residual stream before block 0 and after each block: `n_layers + 1` points."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]


def _check_tokens(model: Any, tokens: Tensor) -> None:
    if tokens.numel() == 0:
        raise InputError("there are no tokens to run: the text is empty; pass prepend_bos=True or another text")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {model.cfg.d_vocab} tokens")
