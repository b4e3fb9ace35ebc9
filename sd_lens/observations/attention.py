"""Attention sinks: how much attention the first token receives."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

SINK_THRESHOLD = 0.3
"""A head has a sink if the first key receives more than this on average (Gu et al. 2024)."""


class SinkSums:
    """Accumulates the attention that later queries pay to the first key, per layer and head."""

    def __init__(self, n_layers: int):
        self._sums: list[Tensor | None] = [None] * n_layers
        self._n = 0

    def count(self, real: Bool[Tensor, "batch pos"]) -> None:
        """Count the queries of a batch: its real tokens but the first of each text, which sees only itself."""
        self._n += int(real[:, 1:].sum())

    def add(self, layer: int, real: Bool[Tensor, "batch pos"], pattern: Float[Tensor, "batch head query key"]) -> None:
        """Add a layer's attention pattern."""
        received = pattern.detach()[:, :, 1:, 0].double()  # [batch, head, query]
        total = (received * real[:, None, 1:].to(received.device)).sum(dim=(0, 2)).cpu()
        before = self._sums[layer]
        self._sums[layer] = total if before is None else before + total

    def mean(self) -> Float64[Tensor, "layer head"]:
        """Mean attention on the first key; NaN if no text has two tokens."""
        return torch.stack([s for s in self._sums if s is not None]) / (self._n or float("nan"))
