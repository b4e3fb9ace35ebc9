"""The leading singular values of every block: whether its first direction stands alone (Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
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
from sd_lens.linear.spectra import leading_triples
from sd_lens.models.blocks import wanted_views


@dataclass(frozen=True, eq=False)
class SingularSpectra:
    """The `k` leading singular values of the blocks' maps L = (I + F)(I + A); blocks are 0-based.

    Attributes:
        layers: the blocks; row i of `values` belongs to block `layers[i]`.
        values: of L, largest first; `k` is 2 or more.
        model_name: as TransformerLens calls the model.
        linearization: how the MLP was approximated.
    """

    layers: tuple[int, ...]
    values: Float64[Tensor, "layer k"]
    model_name: str
    linearization: str

    @property
    def gap(self) -> Float64[Tensor, " layer"]:
        """`s1 / s2` of each block: 1 means that the leading direction is arbitrary, inf that L has rank one."""
        return self.values[:, 0] / self.values[:, 1]

    def __str__(self) -> str:
        widest = int(self.gap.nan_to_num(nan=1.0).argmax())
        return (
            f"SingularSpectra of {self.model_name}, {len(self.layers)} blocks ({self.linearization}), "
            f"{self.values.shape[1]} values each: widest gap {float(self.gap[widest]):.3g} in block "
            f"{self.layers[widest]}, s1 {float(self.values[widest, 0]):.5g}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block: layer, s1, s2, ..."""
        values = {f"s{i + 1}": self.values[:, i].numpy() for i in range(self.values.shape[1])}
        return pd.DataFrame({"layer": self.layers, **values})


def singular_spectra(
    model: Any,
    layers: Iterable[int] | None = None,
    linearization: Linearization | MapsOfBlocks = "gaussian",
    k: int = 8,
    *,
    convention: Convention = "post-gain",
    centered: bool = True,
    n_samples: int = 100_000,
    tol: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> SingularSpectra:
    """The `k` leading singular values of every block's L, from the weights alone.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        layers: 0-based blocks; all by default.
        linearization: as for `singular_defects`.
        k: how many values of each block, 2 or more.
        convention: as for `singular_defects`.
        centered: as for `singular_defects`.
        n_samples: as for `singular_defects`.
        tol: relative residual of the triples, see `leading_triples`; the values' own error is quadratic in it.
        seed: of the iteration's start, and of `"sampled"`.
        progress: show a progress bar.

    Raises:
        InputError: for blocks that do not exist, an unknown linearization or convention, or a `k` below 2 or above
            the model's width.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: for weights that are not finite, or an iteration that does not converge.

    Source: Wang et al. 2025, section 3 (the leading singular value against the others).
    """
    if k < 2:
        raise InputError(f"k={k}: expected 2 or more values, or there is no gap between them")
    blocks = wanted_views(model, layers, mixtures=isinstance(linearization, MapsOfBlocks))
    values = []
    for block in tqdm(blocks, desc="singular spectra", unit="block", disable=not progress, leave=False):
        A, F = block_parts(
            block, linearization, convention=convention, centered=centered, n_samples=n_samples, seed=seed
        )
        triples = leading_triples(block_map(A, F, parallel=block.parallel), k, tol=tol, seed=seed)
        values.append(triples.values)
    return SingularSpectra(
        layers=tuple(block.layer for block in blocks),
        values=torch.stack(values),
        model_name=str(getattr(model.cfg, "model_name", "model")),
        linearization=name_of(linearization),
    )
