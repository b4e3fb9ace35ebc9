"""Layer-wise singular defects: directions that a model's weights alone predict for exploding tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, SmallGapWarning
from sd_lens.linear.angles import acute_angles
from sd_lens.linear.approximations import (
    Convention,
    Linearization,
    MapsOfBlocks,
    block_map,
    block_parts,
    name_of,
)
from sd_lens.linear.spectra import LeadingTriples, leading_triples
from sd_lens.models.blocks import wanted_layers, wanted_views
from sd_lens.models.checkpoints import open_checkpoint
from sd_lens.models.views import Block
from sd_lens.storage import load_result, save_result

MEANINGFUL_GAP = 1.05
"""Below this s1/s2 a change of the map by 5 % can turn its leading direction into the second."""


@dataclass(frozen=True, eq=False)
class SingularTriples:
    """Leading singular triples of one map per layer; `M v = s u`.

    Attributes:
        left: `u`, unit; its entry of largest magnitude is positive.
        values: `s`.
        right: `v`, unit.
        gap: `s1 / s2`: 1 means that the direction is arbitrary, inf that the map has rank one.
    """

    left: Float[Tensor, "layer d_model"]
    values: Float64[Tensor, " layer"]
    right: Float[Tensor, "layer d_model"]
    gap: Float64[Tensor, " layer"]


@dataclass(frozen=True, eq=False)
class SingularDefects:
    """Leading singular triples of the blocks of a model (0-based), and of their parts.

    Attributes:
        layers: the blocks; row i of every tensor belongs to block `layers[i]`.
        block: of L = (I + F)(I + A), or I + A + F where attention and MLP are in parallel; its left direction
            is the layer-wise singular direction.
        attention: of A.
        ffn: of F; its right direction spans the explosion subspace.
        model_name: as TransformerLens calls the model.
        linearization: how F was approximated.
        convention: where its Gaussian input was drawn; `"pre-gain"` for folded models.
    """

    layers: tuple[int, ...]
    block: SingularTriples
    attention: SingularTriples
    ffn: SingularTriples
    model_name: str
    linearization: str
    convention: str

    def angles_to(self, direction: Float[Tensor, " d_model"]) -> Float64[Tensor, " layer"]:
        """Acute angle between each block's left singular direction and `direction`, in degrees.

        Raises:
            InputError: if `direction` has another width, is zero or not finite.
        """
        return acute_angles(self.block.left, direction)

    def __str__(self) -> str:
        strongest = int(self.block.values.argmax())
        return (
            f"SingularDefects of {self.model_name}, {len(self.layers)} blocks ({self.linearization}, "
            f"{self.convention}): largest singular value {self.block.values[strongest]:.5g} in block "
            f"{self.layers[strongest]}, gap {self.block.gap[strongest]:.3g}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block: singular value and gap of block, attention and ffn."""
        columns: dict[str, Any] = {"layer": self.layers}
        for part in _PARTS:
            triples: SingularTriples = getattr(self, part)
            columns |= {f"{part}_value": triples.values.numpy(), f"{part}_gap": triples.gap.numpy()}
        return pd.DataFrame(columns)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with JSON metadata.

        Raises:
            InputError: if `path` cannot be written.
        """
        tensors = {
            f"{part}.{field.name}": getattr(getattr(self, part), field.name)
            for part in _PARTS
            for field in fields(SingularTriples)
        }
        save_result(
            path,
            tensors,
            {
                "kind": "SingularDefects",
                "layers": self.layers,
                "model_name": self.model_name,
                "linearization": self.linearization,
                "convention": self.convention,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> SingularDefects:
        """Read what `save` wrote.

        Raises:
            InputError: if the file is missing, damaged, or holds something else.
        """
        tensors, metadata = load_result(path, "SingularDefects")
        try:
            block, attention, ffn = (
                SingularTriples(**{f.name: tensors[f"{part}.{f.name}"] for f in fields(SingularTriples)})
                for part in _PARTS
            )
            return cls(
                layers=tuple(metadata["layers"]),
                block=block,
                attention=attention,
                ffn=ffn,
                model_name=metadata["model_name"],
                linearization=metadata["linearization"],
                convention=metadata["convention"],
            )
        except KeyError as error:
            raise InputError(f"{path} holds SingularDefects without {error}: it is damaged") from error


_PARTS = ("block", "attention", "ffn")


def singular_defects(
    model: Any,
    layers: Iterable[int] | None = None,
    linearization: Linearization | MapsOfBlocks = "gaussian",
    *,
    convention: Convention = "post-gain",
    centered: bool = True,
    n_samples: int = 100_000,
    tol: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> SingularDefects:
    """Leading singular triples of L, A and F of every block, from the weights alone.

    No text is run, and no `d_model x d_model` matrix is built (but by `"sampled"`). Computed on the
    model's device, in float32 (float64 for float64 weights). Of a folder, no model is made: its blocks are read one
    after the other in their stored dtype, so that no more than one of them is in memory; the CPU computes.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not; or a folder in Hugging Face's layout with
            safetensors.
        layers: 0-based blocks; all by default.
        linearization: of the MLP: `"gaussian"`, the closed form, or `"sampled"`, the paper's estimator; or a
            `Jacobian` or `Captured`, which replaces A too; or a `RouterWeighted`, for mixtures of experts.
            docs/linearizations.md says which is for what.
        convention: where the MLP's Gaussian input is drawn, `"post-gain"` (the paper's) or `"pre-gain"`; on
            a model with folded norms both are the latter.
        centered: False drops LayerNorm's centring, as the paper does.
        n_samples: of `"sampled"`.
        tol: relative residual of the triples, see `leading_triples`.
        seed: of the iteration's start, and of `"sampled"`.
        progress: show a progress bar.

    Raises:
        InputError: for blocks that do not exist, or an unknown linearization or convention.
        ModelLoadError: for a folder that is missing, or lacks its configuration, a file of weights or a tensor.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: for weights that are not finite, or an iteration that does not converge.

    Warns:
        SmallGapWarning: naming the blocks whose direction is not determined (gap below 1.05).

    Source: Wang et al. 2025, section 3; the closed form is derived in docs/closed_form.md.
    """

    def analysed(block: Block) -> _Analysis:
        A, F = block_parts(
            block, linearization, convention=convention, centered=centered, n_samples=n_samples, seed=seed
        )
        L = block_map(A, F, parallel=block.parallel)
        block_triples, attention, ffn = (leading_triples(M, tol=tol, seed=seed) for M in (L, A, F))
        return _Analysis(block_triples, attention, ffn, has_gain=has_gain(block))

    name, wanted, blocks = _source(model, layers, mixtures=isinstance(linearization, MapsOfBlocks))
    # Mapped, because a loop would hold each block until it has the next.
    bar = tqdm(map(analysed, blocks), "singular defects", len(wanted), unit="block", disable=not progress, leave=False)
    found = list(bar)
    result = SingularDefects(
        layers=wanted,
        block=stacked([analysis.block for analysis in found]),
        attention=stacked([analysis.attention for analysis in found]),
        ffn=stacked([analysis.ffn for analysis in found]),
        model_name=name,
        linearization=name_of(linearization),
        convention=convention if any(analysis.has_gain for analysis in found) else "pre-gain",
    )
    _warn_of_small_gaps(result)
    return result


@dataclass(frozen=True, eq=False)
class _Analysis:
    """The triples of one block's maps, and whether its norm before the MLP does more than normalize."""

    block: LeadingTriples
    attention: LeadingTriples
    ffn: LeadingTriples
    has_gain: bool


def _source(
    model: Any, layers: Iterable[int] | None, *, mixtures: bool
) -> tuple[str, tuple[int, ...], Iterable[Block]]:
    """The name of a model in memory or on disk, which of its blocks are wanted, and these."""
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(model)
        wanted = wanted_layers(checkpoint.n_layers, layers)
        return checkpoint.name, wanted, checkpoint.blocks(wanted)
    blocks = wanted_views(model, layers, mixtures=mixtures)
    return str(getattr(model.cfg, "model_name", "model")), tuple(block.layer for block in blocks), blocks


def stacked(triples: list[LeadingTriples]) -> SingularTriples:
    """The first triples of some maps, one a row."""
    return SingularTriples(
        left=torch.stack([t.left[:, 0] for t in triples]).cpu(),
        values=torch.cat([t.values for t in triples]),
        right=torch.stack([t.right[:, 0] for t in triples]).cpu(),
        gap=torch.tensor([t.gap for t in triples], dtype=torch.float64),
    )


def has_gain(block: Block) -> bool:
    """Whether the norm before the MLP does more than normalize."""
    gain, bias = block.mlp_norm.gain, block.mlp_norm.bias
    is_trivial = gain is None or not bool((gain != 1).any())
    return not is_trivial or (bias is not None and bool((bias != 0).any()))


def _warn_of_small_gaps(defects: SingularDefects) -> None:
    vague = [
        f"{layer} ({gap:.3f})"
        for layer, gap in zip(defects.layers, defects.block.gap.tolist(), strict=True)
        if gap < MEANINGFUL_GAP and math.isfinite(gap)
    ]
    if vague:
        warnings.warn(
            f"singular value gap s1/s2 below {MEANINGFUL_GAP} in block {', '.join(vague)}: "
            "the leading direction there is not determined",
            SmallGapWarning,
            stacklevel=3,
        )
