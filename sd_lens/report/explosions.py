"""How each explosion comes about: paths of the vocabulary and the explosion subspace, in sentences and figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from sd_lens import figures
from sd_lens.explanations.contexts import ExplosionInContext
from sd_lens.explanations.explosion import ExplosionPath
from sd_lens.explanations.subspace import ExplosionSubspace
from sd_lens.figures.style import shown_number
from sd_lens.report.findings import quoted

_MOST_TOKENS = 5


@dataclass(frozen=True, eq=False)
class Explosion:
    """What a report has of one explosion block.

    Attributes:
        layer: the block, 0-based.
        subspace: of its MLP.
        path: of a sample of the vocabulary; None where no lone token explodes.
        context: the path's tokens in the texts; None without a path.
        missing: why there is no path; empty where there is one.
    """

    layer: int
    subspace: ExplosionSubspace
    path: ExplosionPath | None
    context: ExplosionInContext | None
    missing: str = ""


def explosion_sentences(explosions: Sequence[Explosion]) -> list[str]:
    """The findings on every explosion, HTML-escaped."""
    return [
        sentence
        for explosion in explosions
        for sentence in (_paths(explosion), _in_texts(explosion.context), _subspace(explosion.subspace))
        if sentence
    ]


def explosion_figures(explosions: Sequence[Explosion]) -> list[tuple[str, go.Figure]]:
    """Captions and figures of the largest explosion."""
    if not explosions:
        return []
    largest = max(explosions, key=lambda explosion: float(explosion.subspace.kept[-1]))
    shown: list[tuple[str, go.Figure]] = []
    if largest.path is not None and largest.context is not None:
        shown += [
            ("Tokens drawn from the vocabulary as one-token texts. Dashes: the threshold, a gap above the norms "
             "without attention.", figures.vocabulary_scatter(largest.path)),
            ("Those that explode without attention, put at later positions of the texts.",
             figures.context_norms(largest.context)),
        ]  # fmt: skip
    subspace = largest.subspace
    return [
        *shown,
        ("The right singular vectors of the MLP's linear map, as inputs of the MLP itself.",
         figures.subspace_curve(subspace)),
        ("The inputs of tokens in the initial position, cut down to the leading dimensions or freed of them.",
         figures.subspace_dimensions(subspace)),
        ("Initial tokens lie in the explosion subspace, others do not.", figures.coefficient_distributions(subspace)),
        ("An exact sum: the stream in front of the block behind the norm, attention's write, and what that does to the "
         "scale of the norm (medians).", figures.coefficient_sources(subspace)),
    ]  # fmt: skip


def _paths(explosion: Explosion) -> str:
    path = explosion.path
    if path is None:
        return html.escape(f"Lone tokens do not show the explosion of block {explosion.layer}: {explosion.missing}.")
    first = path.table[path.table.explodes].token.head(_MOST_TOKENS)
    which = f", first {', '.join(quoted(str(token)) for token in first)}" if len(first) else ""
    return (
        f"As the only token of a text, {_percent(path.initial_rate)} of {len(path.table):,} tokens of the vocabulary "
        f"have a norm above {shown_number(path.threshold)} after block {path.layer}, and {_percent(path.random_rate)} "
        f"of random embeddings; without attention {int(path.table.explodes.sum()):,} of the tokens{which}."
    )


def _in_texts(context: ExplosionInContext | None) -> str:
    if context is None:
        return ""
    return (
        f"Put at later positions of the texts, the {int(context.table.named.sum())} tokens with the largest norms "
        f"without attention explode in {_percent(context.named_rate)} of {context.n_contexts} contexts each, others in "
        f"{_percent(context.other_rate)}."
    )


def _subspace(subspace: ExplosionSubspace) -> str:
    coefficient = subspace.sources.coefficient
    return (
        f"The MLP of block {subspace.layer} writes {shown_number(float(subspace.outputs[0]))} for its leading right "
        f"singular vector and {shown_number(float(subspace.opposite[0]))} for the opposite; of the "
        f"{shown_number(float(subspace.kept[-1]))} that it writes for initial tokens, that vector alone gives "
        f"{shown_number(float(subspace.kept[0]))} and everything but it {shown_number(float(subspace.removed[0]))}. "
        f"The coefficient of its input on that vector is {coefficient['initial']:.3g} in the initial position and "
        f"{coefficient['second']:.3g} in the second (medians)."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
