"""Eigenvalues along the defect direction: where a norm decays, R x points against x (Wang et al. 2025, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Complex128, Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError
from sd_lens.linear.approximations import (
    Convention,
    Linearization,
    MapsOfBlocks,
    block_map,
    block_parts,
    name_of,
)
from sd_lens.linear.eigenpairs import Part, nearest_eigenpair, rayleigh_quotient
from sd_lens.linear.maps import diagonal
from sd_lens.models.blocks import wanted_views


@dataclass(frozen=True, eq=False)
class DefectEigenvalues:
    """How each block's residual step R = L - I acts near a direction; blocks are 0-based.

    Attributes:
        layers: the blocks; entry i of every tensor belongs to block `layers[i]`.
        eigenvalue: of the eigenvector of R nearest to the direction. Where its real part is negative, the block takes
            away from the direction. Its size lacks the 1/rms of the norms, which the maps drop.
        angle: between that eigenvector (or the real plane of a complex pair) and the direction, acute, in degrees.
        rayleigh: `u . R u` for the unit direction u: what the block adds to it along itself.
        linearization: how the MLP was approximated.
    """

    layers: tuple[int, ...]
    eigenvalue: Complex128[Tensor, " layer"]
    angle: Float64[Tensor, " layer"]
    rayleigh: Float64[Tensor, " layer"]
    linearization: str

    def __str__(self) -> str:
        nearest = int(self.angle.argmin())
        return (
            f"DefectEigenvalues of {len(self.layers)} blocks ({self.linearization}): nearest eigenvector in block "
            f"{self.layers[nearest]}, {float(self.angle[nearest]):.1f} degrees, eigenvalue "
            f"{float(self.eigenvalue[nearest].real):+.3g}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block."""
        return pd.DataFrame(
            {
                "layer": self.layers,
                "eigenvalue": self.eigenvalue.real.numpy(),
                "imaginary": self.eigenvalue.imag.numpy(),
                "angle": self.angle.numpy(),
                "rayleigh": self.rayleigh.numpy(),
            }
        )


def defect_eigenvalues(
    model: Any,
    direction: Float[Tensor, " d_model"],
    layers: Iterable[int] | None = None,
    linearization: Linearization | MapsOfBlocks = "gaussian",
    *,
    part: Part = "plane",
    convention: Convention = "post-gain",
    centered: bool = True,
    n_samples: int = 100_000,
    tol: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> DefectEigenvalues:
    """The eigenvalue of every block's R = L - I whose eigenvector is nearest to a direction.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        direction: such as `found.direction`, or a singular direction; any length but 0.
        layers: 0-based blocks; all by default.
        linearization: as for `singular_defects`.
        part: `"plane"`: angles to the real plane of a complex pair; `"real"`: to the real part, as in the paper.
        convention: as for `singular_defects`.
        centered: as for `singular_defects`.
        n_samples: as for `singular_defects`.
        tol: relative residual of the eigenpairs, above width 1024.
        seed: of `"sampled"`.
        progress: show a progress bar.

    Raises:
        InputError: for blocks that do not exist, or a direction that cannot be used.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: for weights that are not finite, or an iteration that does not converge.

    Source: Wang et al. 2025, section 3 (decay).
    """
    blocks = wanted_views(model, layers, mixtures=isinstance(linearization, MapsOfBlocks))
    if part not in get_args(Part):
        raise InputError(f"unknown part {part!r}; expected one of {get_args(Part)}")
    pairs, quotients = [], []
    for block in tqdm(blocks, desc="defect eigenvalues", unit="block", disable=not progress, leave=False):
        A, F = block_parts(
            block, linearization, convention=convention, centered=centered, n_samples=n_samples, seed=seed
        )
        L = block_map(A, F, parallel=block.parallel)
        R = L + diagonal(-torch.ones(block.d_model, dtype=L.dtype, device=L.device))
        pairs.append(nearest_eigenpair(R, direction, part, tol=tol))
        quotients.append(rayleigh_quotient(R, direction))
    return DefectEigenvalues(
        layers=tuple(block.layer for block in blocks),
        eigenvalue=torch.tensor([pair.value for pair in pairs], dtype=torch.complex128),
        angle=torch.tensor([pair.angle for pair in pairs], dtype=torch.float64),
        rayleigh=torch.tensor(quotients, dtype=torch.float64),
        linearization=name_of(linearization),
    )
