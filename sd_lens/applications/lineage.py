"""Which models share a base: signatures compared in pairs, and what chance would make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from sd_lens.applications.clustering import Merge, single_linkage
from sd_lens.applications.signatures import Signature
from sd_lens.errors import InputError
from sd_lens.linear.angles import acute_angles
from sd_lens.linear.largest_channels import channels_beyond_chance, log10_chance_of_sharing, shared_channels
from sd_lens.linear.random_angles import chance_angle

RELATED, EQUAL_SPECTRA, UNDECIDED, UNRELATED, NOT_COMPARABLE = (
    "related", "equal spectra", "undecided", "unrelated", "not comparable",
)  # fmt: skip
"""The verdicts of `Lineage.table`."""

EQUAL_WITHIN = 3e-3
"""Spectra are nearer than this if the channels of a model were permuted or rotated, even if its weights were then
rounded to 8 bits (docs/signatures.md)."""


@dataclass(frozen=True, eq=False)
class Lineage:
    """Signatures in pairs, with a decision for each.

    Attributes:
        names: of the models.
        angles: degrees, acute, between the directions; NaN where there is nothing to compare.
        table: a row for each pair: first, second, angle; threshold, the angle that uniform random directions undercut
            at the false-positive rate; shared, how many of their largest channels the directions share with one
            relative sign; required, how many chance does not reach at that rate; log10_p, the logarithm (base 10) of
            the probability that unrelated models share so many, for this pair alone; spectral_distance, the
            largest |log(s / s')| of all singular values, NaN for other numbers of blocks; verdict.
        false_positive_rate: the probability that any unrelated pair is called related is at most this.
        n_comparisons: the pairs that could be compared, among which that probability is shared out (Bonferroni).
        groups: the models that related pairs connect, and single ones.
        merges: single linkage by angle, for a dendrogram; models that cannot be compared are never merged.
        order: the models in the order in which a dendrogram draws them.
    """

    names: tuple[str, ...]
    angles: Float64[Tensor, "model model"] = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    false_positive_rate: float
    n_comparisons: int
    groups: tuple[tuple[str, ...], ...]
    merges: tuple[Merge, ...] = field(repr=False)
    order: tuple[int, ...] = field(repr=False)

    def __str__(self) -> str:
        n_related = int((self.table.verdict == RELATED).sum())
        return (
            f"Lineage of {len(self.names)} models: {n_related} of {len(self.table)} pairs related, "
            f"{int((self.table.verdict == NOT_COMPARABLE).sum())} not comparable; groups "
            + "; ".join(", ".join(group) for group in self.groups)
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """The table of pairs."""
        return self.table.copy()


def lineage(signatures: Mapping[str, Signature] | Iterable[Signature], *, false_positive_rate: float = 1e-3) -> Lineage:
    """Compare signatures in pairs and decide which models share a base.

    Two models are related if their directions share more of their largest channels than chance does: independently
    trained models have no common order or sign of channels. The rate is shared out among all comparisons. The angle
    alone does not decide, since the directions of language models may lie almost along one channel, and two of
    those come close by chance once in `d_model` times; where only the angle is smaller than that of uniform
    directions, the pair is undecided. Equal spectra under unlike directions are what a permutation or rotation of the
    channels leaves behind; that has no error rate, and does not join models in a group. "Unrelated" means that nothing
    speaks against chance. Models of different width, or without a direction, cannot be compared.

    Args:
        signatures: two or more, by name; or without names, then by that of their model.
        false_positive_rate: for all comparisons together.

    Raises:
        InputError: for fewer than two signatures, or a rate that is not between 0 and 1.

    Source: Wang et al. 2025 (angles between directions tell lineages apart); docs/signatures.md for the statistics.
    """
    if not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate={false_positive_rate}: expected a number between 0 and 1")
    named = dict(signatures) if isinstance(signatures, Mapping) else _by_model(signatures)
    if len(named) < 2:
        raise InputError(f"a lineage needs two signatures or more, not {len(named)}")
    names, every = tuple(named), list(named.values())
    pairs = list(combinations(range(len(every)), 2))
    comparable = [pair for pair in pairs if _comparable(*(every[i] for i in pair))]
    log10_rate = math.log10(false_positive_rate / max(len(comparable), 1))
    limits = {
        width: _Limits(chance_angle(log10_rate, width), channels_beyond_chance(log10_rate, width))
        for width in {every[i].d_model for pair in comparable for i in pair}
    }
    rows = {(i, j): _compared(every[i], every[j], limits[every[i].d_model]) for i, j in comparable}
    table = pd.DataFrame(
        [{"first": names[i], "second": names[j], **rows.get((i, j), _NOT_COMPARED)} for i, j in pairs]
    ).astype({"shared": "Int64", "required": "Int64"})
    angles = torch.full((len(every), len(every)), math.nan, dtype=torch.float64)
    for i, signature in enumerate(every):
        angles[i, i] = math.nan if signature.direction is None else 0.0
    for (i, j), row in rows.items():
        angles[i, j] = angles[j, i] = row["angle"]
    merges, trees = single_linkage(len(every), [(row["angle"], *pair) for pair, row in rows.items()])
    kin = [(row["angle"], *pair) for pair, row in rows.items() if row["verdict"] == RELATED]
    _, groups = single_linkage(len(every), kin)
    return Lineage(
        names=names,
        angles=angles,
        table=table,
        false_positive_rate=false_positive_rate,
        n_comparisons=len(comparable),
        groups=tuple(tuple(names[i] for i in sorted(group)) for group in groups),
        merges=merges,
        order=tuple(i for tree in trees for i in tree),
    )


@dataclass(frozen=True)
class _Limits:
    """What chance does at the false-positive rate of one comparison."""

    angle: float
    shared: int | None


_NOT_COMPARED = {
    "angle": math.nan, "threshold": math.nan, "shared": None, "required": None, "log10_p": math.nan,
    "spectral_distance": math.nan, "verdict": NOT_COMPARABLE,
}  # fmt: skip


def _by_model(signatures: Iterable[Signature]) -> dict[str, Signature]:
    """By the model's name, numbered where it is not the first of that name."""
    named: dict[str, Signature] = {}
    for signature in signatures:
        name, number = signature.model_name, 2
        while name in named:
            name, number = f"{signature.model_name} ({number})", number + 1
        named[name] = signature
    return named


def _comparable(one: Signature, other: Signature) -> bool:
    return one.d_model == other.d_model and one.direction is not None and other.direction is not None


def _compared(one: Signature, other: Signature, limits: _Limits) -> dict[str, Any]:
    assert one.direction is not None  # or they would not be comparable
    assert other.direction is not None
    angle = float(acute_angles(one.direction[None], other.direction))
    shared, distance = shared_channels(one.direction, other.direction), _spectral_distance(one, other)
    if limits.shared is not None and shared >= limits.shared:
        verdict = RELATED
    elif angle <= limits.angle:
        verdict = UNDECIDED
    else:
        verdict = EQUAL_SPECTRA if distance < EQUAL_WITHIN else UNRELATED
    return {
        "angle": angle,
        "threshold": limits.angle,
        "shared": shared,
        "required": limits.shared,
        "log10_p": log10_chance_of_sharing(shared, one.d_model),
        "spectral_distance": distance,
        "verdict": verdict,
    }


def _spectral_distance(one: Signature, other: Signature) -> float:
    """The largest |log(s / s')|; NaN for models with different numbers of blocks."""
    if one.spectrum.shape != other.spectrum.shape:
        return math.nan
    return float((one.spectrum.double() / other.spectrum.double()).log().abs().max())
