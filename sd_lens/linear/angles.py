"""Angles between directions: acute, in degrees, in float64."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.errors import InputError


def acute_angles(directions: Float[Tensor, "n d_model"], direction: Float[Tensor, " d"]) -> Float64[Tensor, " n"]:
    """Acute angle between each of `directions` and `direction`, in degrees: `90 - |angle - 90|`.

    Computed from the half-angle's tangent, which is exact for small angles where arccos is not.

    Raises:
        InputError: if the widths differ, or a vector is zero or not finite.

    Example:
        >>> acute_angles(torch.tensor([[1.0, 0.0], [-1.0, -1.0]]), torch.tensor([2.0, 0.0])).tolist()
        [0.0, 45.0]
    """
    if direction.shape != directions.shape[1:]:
        raise InputError(f"directions of {directions.shape[1]} and {tuple(direction.shape)} entries cannot be compared")
    u, v = directions.detach().cpu().double(), direction.detach().cpu().double()
    lengths = torch.cat([u.norm(dim=1), v.norm()[None]])
    if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
        raise InputError("a direction is zero or not finite, so it has no angle")
    u, v = u / lengths[:-1, None], v / lengths[-1]
    angles = torch.rad2deg(2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)))
    return torch.minimum(angles, 180 - angles)
