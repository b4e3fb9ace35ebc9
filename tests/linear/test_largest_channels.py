import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sd_lens.errors import InputError
from sd_lens.linear.largest_channels import (
    channels_beyond_chance,
    log10_chance_of_sharing,
    n_largest,
    shared_channels,
)
from tests import tiny


def in_random_channels(direction, generator):
    signs = torch.randint(0, 2, direction.shape, generator=generator) * 2.0 - 1
    return direction[torch.randperm(len(direction), generator=generator)] * signs


def test_all_orders_and_signs_of_a_small_direction_are_counted():
    """Width 4, 2 channels: 24 orders times 16 signs, one by one."""
    one = torch.tensor([9.0, -7.0, 1.0, -2.0])
    shared = [
        shared_channels(one, one[list(order)] * torch.tensor(signs))
        for order in itertools.permutations(range(4))
        for signs in itertools.product((-1.0, 1.0), repeat=4)
    ]
    for n in (0, 1, 2):
        expected = sum(s >= n for s in shared) / len(shared)
        assert 10 ** log10_chance_of_sharing(n, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [16, 64, 576])
def test_it_is_a_hypergeometric_number_of_coins(width):
    k = n_largest(width)
    for shared in range(k + 1):
        expected = sum(
            stats.hypergeom.pmf(common, width, k, k)
            * (1.0 if 2 * shared <= common else 2 * stats.binom.sf(shared - 1, common, 0.5))
            for common in range(shared, k + 1)
        )
        assert log10_chance_of_sharing(shared, width) == pytest.approx(math.log10(expected), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("power", [1, 7])
def test_chance_is_the_same_for_spread_and_for_peaked_directions(power):
    """Entries to the seventh power: two of 64 channels hold nearly all of the length."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(64, generator=generator) ** power for _ in range(2))
    shared = torch.tensor([shared_channels(one, in_random_channels(other, generator)) for _ in range(2_000)])
    for n in (1, 2, 3):
        expected = 10 ** log10_chance_of_sharing(n, 64)
        error = math.sqrt(expected / 2_000)
        assert float((shared >= n).double().mean()) == pytest.approx(expected, abs=4 * error)


@settings(max_examples=30)
@given(st.integers(4, 200), st.integers(0, 10_000))
def test_a_direction_shares_all_with_itself_turned_round_and_is_symmetric(width, seed):
    one, other = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    assert shared_channels(one, -3 * one) == n_largest(width)
    assert shared_channels(one, other) == shared_channels(other, one)


def test_channels_that_are_zero_are_not_shared():
    one = torch.zeros(16)
    one[3] = 1.0
    assert shared_channels(one, one) == 1


def test_the_required_number_is_the_first_beyond_chance():
    required = channels_beyond_chance(-5.0, 576)
    assert log10_chance_of_sharing(required, 576) <= -5 < log10_chance_of_sharing(required - 1, 576)
    assert channels_beyond_chance(-5.0, 8) is None


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="directions of 4 and 9 entries cannot be compared"):
        tiny.unchecked(shared_channels)(torch.ones(4), torch.ones(9))
    with pytest.raises(InputError, match="5 shared channels of width 16: expected 0 to 4"):
        log10_chance_of_sharing(5, 16)
