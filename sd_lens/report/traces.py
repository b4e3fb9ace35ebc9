"""What else shows where norms are high: attention sinks, massive activations, super weights; sentences and figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from sd_lens import figures
from sd_lens.explanations.sinks import SinksWithout
from sd_lens.explanations.super_weights import SuperWeights
from sd_lens.figures.style import shown_number
from sd_lens.observations.massive import MassiveActivations
from sd_lens.report.findings import named_blocks


@dataclass(frozen=True, eq=False)
class Traces:
    """What a report has beside norms.

    Attributes:
        sinks: with, and without, what the explosion blocks' MLPs write along the observed direction.
        explosion_layers: these blocks, 0-based.
        massive: massive activations in the first texts.
        super_weights: of each explosion block, in order.
    """

    sinks: SinksWithout
    explosion_layers: tuple[int, ...]
    massive: MassiveActivations
    super_weights: Sequence[SuperWeights]


def trace_sentences(traces: Traces) -> list[str]:
    """The findings, HTML-escaped."""
    sentences = [_sinks(traces), _massive(traces.massive), *map(_super_weight, traces.super_weights)]
    return [html.escape(sentence, quote=False) for sentence in sentences]


def trace_figures(traces: Traces) -> list[tuple[str, go.Figure]]:
    """Captions and figures; the neurons are those of the explosion that writes most."""
    shown = [
        ("Dots: heads that pay the first token more than 0.3 of their attention, on average.",
         figures.sink_map(traces.sinks.before)),
        ("The same heads with the explosions' writes along the direction taken away.",
         figures.sinks_before_and_after(traces.sinks)),
        ("Keys and values of initial tokens beside those of all others.",
         figures.key_value_norms(traces.sinks.before)),
    ]  # fmt: skip
    if len(traces.massive.table):
        shown.append(("The coordinates that carry the norms.", figures.massive_channels(traces.massive)))
    if traces.super_weights:
        largest = max(traces.super_weights, key=lambda found: abs(found.written))
        shown.append(("How few neurons write the explosion.", figures.write_sparsity(largest)))
    return shown


def _sinks(traces: Traces) -> str:
    before, after = traces.sinks.before, traces.sinks.after
    return (
        f"{100 * before.sink_rate:.1f} % of the heads have an attention sink at the first token (more than 0.3 on "
        f"average, texts cut to 64 tokens); without what the MLPs of {named_blocks(traces.explosion_layers)} write "
        f"along the direction {100 * after.sink_rate:.1f} %."
    )


def _massive(massive: MassiveActivations) -> str:
    if massive.table.empty:
        return "No single coordinate of the residual stream stands out (massive activations)."
    channels = massive.channels().groupby("channel")["count"].sum().nlargest(2).index.tolist()
    peak = int(massive.largest.argmax())
    return (
        f"The norms are carried by few coordinates, most often channel {' and '.join(map(str, channels))}: after "
        f"block {peak} the largest is {shown_number(float(massive.largest[peak]))}, "
        f"{shown_number(float(massive.largest[peak] / massive.median[peak]))} times the median, and "
        f"{float(massive.watched_channels[peak]):.3g} channels hold 99 % of an initial token's squared norm."
    )


def _super_weight(found: SuperWeights) -> str:
    entry = found.entries.iloc[0]
    norm_before, norm_after = shown_number(found.before["norm"]), shown_number(float(entry.norm))
    return (
        f"The fewest neurons that write 99 % of what the MLP of block {found.layer} writes along the direction of "
        f"exploding tokens (mean of {found.n_tokens:,}): {found.n_neurons:,} of {len(found.cumulative):,}. Zeroing the "
        f"single weight {entry.component} takes their norm from {norm_before} to {norm_after} and the loss from "
        f"{found.before['loss']:.3g} to {float(entry.loss):.3g} nats per token."
    )
