import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from sd_lens.errors import InputError
from sd_lens.linear.angles import acute_angles
from sd_lens.linear.random_angles import chance_angle, log10_chance


@pytest.mark.parametrize("width", [2, 3, 4, 9, 64, 576, 4096, 16384])
def test_the_closed_form_is_scipys_beta_distribution_where_that_does_not_underflow(width):
    compared = 0
    for angle in (0.01, 1.0, 10.0, 45.0, 60.0, 70.0, 80.0, 85.0, 87.0, 88.0, 89.0, 89.5, 89.99, 90.0):
        expected = stats.beta.logcdf(math.sin(math.radians(angle)) ** 2, (width - 1) / 2, 0.5) / math.log(10)
        if math.isfinite(expected):
            compared += 1
            assert log10_chance(angle, width) == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert compared >= 7


@pytest.mark.parametrize(("angle", "width"), [(0.4, 576), (7.7, 2048), (60.0, 16384), (89.0, 4096)])
def test_far_into_the_tail_it_is_the_integral_of_the_sines_power(angle, width):
    """Of the sphere's area, the cap is that of sin^(d-2); taken relative to the integrand at the rim."""
    end = math.radians(angle)

    def share_of_the_rim(depth):
        return math.exp((width - 2) * (math.log(math.sin(end - depth)) - math.log(math.sin(end))))

    depth_that_counts = min(end * (1 - 1e-12), 60 * math.tan(end) / width)
    area, _ = integrate.quad(share_of_the_rim, 0, depth_that_counts, epsabs=0, epsrel=1e-11)
    log_half_sphere = math.lgamma((width - 1) / 2) + math.lgamma(0.5) - math.lgamma(width / 2) - math.log(2)
    expected = (math.log(area) + (width - 2) * math.log(math.sin(end)) - log_half_sphere) / math.log(10)
    assert log10_chance(angle, width) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [3, 8, 40])
def test_random_directions_are_so_near_so_often(width):
    generator = torch.Generator().manual_seed(width)
    directions = torch.randn(100_000, width, generator=generator, dtype=torch.float64)
    angles = acute_angles(directions, torch.randn(width, generator=generator, dtype=torch.float64))
    for angle in (30.0, 60.0, 70.0, 80.0, 89.0):
        expected = 10 ** log10_chance(angle, width)
        error = math.sqrt(expected * (1 - expected) / 100_000)
        assert float((angles <= angle).double().mean()) == pytest.approx(expected, abs=4 * error + 1e-9)


@settings(max_examples=30)
@given(st.floats(-300, -1e-6), st.integers(2, 5000))
def test_the_threshold_is_the_inverse(log10_p, width):
    angle = chance_angle(log10_p, width)
    assert 0 <= angle <= 90
    if angle > 1e-3:
        assert log10_chance(angle, width) == pytest.approx(log10_p, rel=1e-6, abs=1e-9)


@settings(max_examples=30)
@given(st.floats(0, 90), st.floats(0, 90), st.integers(2, 5000))
def test_smaller_angles_are_less_likely(one, other, width):
    low, high = sorted((one, other))
    assert log10_chance(low, width) <= log10_chance(high, width) + 1e-12


def test_the_ends_are_certain_and_impossible():
    assert log10_chance(0.0, 5) == -math.inf
    assert log10_chance(90.0, 5) == pytest.approx(0, abs=1e-15)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="angle=91.0: expected 0 to 90 degrees"):
        log10_chance(91.0, 5)
    with pytest.raises(InputError, match="width=1: expected 2 or more"):
        log10_chance(45.0, 1)
    for value in (0.0, -math.inf, math.nan):
        with pytest.raises(InputError, match=f"log10_p={value}: expected the logarithm of a probability"):
            chance_angle(value, 5)
