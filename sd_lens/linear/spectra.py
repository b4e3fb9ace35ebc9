"""Leading singular triples of a linear map, from products alone.

Block Krylov iteration (Musco & Musco, NeurIPS 2015) with full reorthogonalisation, Rayleigh-Ritz on the
whole basis and a thick restart. A product with a few columns costs hardly more than with one, since the
pass over the weights is what takes the time; that is why this is a block method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.maps import LinearMap

# The value after the last wanted one only enters the gap. A residual r means a singular value within r / 2; in practice
# the error is quadratic in r: at most 0.4 % of the gaps of SmolLM2 and of random blocks of large shapes.
_GAP_TOLERANCE = 3e-2
_BLOCK = 8
_MAX_BLOCKS = 24
_KEPT_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class LeadingTriples:
    """The `k` leading singular triples of a map, largest first; `M v = s u` and `M^T u = s v`.

    Attributes:
        left: `[d_out, k]`, unit columns; the entry of largest magnitude is positive.
        values: `[k]`, in float64.
        right: `[d_in, k]`, unit columns.
        gap: `s_k / s_(k+1)`, to about 1 % (float32 products hide how far the iteration is beyond 300: there
            it is an order of magnitude). 1 means that the last direction is arbitrary, inf that the map's
            rank is k.
        products: how many times the map or its transpose was applied to a block of columns.
    """

    left: Float[Tensor, "d_out k"]
    values: Float64[Tensor, " k"]
    right: Float[Tensor, "d_in k"]
    gap: float
    products: int


def leading_triples(
    M: LinearMap, k: int = 1, *, tol: float = 1e-4, max_products: int = 2000, seed: int = 0
) -> LeadingTriples:
    """Leading singular triples of `M`, without its dense matrix.

    Args:
        M: the map; its products run in its dtype, on its device.
        k: how many triples.
        tol: bound on the relative residual `|M^T u - s v| / s`. The sine of the angle between `v` and the
            true direction is then at most about `tol / (1 - 1/gap^2)`.
        max_products: give up after so many products.
        seed: of the random starting block.

    Raises:
        InputError: if the map has fewer than `k` triples.
        NumericalError: if a product is not finite, or the residual stays above `tol`.

    Example:
        >>> from sd_lens.linear.maps import diagonal
        >>> t = leading_triples(diagonal(torch.tensor([3.0, -7.0, 1.0])))
        >>> [round(x, 4) for x in t.values.tolist()], t.left[:, 0].round().abs().tolist(), round(t.gap, 3)
        ([7.0], [0.0, 1.0, 0.0], 2.333)
    """
    d_out, d_in = M.shape
    if not 1 <= k <= min(M.shape):
        raise InputError(f"k={k}: a {d_out} x {d_in} map has 1 to {min(M.shape)} singular triples")
    width = min(max(_BLOCK, k + 2), d_in)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(d_in, width, generator=generator, dtype=torch.float64)
    block = torch.linalg.qr(start.to(M.device, M.dtype)).Q
    basis, images, pulled = (torch.empty(n, 0, dtype=M.dtype, device=M.device) for n in (d_in, d_out, d_in))
    products = 0
    while True:
        image = M @ block
        back = M.T @ image
        products += 2
        if not torch.isfinite(back).all():
            raise NumericalError(
                f"a product with a {d_out} x {d_in} map is not finite: the weights hold NaN or inf, or overflow"
            )
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, image], dim=1)
        pulled = torch.cat([pulled, back], dim=1)

        # Rayleigh-Ritz for M^T M. The small problem is solved in float64, on the host.
        gram = (basis.mT @ pulled).cpu().double()
        squares, ritz = (x.flip(-1) for x in torch.linalg.eigh((gram + gram.mT) / 2))
        wanted = ritz[:, : min(k + 1, ritz.shape[1])].to(M.device, M.dtype)
        squares = squares.clamp_min(0)
        top = squares[: wanted.shape[1]].to(M.device, M.dtype)
        residuals = (pulled @ wanted - (basis @ wanted) * top).norm(dim=0).double().cpu()
        # Rounding of the products bounds what the trailing residual can reach: measure it on the largest value.
        scale = torch.maximum(squares[: wanted.shape[1]], squares[0] * 1e-6)
        relative = torch.where(scale > 0, residuals / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        if bool((relative[:k] <= tol).all()) and bool((relative[k:] <= _GAP_TOLERANCE).all()):
            break

        block = _next_block(basis, back, scale=math.sqrt(float(squares[0])))
        if block.shape[1] == 0:
            break  # the basis spans an invariant subspace: Rayleigh-Ritz is exact
        if products >= max_products:
            raise NumericalError(
                f"leading singular triple not found: residual {float(relative[:k].max()):.1e} after "
                f"{products} products, wanted {tol:.1e}; loosen tol or raise max_products"
            )
        if basis.shape[1] >= _MAX_BLOCKS * width:
            kept = ritz[:, : _KEPT_BLOCKS * width].to(M.device, M.dtype)
            basis, images, pulled = basis @ kept, images @ kept, pulled @ kept
    return _triples(basis @ wanted, images @ wanted, k, products)


def _next_block(basis: Tensor, candidates: Tensor, *, scale: float) -> Tensor:
    """Orthonormal columns that extend `basis` by the part of `candidates` outside its span."""
    block = candidates / max(scale * scale, torch.finfo(candidates.dtype).tiny)
    for _ in range(2):  # once loses orthogonality, twice is enough (Parlett, The Symmetric Eigenvalue Problem)
        block = block - basis @ (basis.mT @ block)
        block, R = torch.linalg.qr(block)
        block = block[:, R.diagonal().abs() > 16 * torch.finfo(block.dtype).eps]
    return block[:, : basis.shape[0] - basis.shape[1]]


def _triples(right: Tensor, image: Tensor, k: int, products: int) -> LeadingTriples:
    """Triples from the Ritz vectors (`k` and one more, if there is one) and their images."""
    values = image.norm(dim=0, dtype=torch.float64).cpu()
    last, following = float(values[k - 1]), float(values[k]) if len(values) > k else 0.0
    is_zero = following <= 64 * torch.finfo(image.dtype).eps * last  # rounding of a map of lower rank
    gap = last / following if not is_zero else (math.inf if last > 0 else 1.0)
    left, right = _normalised(image[:, :k]), _normalised(right[:, :k])
    signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    return LeadingTriples(left * signs, values[:k], right * signs, max(gap, 1.0), products)


def _normalised(columns: Tensor) -> Tensor:
    """Unit columns; a column of zeros becomes the first unit vector, which is as good as any."""
    lengths = columns.norm(dim=0)
    unit: Tensor = columns / lengths.clamp_min(torch.finfo(columns.dtype).tiny)
    unit[0, lengths == 0] = 1
    return unit
