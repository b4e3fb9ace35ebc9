"""The coefficient of an MLP's input on a direction, as a sum over stream, attention and norm."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.models.views import Norm


@dataclass(frozen=True, eq=False)
class CoefficientParts:
    """What the coefficients of tokens' MLP inputs are made of; `token + attention + norm` is the coefficient.

    Attributes:
        token: the coefficient of the stream in front of the block, behind the MLP's norm: what it were without
            attention's write.
        attention: what attention's write adds, at the scale of the norm that both pass.
        norm: what the change of that scale by attention's write makes of the stream in front of the block.
    """

    token: Float64[Tensor, " token"]
    attention: Float64[Tensor, " token"]
    norm: Float64[Tensor, " token"]

    @property
    def total(self) -> Float64[Tensor, " token"]:
        """The coefficients."""
        return self.token + self.attention + self.norm


def coefficient_parts(
    norm: Norm,
    x: Float[Tensor, "token d_model"],
    attention_out: Float[Tensor, "token d_model"],
    v: Float[Tensor, " d_model"],
) -> CoefficientParts:
    """The parts of `<N(x + a), v>`, N being the norm in front of the MLP, its gain and bias included.

    With `w = v` behind gain (and centring), `s(x)` the scale of the norm and `c` its bias along `v`,

        <N(x + a), v> = [w.x / s(x) + c] + [w.a / s(x + a)] + [w.x (1 / s(x + a) - 1 / s(x))]

    Args:
        norm: in front of the MLP.
        x: the streams in front of the block.
        attention_out: `a`, what attention adds to them before the MLP reads; zeros where the two are in parallel.
        v: the direction, in the space of the MLP's input.
    """
    x, a = x.double(), attention_out.double()
    v = v.to(x.device).double()
    w = v if norm.gain is None else v * norm.gain.double()
    before, behind = _scale(norm, x), _scale(norm, x + a)
    along_x, along_a = _centred(norm, x) @ w, _centred(norm, a) @ w
    constant = 0.0 if norm.bias is None else float(norm.bias.double() @ v)
    return CoefficientParts(
        token=along_x / before + constant,
        attention=along_a / behind,
        norm=along_x * (1 / behind - 1 / before),
    )


def _centred(norm: Norm, x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True) if norm.kind == "layer" else x


def _scale(norm: Norm, x: Tensor) -> Tensor:
    return (_centred(norm, x).square().mean(dim=-1) + norm.eps).sqrt()
