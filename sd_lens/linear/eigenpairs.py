"""The eigenvector of a map that is nearest to a direction: Arnoldi from that direction, or the dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Complex128, Float, Float64
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.maps import LinearMap

Part = Literal["plane", "real"]
"""What of a complex eigenvector an angle is taken to: the real plane that it spans with its conjugate, or its real
part (the paper's; it depends on the eigenvector's phase, here that of its largest entry being real)."""

_LARGEST_DENSE = 1024
_MOST_STEPS = 300


@dataclass(frozen=True, eq=False)
class NearestEigenpair:
    """The eigenpair of a real map whose eigenvector makes the smallest angle with a direction.

    Attributes:
        value: the eigenvalue; one of the two where it is complex, that with the positive imaginary part.
        vector: `[d]`, unit; its entry of largest magnitude is real and positive.
        angle: acute, in degrees.
        residual: `|M v - value v|` relative to `|M|`'s action on the direction and to the eigenvalue.
    """

    value: complex
    vector: Complex128[Tensor, " d"]
    angle: float
    residual: float


def nearest_eigenpair(
    M: LinearMap, direction: Float[Tensor, " d"], part: Part = "plane", *, tol: float = 1e-4
) -> NearestEigenpair:
    """The eigenvector of a square map that is nearest to `direction`.

    Up to width 1024 all eigenvectors are computed and compared. Above, an Arnoldi iteration starts from the
    direction: its first Ritz vectors to converge are those that the direction contains most of, and one product
    with the map is all that a step costs. It ends when the nearest Ritz pair has converged.

    Args:
        M: the map.
        direction: any length but 0.
        part: how complex eigenvectors are compared with it.
        tol: bound on the relative residual.

    Raises:
        InputError: for a map that is not square, a direction of another width, zero or not finite.
        NumericalError: if a product is not finite, or the iteration does not converge.
    """
    d = M.shape[1]
    length = float(direction.double().norm())
    if M.shape[0] != d or direction.shape != (d,) or not 0 < length < math.inf:
        raise InputError(f"expected a square map and a direction of its width, finite and not 0; the map is {M.shape}")
    unit = direction.double().cpu() / length
    return _dense(M, unit, part) if d <= _LARGEST_DENSE else _arnoldi(M, unit, part, tol)


def rayleigh_quotient(M: LinearMap, direction: Float[Tensor, " d"]) -> float:
    """`u . M u` for the unit vector u along the direction: one product."""
    u = direction.to(M.device, M.dtype)
    u = u / u.norm()
    return float(u.double() @ (M @ u).double())


def _dense(M: LinearMap, unit: Float64[Tensor, " d"], part: Part) -> NearestEigenpair:
    matrix = M.dense().double().cpu()
    if not torch.isfinite(matrix).all():
        raise NumericalError("the map is not finite: the weights hold NaN or inf, or overflow")
    values, vectors = torch.linalg.eig(matrix)
    return _nearest(values, vectors, unit, part, lambda v: matrix.to(v.dtype) @ v, float((matrix @ unit).norm()))


def _arnoldi(M: LinearMap, unit: Float64[Tensor, " d"], part: Part, tol: float) -> NearestEigenpair:
    def product(x: Tensor) -> Tensor:
        y = (M @ x.to(M.device, M.dtype)).double().cpu()
        if not torch.isfinite(y).all():
            raise NumericalError("a product with the map is not finite: the weights hold NaN or inf, or overflow")
        return y

    def complex_product(v: Tensor) -> Tensor:
        return torch.complex(product(v.real), product(v.imag))

    basis = [unit]
    H = torch.zeros(_MOST_STEPS + 1, _MOST_STEPS, dtype=torch.float64)
    strength = 0.0
    found = None
    for step in range(min(_MOST_STEPS, M.shape[1])):
        w = product(basis[step])
        strength = strength or float(w.norm())
        Q = torch.stack(basis, dim=1)
        for _ in range(2):  # once more against rounding
            overlap = Q.T @ w
            w = w - Q @ overlap
            H[: step + 1, step] += overlap
        H[step + 1, step] = w.norm()
        is_invariant = float(H[step + 1, step]) <= 1e-10 * max(strength, 1e-300)
        if step % 5 == 4 or is_invariant:
            values, small = torch.linalg.eig(H[: step + 1, : step + 1])
            found = _nearest(values, Q.to(small.dtype) @ small, unit, part, complex_product, strength)
            if found.residual <= tol or is_invariant:
                return found
        basis.append(w / w.norm())
    residual = math.inf if found is None else found.residual
    raise NumericalError(
        f"nearest eigenvector not found: residual {residual:.1e} after {_MOST_STEPS} products, wanted {tol:.1e}"
    )


def _nearest(
    values: Complex128[Tensor, " n"],
    vectors: Complex128[Tensor, "d n"],
    unit: Float64[Tensor, " d"],
    part: Part,
    product: Callable[[Tensor], Tensor],
    strength: float,
) -> NearestEigenpair:
    vectors = vectors / vectors.norm(dim=0)
    largest = vectors.abs().argmax(dim=0)
    phase = vectors[largest, torch.arange(len(values))]
    vectors = vectors * (phase.conj() / phase.abs())
    cosines = _cosines_to_real_parts(vectors, unit) if part == "real" else _cosines_to_planes(vectors, unit)
    # Conjugates make the same angle: prefer the one above the real axis.
    best = int(torch.where(values.imag >= 0, cosines, -1.0).argmax())
    value, vector = complex(values[best]), vectors[:, best]
    residual = float((product(vector) - value * vector).norm()) / max(abs(value), strength, 1e-300)
    return NearestEigenpair(value, vector, math.degrees(math.acos(min(1.0, float(cosines[best])))), residual)


def _cosines_to_real_parts(vectors: Complex128[Tensor, "d n"], unit: Float64[Tensor, " d"]) -> Float64[Tensor, " n"]:
    cosines: Tensor = (unit @ vectors.real).abs() / vectors.real.norm(dim=0)
    return cosines


def _cosines_to_planes(vectors: Complex128[Tensor, "d n"], unit: Float64[Tensor, " d"]) -> Float64[Tensor, " n"]:
    """The length of the direction's projection on the span of each vector's real and imaginary parts."""
    a, b = vectors.real, vectors.imag
    first = a / a.norm(dim=0)
    rest = b - first * (first * b).sum(dim=0)
    length = rest.norm(dim=0)
    second = torch.where(length > 1e-12, rest / length.clamp_min(1e-300), 0.0)
    cosines: Tensor = ((unit @ first).square() + (unit @ second).square()).sqrt()
    return cosines
