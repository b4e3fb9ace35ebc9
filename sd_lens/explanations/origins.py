"""Where norms come from and go, block by block: the main writer, its neurons, and what zeroing the first does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.explanations.ablation import Ablation, ablate
from sd_lens.explanations.attribution import Attribution, attribute
from sd_lens.explanations.corpus import CorpusAttribution, attribute_corpus
from sd_lens.explanations.drilling import attribute_neurons
from sd_lens.observations.high_norm import HighNormTokens, TokenGroup

N_TOKENS = 8
"""Neurons and ablations at every position are looked at for so many tokens and texts."""

# Verifying runs the text up to the token once per component: next to nothing for initial tokens.
_TO_VERIFY = {"initial": 4, "non-initial": 1}


@dataclass(frozen=True, eq=False)
class NormOrigin:
    """Who makes the norm of a group of tokens explode, or decay, in one block.

    Attributes:
        kind: `"initial"` or `"non-initial"` tokens.
        event: what happens in the block.
        layer: the block, 0-based.
        attribution: of the streams after it: along each token's own direction for an explosion, along the common
            direction in front of the block for a decay.
        component: what in this block contributes most to the event (for a decay: against the direction).
        share: its mean contribution relative to the mean attributed length; for a decay, to that in front of the block.
        neurons: if that is an MLP: neuron and share (in the same sense, over the first tokens), the largest for the
            event first.
        ablation: of an explosion's first neuron, on the first texts; None for a decay or without neurons.
    """

    kind: Literal["initial", "non-initial"]
    event: Literal["explosion", "decay"]
    layer: int
    attribution: CorpusAttribution
    component: str
    share: float
    neurons: pd.DataFrame = field(repr=False)
    ablation: Ablation | None


def norm_origins(
    model: Any, found: HighNormTokens, rows: Sequence[Int[Tensor, " pos"]], *, progress: bool = True
) -> list[NormOrigin]:
    """The origin of every explosion and decay in `found`.

    Args:
        model: the model that `found` is of.
        found: of `find_high_norm_tokens`.
        rows: the token ids of its first texts; tokens of others are left out.
        progress: show a progress bar.

    Raises:
        NotSupportedError: if what heads and MLPs write does not sum to the residual stream.
    """
    origins = []
    groups: list[tuple[Literal["initial", "non-initial"], TokenGroup]] = [
        ("initial", found.initial), ("non-initial", found.non_initial),
    ]  # fmt: skip
    events = [
        (kind, layer, layer in group.explosion_layers)
        for kind, group in groups
        for layer in sorted({*group.explosion_layers, *group.decay_layers})
    ]
    for kind, layer, explodes in tqdm(events, desc="origins", unit="block", disable=not progress, leave=False):
        tokens = _tokens(found, kind, layer if explodes else layer - 1, len(rows))
        if len(tokens):
            event: Literal["explosion", "decay"] = "explosion" if explodes else "decay"
            origins.append(_origin(model, found, rows, kind, event, layer, tokens))
    return origins


def _tokens(found: HighNormTokens, kind: str, layer: int, n_texts: int) -> pd.DataFrame:
    """The group's tokens in the first texts whose norm is high after a block."""
    table = found.table[(found.table.layer == layer) & (found.table.text < n_texts)]
    return table[(table.position == 0) == (kind == "initial")]


def _origin(
    model: Any,
    found: HighNormTokens,
    rows: Sequence[Tensor],
    kind: Literal["initial", "non-initial"],
    event: Literal["explosion", "decay"],
    layer: int,
    tokens: pd.DataFrame,
) -> NormOrigin:
    explodes = event == "explosion"
    direction = None if explodes else found.layer_directions[layer - 1]
    attribution = attribute_corpus(
        model, list(rows), layer, tokens, direction, verify_tokens=_TO_VERIFY[kind], progress=False
    )
    here = attribution.table[(attribution.table.layer == layer) & attribution.table.kind.isin(["head", "mlp"])]
    best = here.iloc[int((here.contribution if explodes else -here.contribution).argmax())]
    share = float(best.contribution) / _reference_length(attribution, layer, explodes)
    neurons = pd.DataFrame({"neuron": [], "share": []})
    ablation = None
    if best.kind == "mlp":
        neurons = _neurons(model, rows, tokens.head(N_TOKENS), layer, direction)
        neurons = neurons.sort_values("share", ascending=not explodes, ignore_index=True)
        first = tokens[tokens.text < N_TOKENS]
        if explodes and len(first):
            ablation = ablate(
                model, list(rows[:N_TOKENS]), f"L{layer}N{neurons.neuron[0]}", watch=first, progress=False
            )
    return NormOrigin(kind, event, layer, attribution, str(best.component), share, neurons, ablation)


def _neurons(
    model: Any, rows: Sequence[Tensor], tokens: pd.DataFrame, layer: int, direction: Tensor | None
) -> pd.DataFrame:
    """The share of each neuron of a block's MLP, over some tokens."""
    lengths, contributions = [], []
    for text, position in zip(tokens.text.tolist(), tokens.position.tolist(), strict=True):
        single = attribute(model, rows[text][: position + 1], position, layer, direction)
        lengths.append(_reference_length(single, layer, direction is None))
        contributions.append(torch.tensor(attribute_neurons(model, single, layer).table.contribution.to_numpy()))
    share = torch.stack(contributions).sum(dim=0) / sum(lengths)
    return pd.DataFrame({"neuron": range(len(share)), "share": share.numpy()})


def _reference_length(attribution: Attribution | CorpusAttribution, layer: int, explodes: bool) -> float:
    """The attributed length: behind the block for an explosion, in front of it for a decay."""
    if explodes:
        return attribution.total
    table = attribution.table
    return attribution.total - float(table.contribution[(table.layer == layer).fillna(False)].sum())
