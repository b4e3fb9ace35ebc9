"""Rounding schemes: how many bits, and which numbers share a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.linear.maps import computing_dtype

FEWEST_BITS, MOST_BITS = 2, 16


@dataclass(frozen=True)
class QuantizationScheme:
    """How weights and activations are rounded; by default W8A8 with one step per tensor.

    Rounding is symmetric: to the nearest multiple of a step, which is the largest absolute value among the numbers
    that share it over `2^(bits - 1) - 1`. Steps of activations are taken anew from everything that runs together.

    Attributes:
        weight_bits: 2 to 16; None leaves weights as they are.
        activation_bits: of the inputs of linear layers; None leaves them as they are.
        weights: `"tensor"`, one step per weight matrix, or `"channel"`, one per output.
        activations: `"tensor"`, one step for all that a linear layer reads at once, or `"token"`, one for each token.

    Raises:
        InputError: for another number of bits or granularity.

    Example:
        >>> print(QuantizationScheme(4, 8, weights="channel"))
        W4A8, weights per channel, activations per tensor
    """

    weight_bits: int | None = 8
    activation_bits: int | None = 8
    weights: Literal["tensor", "channel"] = "tensor"
    activations: Literal["tensor", "token"] = "tensor"

    def __post_init__(self) -> None:
        for name, bits in (("weight_bits", self.weight_bits), ("activation_bits", self.activation_bits)):
            if bits is not None and not (type(bits) is int and FEWEST_BITS <= bits <= MOST_BITS):
                raise InputError(f"{name}={bits!r}: expected an integer from {FEWEST_BITS} to {MOST_BITS}, or None")
        for name, value, allowed in (
            ("weights", self.weights, ("tensor", "channel")), ("activations", self.activations, ("tensor", "token")),
        ):  # fmt: skip
            if value not in allowed:
                raise InputError(f"{name}={value!r}: expected one of {allowed}")

    def __str__(self) -> str:
        bits = f"W{self.weight_bits or 'full'}A{self.activation_bits or 'full'}"
        return f"{bits}, weights per {self.weights}, activations per {self.activations}"


W8A8 = QuantizationScheme()
"""The paper's: eight bits, tensor-wise."""


def absmax(x: Float[Tensor, "*shape"], axes: tuple[int, ...] | None = None) -> Float[Tensor, "*kept"]:
    """The largest absolute value over `axes` (kept, with length 1), or over everything."""
    wide = x.detach().to(computing_dtype(x.dtype)).abs()
    return wide.max() if axes is None else wide.amax(axes, keepdim=True)


def rounded(x: Float[Tensor, "*shape"], bits: int, largest: Float[Tensor, "*kept"]) -> Float[Tensor, "*shape"]:
    """`x` rounded to the nearest of the `2^bits - 1` multiples of a step that `largest` allows.

    Args:
        x: any tensor.
        bits: 2 to 16.
        largest: the largest absolute value among the numbers that share a step, broadcast over `x`.

    Source: absmax quantization, Dettmers et al. 2022; as simulated by Xiao et al. 2023.
    """
    step = largest / (2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))  # zeros stay zeros
    return ((x.to(step.dtype) / step).round() * step).to(x.dtype)
