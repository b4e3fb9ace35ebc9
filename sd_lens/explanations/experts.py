"""Singular defects of experts: what each would do as the only MLP of its block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.explanations.defects import SingularTriples, has_gain, stacked
from sd_lens.linear.angles import acute_angles
from sd_lens.linear.approximations import Convention, attention_map, block_map, ffn_map
from sd_lens.linear.spectra import leading_triples
from sd_lens.models.blocks import wanted_mixtures


@dataclass(frozen=True, eq=False)
class ExpertDefects:
    """Leading singular triples of every expert of a model's mixtures; one row per block and expert, 0-based.

    Attributes:
        layers: the block of each row.
        experts: the expert of each row; one that all tokens share is the last of its block.
        block: of L = (I + F)(I + A), as if the expert were the block's MLP, with weight 1.
        ffn: of the expert's F; its right direction spans the explosion subspace.
        model_name: as TransformerLens calls the model.
        convention: where the Gaussian input was drawn; `"pre-gain"` for folded models.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    block: SingularTriples = field(repr=False)
    ffn: SingularTriples = field(repr=False)
    model_name: str
    convention: str

    def angles_to(self, direction: Float[Tensor, " d_model"]) -> Float64[Tensor, " row"]:
        """Acute angle between each row's left singular direction of `block` and `direction`, in degrees.

        Raises:
            InputError: if `direction` has another width, is zero or not finite.
        """
        return acute_angles(self.block.left, direction)

    def __str__(self) -> str:
        strongest = int(self.block.values.argmax())
        return (
            f"ExpertDefects of {self.model_name}, {len(self.layers)} experts in {len(set(self.layers))} blocks "
            f"({self.convention}): largest singular value {self.block.values[strongest]:.5g} of expert "
            f"{self.experts[strongest]} in block {self.layers[strongest]}, gap {self.block.gap[strongest]:.3g}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block and expert: singular value and gap of block and ffn."""
        return pd.DataFrame(
            {
                "layer": self.layers,
                "expert": self.experts,
                "block_value": self.block.values.numpy(),
                "block_gap": self.block.gap.numpy(),
                "ffn_value": self.ffn.values.numpy(),
                "ffn_gap": self.ffn.gap.numpy(),
            }
        )


def expert_defects(
    model: Any,
    layers: Iterable[int] | None = None,
    *,
    convention: Convention = "post-gain",
    tol: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> ExpertDefects:
    """Leading singular triples of L and F for every expert of a model's mixtures, from the weights alone.

    F is the Gaussian closed form, as in `singular_defects`, which takes a `RouterWeighted` for the mixture as a whole.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        layers: 0-based blocks that are mixtures of experts; all of them by default.
        convention: as for `singular_defects`.
        tol: relative residual of the triples, see `leading_triples`.
        seed: of the iteration's start.
        progress: show a progress bar.

    Raises:
        InputError: for blocks that do not exist or have a single MLP, or an unknown convention.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: for weights that are not finite, or an iteration that does not converge.

    Source: Wang et al. 2025, section 3, for each expert; docs/singular_defects.md.
    """
    mixtures = wanted_mixtures(model, layers)
    rows = [(i, expert) for block in mixtures for i, expert in enumerate(block.experts)]
    blocks, ffns = [], []
    for _, expert in tqdm(rows, desc="expert defects", unit="expert", disable=not progress, leave=False):
        F = ffn_map(expert, convention=convention)
        L = block_map(attention_map(expert), F, parallel=expert.parallel)
        blocks.append(leading_triples(L, tol=tol, seed=seed))
        ffns.append(leading_triples(F, tol=tol, seed=seed))
    return ExpertDefects(
        layers=tuple(expert.layer for _, expert in rows),
        experts=tuple(i for i, _ in rows),
        block=stacked(blocks),
        ffn=stacked(ffns),
        model_name=str(getattr(model.cfg, "model_name", "model")),
        convention=convention if any(has_gain(block) for block in mixtures) else "pre-gain",
    )
