"""Angles between random directions: how likely so small a one is by chance, however unlikely that is."""

from __future__ import annotations

import math

from sd_lens.errors import InputError

_TERMS = 64  # what the continued fraction needs at small widths


def log10_chance(angle: float, width: int) -> float:
    """Logarithm (base 10) of the probability that two random directions are at most `angle` apart.

    Directions are uniform on the sphere, the angle is acute: `cos^2` has the distribution Beta(1/2, (width - 1)/2).

    Args:
        angle: degrees, 0 to 90.
        width: of the space, 2 or more.

    Returns:
        The logarithm, because the probability itself is below the smallest float64 for angles of interest; -inf at 0.

    Raises:
        InputError: for an angle or a width out of range.

    Source: the area of a spherical cap as an incomplete beta function (Li 2011, Asian J. Math. Stat. 4, 66-70).

    Example:
        >>> round(10 ** log10_chance(60.0, 2), 6), round(log10_chance(5.0, 576), 1)
        (0.666667, -610.8)
    """
    if not 0 <= angle <= 90:
        raise InputError(f"angle={angle}: expected 0 to 90 degrees")
    if width < 2:
        raise InputError(f"width={width}: expected 2 or more, or there is nothing random about a direction")
    sine2, cosine2 = math.sin(math.radians(angle)) ** 2, math.cos(math.radians(angle)) ** 2
    if sine2 == 0:
        return -math.inf
    if sine2 * (width + 4) < width + 1:
        return _log_incomplete_beta(sine2, cosine2, (width - 1) / 2, 0.5) / math.log(10)
    # Near 90 degrees the probability is nearly one: the fraction of the complement is the one that converges.
    return math.log1p(-math.exp(_log_incomplete_beta(cosine2, sine2, 0.5, (width - 1) / 2))) / math.log(10)


def chance_angle(log10_p: float, width: int) -> float:
    """The angle in degrees that two random directions undercut with a probability of `10 ** log10_p`.

    The inverse of `log10_chance`, to the last digits, by bisection.

    Raises:
        InputError: for a probability that is not between 0 and 1, or a width below 2.

    Example:
        >>> [round(chance_angle(-3.0, width), 2) for width in (64, 576, 4096)]
        [66.5, 82.15, 87.05]
    """
    if not -math.inf < log10_p < 0:
        raise InputError(f"log10_p={log10_p}: expected the logarithm of a probability between 0 and 1")
    low, high = 0.0, 90.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if log10_chance(middle, width) < log10_p else (low, middle)
    return low


def _log_incomplete_beta(x: float, y: float, a: float, b: float) -> float:
    """Logarithm of the regularized I_x(a, b), `y = 1 - x`, by its continued fraction (DLMF 8.17.22)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    fraction = 1.0
    # It converges in some sqrt(a + b) terms where x is below (a + 1)/(a + b + 2), as it is here.
    for m in range(_TERMS + math.isqrt(int(a + b)), 0, -1):
        fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
        fraction = 1 - (a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1)) / fraction
    return a * math.log(x) + b * math.log(y) - math.log(a) - log_beta - math.log(fraction)
