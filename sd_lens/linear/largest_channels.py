"""The channels in which a direction is largest, and how many of them two directions share by chance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import InputError


def n_largest(width: int) -> int:
    """How many channels count as the largest: the root of the width, so that chance shares one of them."""
    return round(math.sqrt(width))


def shared_channels(one: Float[Tensor, " d_model"], other: Float[Tensor, " d_model"]) -> int:
    """How many of their `n_largest` channels two directions share, with one relative sign.

    The larger of the number in which the signs agree and the number in which they differ, because a direction may
    be turned round.

    Raises:
        InputError: if the widths differ.

    Example:
        >>> shared_channels(torch.tensor([5.0, 0.1, -3.0, 0.2]), torch.tensor([-1.0, 0.3, 9.0, 0.1]))
        2
    """
    if one.shape != other.shape:
        raise InputError(f"directions of {len(one)} and {len(other)} entries cannot be compared")
    k = n_largest(len(one))
    products = torch.zeros(len(one), dtype=torch.float64)
    first, second = (direction.detach().cpu().double() for direction in (one, other))
    top = first.abs().topk(k).indices
    products[top] = first[top].sign() * second[top].sign()
    is_shared = torch.zeros(len(one), dtype=torch.bool)
    is_shared[second.abs().topk(k).indices] = True
    return max(int((products[is_shared] > 0).sum()), int((products[is_shared] < 0).sum()))


def log10_chance_of_sharing(shared: int, width: int) -> float:
    """Logarithm (base 10) of the probability that `shared_channels` is so large, or larger, by chance.

    By chance: every order and every sign of the second direction's channels is as likely as any other. That holds for
    models trained from independent initializations, whatever the sizes of their entries are; uniform directions are
    a special case. The number of common channels is hypergeometric, and of those each sign is a coin's. Exact: counted
    in integers.

    Raises:
        InputError: for a number that `shared_channels` cannot be.

    Example:
        >>> [round(log10_chance_of_sharing(shared, 576), 2) for shared in (1, 4, 12)]
        [-0.19, -2.63, -14.89]
    """
    k = n_largest(width)
    if not 0 <= shared <= k:
        raise InputError(f"{shared} shared channels of width {width}: expected 0 to {k}")
    cases = sum(
        math.comb(k, common) * math.comb(width - k, k - common) * _agreements(common, shared) << (k - common)
        for common in range(shared, k + 1)
    )
    return math.log10(cases) - math.log10(math.comb(width, k) << k)


def channels_beyond_chance(log10_p: float, width: int) -> int | None:
    """The fewest shared channels that chance reaches with a probability of `10 ** log10_p` at most.

    None where even all of them are more likely.
    """
    wanted = range(n_largest(width) + 1)
    return next((shared for shared in wanted if log10_chance_of_sharing(shared, width) <= log10_p), None)


def _agreements(common: int, shared: int) -> int:
    """In how many of 2 ** common ways to draw signs do at least `shared` agree, or at least so many differ?"""
    if 2 * shared <= common:
        return int(2**common)
    return 2 * sum(math.comb(common, agreeing) for agreeing in range(shared, common + 1))
