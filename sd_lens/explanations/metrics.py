"""Metrics of a run: the norm of the residual stream, its length along a direction, a function of the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.models.hooks import logits_with_hooks, run_with_hooks

LogitMetric = Callable[[Tensor], Tensor]
"""Logits `[1, pos, d_vocab]` to a number."""


class Metric:
    """A number that a run ends in: a function of the logits, or of the stream at a hook point."""

    def __init__(self, name: str, last_layer: int, function: Callable[[Tensor], Tensor], point: str | None = None):
        self.name = name
        self.last_layer = last_layer
        self._function = function
        self._point = point

    def of_rows(self, model: Any, tokens: Int64[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
        """The metric of each row."""
        whole = self._watched(model, tokens, {}, gradients=False)
        return torch.stack([self._function(whole[i : i + 1]).detach() for i in range(len(tokens))])

    def run(
        self, model: Any, row: Int64[Tensor, " pos"], names: list[str], *, gradients: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The activations of a text at these points, and its metric, differentiable with respect to them if asked."""
        found: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor) -> Tensor:
            # What a hook is given can be dead to differentiation (TransformerBridge); what it returns is not.
            found[name] = activation.clone().requires_grad_(gradients or activation.requires_grad)
            return found[name]

        callbacks = {name: partial(keep, name) for name in names}
        return found, self._function(self._watched(model, row[None], callbacks, gradients=gradients))

    def _watched(self, model: Any, tokens: Tensor, callbacks: dict[str, Any], *, gradients: bool) -> Tensor:
        """The logits, or the stream that the metric is a function of."""
        if self._point is None:
            logits: Tensor = logits_with_hooks(model, tokens, callbacks, gradients=gradients)
            return logits
        seen: list[Tensor] = []
        run_with_hooks(model, tokens, callbacks | {self._point: seen.append}, gradients=gradients)
        stream: Tensor = seen.pop()
        return stream


def stream_metric(layer: int, position: int, unit: Float64[Tensor, " d_model"] | None) -> Metric:
    """The norm of the stream after a block at a position, or its length along a unit direction."""

    def norm(stream: Tensor) -> Tensor:
        length: Tensor = stream[0, position].double().norm()
        return length

    def projection(stream: Tensor) -> Tensor:
        assert unit is not None
        return stream[0, position].double() @ unit.to(stream.device)

    name = f"{'norm' if unit is None else 'length along the direction'} at position {position} after block {layer}"
    return Metric(name, layer, norm if unit is None else projection, f"blocks.{layer}.hook_resid_post")


def logit_metric(model: Any, function: LogitMetric) -> Metric:
    """A user's function of the logits; `InputError` when it is called and does not return one number."""

    def scalar(logits: Tensor) -> Tensor:
        value = function(logits)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InputError("the metric must return a tensor with one number, computed from the logits")
        return value.reshape(())

    return Metric(str(getattr(function, "__name__", "metric")), model.cfg.n_layers - 1, scalar)
