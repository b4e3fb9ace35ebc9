"""How much attention keys receive from the queries behind them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

SINK_THRESHOLD = 0.3
"""A head has a sink if the first key receives more than this on average (Gu et al. 2024)."""


def received_attention(
    pattern: Float[Tensor, "batch head query pos"], real: Bool[Tensor, "batch pos"], n_keys: int | None = None
) -> Float64[Tensor, "batch head key"]:
    """What each of the first `n_keys` keys (all by default) receives from the real queries behind it, summed.

    A query's attention on itself is left out: the first one has no choice.
    """
    parts = [
        row[:, :length, :n_keys].double().tril(-1).sum(dim=1)  # a text at a time, to bound memory
        for row, length in zip(pattern.detach(), real.sum(dim=1).tolist(), strict=True)
    ]
    return torch.stack(parts).cpu()


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
        total = received_attention(pattern, real, 1)[:, :, 0].sum(dim=0)
        before = self._sums[layer]
        self._sums[layer] = total if before is None else before + total

    def mean(self) -> Float64[Tensor, "layer head"]:
        """Mean attention on the first key; NaN if no text has two tokens."""
        return torch.stack([s for s in self._sums if s is not None]) / (self._n or float("nan"))
