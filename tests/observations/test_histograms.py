import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_lens.observations.histograms import CUTS, NormHistogram, norm_gaps


def histogram(*norms):
    h = NormHistogram(1)
    for n in norms:
        h.add(0, torch.as_tensor(n, dtype=torch.float64))
    return h


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=200), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_quantiles_are_within_the_stated_resolution(norms, level):
    found = histogram(norms).quantiles(torch.tensor([level], dtype=torch.float64)).item()
    exact = np.quantile(norms, level, method="lower")
    assert found == pytest.approx(exact, rel=2 ** (1 / 512) - 1 + 1e-9)


def test_counts_add_up_in_any_order():
    norms = torch.rand(1000, dtype=torch.float64) * 50
    assert torch.equal(histogram(norms).counts, histogram(norms[500:], norms[:500]).counts)
    assert histogram(norms).total == 1000
    assert histogram().median().item() == 0


def ordinary(n, spread=0.25, seed=0):
    return torch.exp(spread * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def gap(norms, others=None):
    others = norms if others is None else others
    return norm_gaps(histogram(others), histogram(norms)).item()


@pytest.mark.parametrize("n", [50, 1000, 100_000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_no_gap_among_ordinary_norms_at_any_scale(n, scale):
    assert math.isinf(gap(scale * ordinary(n)))


@pytest.mark.parametrize("n", [50, 1000, 100_000])
@pytest.mark.parametrize("factor", [8, 200, 1e5])
def test_the_gap_below_exploding_norms_is_found_whatever_the_corpus_size(n, factor):
    norms = torch.cat([ordinary(n), factor * ordinary(max(1, n // 100), 0.05, seed=1)])
    assert 2 <= gap(norms) < 0.9 * factor
    assert (norms > gap(norms)).sum() == max(1, n // 100) + (norms[:n] > gap(norms)).sum()
    assert (norms[:n] > gap(norms)).sum() <= 0.01 * n


def test_the_threshold_is_the_middle_of_an_empty_gap():
    norms = torch.cat([torch.ones(100, dtype=torch.float64), torch.full((3,), 1024.0, dtype=torch.float64)])
    assert gap(norms) == pytest.approx(math.sqrt(2 * 1024 / 2**0.25), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_a_heavy_tail_without_valley_is_no_explosion(seed):
    norms = ordinary(100_000, spread=0.6, seed=seed)
    assert norms.max() > 8 * norms.median()
    assert math.isinf(gap(norms))


def test_the_lowest_of_two_gaps_counts():
    norms = torch.cat([ordinary(1000), 10 * ordinary(20, 0.02), 5000 * ordinary(20, 0.02)])
    assert gap(norms) < 10


def test_exploding_initial_tokens_do_not_hide_themselves():
    """Half of all tokens explode, as in texts of two tokens: the others are what is ordinary."""
    others, initial = ordinary(40), 500 * ordinary(40, 0.1, seed=3)
    assert gap(torch.cat([others, initial]), others) < 250


@pytest.mark.parametrize(("factor", "is_high"), [(3.0, False), (6.0, True)])
def test_high_means_four_medians(factor, is_high):
    norms = torch.cat([ordinary(1000, spread=0.05), factor * ordinary(20, 0.01)])
    assert math.isinf(gap(norms)) != is_high


@pytest.mark.parametrize(("between", "is_high"), [(10, True), (80, False)])
def test_a_valley_holds_a_quarter_of_what_is_above_at_most(between, is_high):
    """Tokens spread evenly (in logarithm) over the octave between the ordinary and 50 high ones."""
    spread = torch.logspace(0.9, 2.0, between, base=2, dtype=torch.float64)
    norms = torch.cat([ordinary(1000, 0.05), spread, 2**2.1 * ordinary(50, 0.01)])
    assert math.isinf(gap(norms)) != is_high


@pytest.mark.parametrize("scale", torch.logspace(-3, 3, 40).tolist())
def test_thresholds_are_exactly_of_the_grid(scale):
    norms = scale * torch.cat([torch.ones(100), torch.full((3,), 37.0)]).double()
    assert gap(norms) in CUTS.tolist()
