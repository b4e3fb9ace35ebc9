"""Linear maps known by their products.

`y = M x` acts on columns, as in the paper. A map is built from a weight with `from_matrix`, `diagonal`,
`identity` or `centering`, and combined with `+`, `@` and `.T`, so that a block reads
`(identity(d) + F) @ (identity(d) + A)` and is never a dense matrix.

scipy's `LinearOperator` lives on the host and in NumPy; these forty lines keep the products on the
model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import InputError

Product = Callable[[Tensor], Tensor]

# Weights below float32 are promoted slice by slice: this many entries at a time (4 MB in float32).
_PROMOTED_ENTRIES = 1_048_576


@dataclass(frozen=True)
class LinearMap:
    """A linear map R^d_in -> R^d_out, known by its product and its transposed product.

    Attributes:
        shape: `(d_out, d_in)`.
        product: takes `[d_in, k]`, returns `[d_out, k]`.
        transposed_product: takes `[d_out, k]`, returns `[d_in, k]`.
        dtype: the floating type of vectors (float32 or float64).
        device: where the vectors live.

    Example:
        >>> W = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> M = identity(2) + from_matrix(W)
        >>> M @ torch.tensor([1.0, 1.0])
        tensor([3., 1.])
        >>> (M.T @ M).dense()
        tensor([[1., 2.],
                [2., 5.]])
    """

    shape: tuple[int, int]
    product: Product
    transposed_product: Product
    dtype: torch.dtype
    device: torch.device

    @property
    def T(self) -> LinearMap:  # noqa: N802
        """The transposed map."""
        d_out, d_in = self.shape
        return LinearMap((d_in, d_out), self.transposed_product, self.product, self.dtype, self.device)

    @overload
    def __matmul__(self, other: LinearMap) -> LinearMap: ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: LinearMap | Tensor) -> LinearMap | Tensor:
        if other.shape[0] != self.shape[1]:
            raise InputError(f"cannot multiply a map of shape {self.shape} with shape {tuple(other.shape)}")
        if isinstance(other, LinearMap):
            self._check_compatible(other)
            return LinearMap(
                (self.shape[0], other.shape[1]),
                lambda x: self.product(other.product(x)),
                lambda y: other.transposed_product(self.transposed_product(y)),
                self.dtype,
                self.device,
            )
        return self.product(other[:, None])[:, 0] if other.ndim == 1 else self.product(other)

    def __add__(self, other: LinearMap) -> LinearMap:
        if other.shape != self.shape:
            raise InputError(f"cannot add maps of shapes {self.shape} and {other.shape}")
        self._check_compatible(other)
        return LinearMap(
            self.shape,
            lambda x: self.product(x) + other.product(x),
            lambda y: self.transposed_product(y) + other.transposed_product(y),
            self.dtype,
            self.device,
        )

    def _check_compatible(self, other: LinearMap) -> None:
        if (self.dtype, self.device) != (other.dtype, other.device):
            raise InputError(
                f"cannot combine maps in {self.dtype} on {self.device} and in {other.dtype} on {other.device}"
            )

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix itself, `d_out x d_in`: for looking and for tests."""
        return self.product(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that linear algebra uses for weights of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# With few columns, rows in memory order are two to four times faster through the BLAS of a CPU: 0.20 ms
# instead of 0.46 ms for a 1536 x 576 weight and 8 columns (2 cores). Hence x^T W^T and a transposed view.
def _multiply(W: Tensor, x: Tensor) -> Tensor:
    """`W @ x` in `x`'s type, without a promoted copy of the whole of `W`."""
    rows = x.mT.contiguous()
    if W.dtype == x.dtype:
        return (rows @ W.mT).mT
    result = torch.empty(len(rows), len(W), dtype=x.dtype, device=x.device)
    for start, part in _promoted_slices(W, x.dtype):
        torch.mm(rows, part.mT, out=result[:, start : start + len(part)])
    return result.mT


def _multiply_transposed(W: Tensor, y: Tensor) -> Tensor:
    """`W.T @ y` in `y`'s type, without a promoted copy of the whole of `W`."""
    rows = y.mT.contiguous()
    if W.dtype == y.dtype:
        return (rows @ W).mT
    result = torch.zeros(len(rows), W.shape[1], dtype=y.dtype, device=y.device)
    for start, part in _promoted_slices(W, y.dtype):
        result.addmm_(rows[:, start : start + len(part)], part)
    return result.mT


def _promoted_slices(W: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The rows of `W` in another type, a few at a time: first row and slice, which the next one overwrites.

    One buffer for all of them, because a slice of its own for each costs more time than promoting it, and leaves the
    allocator with hundreds of megabytes.
    """
    height = min(max(1, _PROMOTED_ENTRIES // W.shape[1]), len(W))
    buffer = torch.empty(height, W.shape[1], dtype=dtype, device=W.device)
    for start in range(0, len(W), height):
        part = W[start : start + height]
        yield start, buffer[: len(part)].copy_(part)


def from_matrix(W: Float[Tensor, "d_out d_in"]) -> LinearMap:
    """The map of a matrix, which stays in its own dtype (a view of a model's weight is not copied)."""
    d_out, d_in = W.shape
    # The memory order decides which of the two loops over row slices is contiguous.
    if W.stride(0) == 1 and W.stride(1) != 1:
        return from_matrix(W.mT).T
    return LinearMap(
        (d_out, d_in),
        lambda x: _multiply(W, x),
        lambda y: _multiply_transposed(W, y),
        computing_dtype(W.dtype),
        W.device,
    )


def diagonal(entries: Float[Tensor, " d"]) -> LinearMap:
    """The map `x -> entries * x`."""
    column = entries.to(computing_dtype(entries.dtype))[:, None]
    return LinearMap((len(entries), len(entries)), column.mul, column.mul, column.dtype, column.device)


def identity(d: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LinearMap:
    """The identity on R^d."""
    return LinearMap((d, d), lambda x: x, lambda y: y, dtype, torch.device(device))


def centering(d: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LinearMap:
    """LayerNorm's subtraction of the mean, `I - 11^T / d`; symmetric."""

    def center(x: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)

    return LinearMap((d, d), center, center, dtype, torch.device(device))


def identity_like(M: LinearMap) -> LinearMap:
    """The identity in the dtype and on the device of the square map `M`."""
    return identity(M.shape[1], dtype=M.dtype, device=M.device)
