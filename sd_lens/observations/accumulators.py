"""What a single pass over a corpus keeps of high-norm states, while their threshold is still unknown."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.observations.texts import Batch


class DirectionSums:
    """Sums of states and of unit states, per point and class of norm, in float64.

    The threshold is known only at the end, so states are summed between neighbouring possible ones.
    """

    def __init__(self, edges: Float64[Tensor, " edge"]):
        self.edges = edges
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def add(self, point: int, states: Float[Tensor, "n d_model"], norms: Float64[Tensor, " n"]) -> None:
        """Add states and their norms at a point."""
        classes, index, counts = torch.bucketize(norms, self.edges).unique(return_inverse=True, return_counts=True)
        wide = states.double()
        tiny = torch.finfo(torch.float64).tiny
        both = torch.stack([wide, wide / norms.to(wide.device).clamp_min(tiny)[:, None]])
        sums = torch.zeros(2, len(classes), states.shape[1], dtype=torch.float64, device=wide.device)
        sums.index_add_(1, index.to(wide.device), both)
        for position, key in enumerate((point, c) for c in classes.tolist()):
            part = sums[:, position].cpu()
            self._sums[key] = self._sums[key] + part if key in self._sums else part
            self._counts[key] = self._counts.get(key, 0) + int(counts[position])

    def above(self, point: int, cut: float) -> tuple[int, Float64[Tensor, "2 d_model"] | None]:
        """Number of states above `cut` at a point, and their two sums (None without any)."""
        # bucketize puts edges[c - 1] < norm <= edges[c] into class c.
        lowest = int(torch.bucketize(torch.tensor(cut, dtype=torch.float64), self.edges)) + 1
        keys = [key for key in self._sums if key[0] == point and key[1] >= lowest]
        if not keys or math.isinf(cut):
            return 0, None
        total = torch.stack([self._sums[key] for key in keys]).sum(dim=0)
        return sum(self._counts[key] for key in keys), total


class Candidates:
    """Norms, at every point, of the tokens that may turn out to be of high norm."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self._rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._n = 0

    def add(self, batch: Batch, norms: Float64[Tensor, "point n"], floor: Float64[Tensor, " point"]) -> None:
        """Remember the real tokens of a batch whose norm exceeds `floor` at any point."""
        stands_out = (norms > floor[:, None]).any(dim=0).nonzero()[:, 0]
        stands_out = stands_out[: self.max_tokens - self._n]
        text, position = batch.real.nonzero()[stands_out].unbind(dim=1)
        self._rows.append((text + batch.first_text, position, batch.tokens[text, position], norms[:, stands_out]))
        self._n += len(stands_out)

    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text, position and token id (`[n]` each), and norms `[point, n]`."""
        text, position, token, norms = zip(*self._rows, strict=True)
        return torch.cat(text), torch.cat(position), torch.cat(token), torch.cat(norms, dim=1)
