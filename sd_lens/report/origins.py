"""Who makes the norms and who takes them away: sentences and figures of the report."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from sd_lens import figures
from sd_lens.explanations.origins import NormOrigin
from sd_lens.figures.style import shown_number

_ENOUGH = 0.9
"""So large a part of an MLP's share is told by naming neurons, three at most."""


def origin_sentences(origins: Sequence[NormOrigin]) -> list[str]:
    """The findings on every explosion and decay, HTML-escaped."""
    return [
        html.escape(sentence, quote=False)
        for origin in origins
        for sentence in (_written(origin), _zeroed(origin), _faithful(origin))
        if sentence
    ]


def origin_figures(origins: Sequence[NormOrigin]) -> list[tuple[str, go.Figure]]:
    """Captions and figures of the largest explosion."""
    explosions = [origin for origin in origins if origin.event == "explosion"]
    if not explosions:
        return []
    largest = max(explosions, key=lambda origin: origin.attribution.total)
    what = f"the {largest.kind} high-norm tokens after block {largest.layer}"
    shown = [
        (f"Who wrote the norm of {what}: means over {largest.attribution.n_tokens:,} tokens.",
         figures.contribution_waterfall(largest.attribution)),
        ("The same for every head and MLP.", figures.contribution_heatmap(largest.attribution)),
    ]  # fmt: skip
    if largest.attribution.faithfulness is not None:
        shown.append(
            ("What each component writes itself, against what is lost when it is ablated and all later ones respond.",
             figures.faithfulness_scatter(largest.attribution.faithfulness)),
        )  # fmt: skip
    return shown


def _written(origin: NormOrigin) -> str:
    n = origin.attribution.n_tokens
    if origin.event == "explosion":
        what = (
            f"The norm of the {origin.kind} high-norm tokens after block {origin.layer} "
            f"({shown_number(origin.attribution.total)}, mean of {n:,}) is written by {origin.component} "
            f"({100 * origin.share:.1f} %)"
        )
    else:
        what = (
            f"The decay of the {origin.kind} high-norm tokens in block {origin.layer} (mean of {n:,}) is the work of "
            f"{origin.component}, which takes away {-100 * origin.share:.1f} % of their length in front of the block"
        )
    return f"{what}{_neurons(origin)}."


def _neurons(origin: NormOrigin) -> str:
    """The fewest neurons, three at most, that make most of the MLP's share."""
    named: list[str] = []
    so_far = 0.0
    for neuron, share in zip(origin.neurons.neuron.head(3), origin.neurons.share.head(3), strict=True):
        named.append(f"{int(neuron)} ({100 * abs(share):.1f} %)")
        so_far += abs(share)
        if so_far >= _ENOUGH * abs(origin.share):
            break
    if not named:
        return ""
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f", in it by neuron{'s' if len(named) > 1 else ''} {listed}"


def _zeroed(origin: NormOrigin) -> str:
    if origin.ablation is None:
        return ""
    before, after = origin.ablation.before, origin.ablation.after
    return (
        f"Zeroing that block's neuron {int(origin.neurons.neuron[0])} alone changes their norm after block "
        f"{origin.layer} from {shown_number(float(before.watched_norm[origin.layer]))} to "
        f"{shown_number(float(after.watched_norm[origin.layer]))}, the mean attention on the first token from "
        f"{float(before.sinks.mean()):.2f} to {float(after.sinks.mean()):.2f}, and the perplexity from "
        f"{shown_number(before.perplexity)} to {shown_number(after.perplexity)} ({before.n_tokens:,} tokens)."
    )


def _faithful(origin: NormOrigin) -> str:
    """Whether the component is the cause, and for an explosion whether the others are what they seem."""
    faithfulness = origin.attribution.faithfulness
    if faithfulness is None:
        return ""
    row = faithfulness.table.set_index("component").loc[origin.component]
    ratio = 100 * row.effect / row.contribution
    disagreement = faithfulness.disagreement if origin.event == "explosion" else ""
    return (
        f"Ablating {origin.component} at these tokens ({faithfulness.mode}) has {ratio:.0f} % of the effect that its "
        "contribution says; over all heads and MLPs contribution and effect have a rank correlation of "
        f"{faithfulness.rank_correlation:.2f}" + (f"; {disagreement}." if disagreement else ".")
    )
