"""Norms counted on a logarithmic grid: medians and quantiles of any corpus in fixed memory."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

BINS_PER_OCTAVE = 256
"""A quantile read off the grid is within 2^(1/512) - 1 = 0.14 % of the true one."""

_LOWEST, _HIGHEST = -40, 60  # octaves: norms from 1e-12 to 1e18
_N_BINS = (_HIGHEST - _LOWEST) * BINS_PER_OCTAVE


class NormHistogram:
    """Counts of norms at several points of the residual stream.

    Attributes:
        counts: `[point, bin]`; bin `b` holds norms from `2^((b / 256) - 40)` on.
    """

    def __init__(self, n_points: int):
        self.counts: Int64[Tensor, "point bin"] = torch.zeros(n_points, _N_BINS, dtype=torch.int64)

    def add(self, point: int, norms: Float64[Tensor, " n"]) -> None:
        """Count the norms of some tokens at a point."""
        octaves = norms.cpu().clamp_min(2.0**_LOWEST).log2()
        bins = ((octaves - _LOWEST) * BINS_PER_OCTAVE).floor().long().clamp_max(_N_BINS - 1)
        self.counts[point] += torch.bincount(bins, minlength=_N_BINS)

    @property
    def total(self) -> int:
        """How many tokens were counted."""
        return int(self.counts[0].sum())

    def quantiles(self, levels: Float64[Tensor, " level"]) -> Float64[Tensor, "point level"]:
        """Quantiles of the norms per point; zeros if nothing was counted."""
        if self.total == 0:
            return torch.zeros(len(self.counts), len(levels), dtype=torch.float64)
        ranks = (levels * (self.total - 1)).floor().long() + 1
        cumulative = self.counts.cumsum(dim=1)
        bins = torch.searchsorted(cumulative, ranks.expand(len(cumulative), -1).contiguous())
        return norm_of(bins.double() + 0.5)

    def median(self) -> Float64[Tensor, " point"]:
        """The median norm per point."""
        return self.quantiles(torch.tensor([0.5], dtype=torch.float64))[:, 0]


def norm_of(bins: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """The norm at a (fractional) bin."""
    return torch.exp2(bins / BINS_PER_OCTAVE + _LOWEST)


def norm_gaps(
    ordinary: NormHistogram,
    every: NormHistogram,
    *,
    least_peak: float = 4.0,
    lowest_cut: float = 2.0,
    window: float = 0.5,
    sparse: float = 0.25,
) -> Float64[Tensor, " point"]:
    """Where, at each point, a gap separates exploding norms from ordinary ones; inf where nothing does.

    The rule needs no number of the model's. Norms are compared with the median of the tokens at non-initial
    positions, since the initial token explodes in any text. A point has high norms if

    1. the largest norm is at least four medians, and
    2. there is a valley below the high ones: a cut, two medians or higher, such that half an octave around
       it holds at most a quarter as many tokens as lie above. A tail that thins out has none.

    The threshold is the middle (in logarithm) of the lowest run of such cuts. Densities, not single tokens,
    decide, so a larger corpus does not move it much. Checked on SmolLM2 and planted models (tests).

    Args:
        ordinary: norms at non-initial positions; must not be empty.
        every: norms at all positions.
        least_peak: what the largest norm must reach, in medians.
        lowest_cut: the lowest cut, in medians.
        window: octaves around a cut that have to be sparse.
        sparse: tokens in the window per token above it, at most.
    """
    median = ordinary.median()[:, None]
    step = BINS_PER_OCTAVE // 8  # cuts lie on a grid of eighths of an octave, see CUTS
    half = int(window * BINS_PER_OCTAVE / 2)
    cuts = torch.arange(step, _N_BINS - half, step)
    below = torch.cat([torch.zeros(len(every.counts), 1, dtype=torch.int64), every.counts.cumsum(1)], dim=1)
    above = below[:, -1:] - below[:, cuts + half]
    inside = below[:, cuts + half] - below[:, (cuts - half).clamp_min(0)]
    highest = (every.counts > 0).long().mul(torch.arange(_N_BINS)).amax(dim=1, keepdim=True)
    largest = norm_of(highest.double() + 1)
    far_enough = (norm_of(cuts.double()) >= lowest_cut * median) & (largest >= least_peak * median)
    valid = far_enough & (above > 0) & (inside <= sparse * above)
    return torch.stack([_middle_of_first_run(row, cuts) for row in valid])


def _middle_of_first_run(valid: Bool[Tensor, " cut"], cuts: Int64[Tensor, " cut"]) -> Float64[Tensor, ""]:
    if not valid.any():
        return torch.tensor(torch.inf, dtype=torch.float64)
    first = int(valid.long().argmax())
    run = int(valid[first:].long().cumprod(0).sum())
    # The very number of CUTS: computed anew it may differ in the last bit, and sums are kept between CUTS.
    return CUTS[cuts[first + (run - 1) // 2] // (BINS_PER_OCTAVE // 8)]


CUTS: Float64[Tensor, " cut"] = norm_of(torch.arange(0, _N_BINS, BINS_PER_OCTAVE // 8, dtype=torch.float64))
"""All thresholds that `norm_gaps` can return, ascending."""
