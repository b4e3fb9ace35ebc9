"""Attention sinks: which heads have one, how long the keys and values there are, and what is left of it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from sd_lens.errors import InputError
from sd_lens.explanations.sinks import SinksWithout
from sd_lens.figures.style import BLUE, SEQUENTIAL, VERMILION, base_figure
from sd_lens.observations.attention import SINK_THRESHOLD
from sd_lens.observations.sinks import AttentionSinks

_LAYER_AXIS = "block (0-based)"
_NORM_TICKS = [step * 10.0**power for power in range(-4, 6) for step in (1, 3)]


def sink_map(sinks: AttentionSinks, measure: Literal["first", "watched"] = "first") -> go.Figure:
    """What the first key (or a watched token) receives from later queries, blocks x heads; dots are sinks.

    Raises:
        InputError: for another measure.
    """
    if measure not in ("first", "watched"):
        raise InputError(f"unknown measure {measure!r}; expected 'first' or 'watched'")
    of_first = measure == "first"
    received, rate = (
        (sinks.on_first, sinks.sink_rate) if of_first else (sinks.watched_received, sinks.watched_sink_rate)
    )
    what = "the first key" if of_first else "a watched token"
    n_layers, n_heads = received.shape
    figure = base_figure(
        f"Mean attention on {what}: a sink in {100 * rate:.1f} % of heads", height=max(360, 170 + 16 * n_layers)
    )
    figure.add_heatmap(
        z=received.numpy(), zmin=0, zmax=1, colorscale=SEQUENTIAL, xgap=1, ygap=1,
        hovertemplate=f"L%{{y}}H%{{x}}<br>attention on {what} %{{z:.3f}}<extra></extra>",
        colorbar={
            "title": {"text": "mean<br>attention", "side": "top"}, "tickvals": [0, SINK_THRESHOLD, 0.5, 0.75, 1],
            "thickness": 16,
        },
    )  # fmt: skip
    layers, heads = (received > SINK_THRESHOLD).numpy().nonzero()
    figure.add_scatter(
        x=heads.tolist(), y=layers.tolist(), mode="markers", hoverinfo="skip", showlegend=False,
        marker={"size": 5, "color": "white", "line": {"color": "black", "width": 1}},
    )  # fmt: skip
    figure.update_xaxes(
        title_text="head (0-based)", showgrid=False, range=[-0.5, n_heads - 0.5], tick0=0, dtick=math.ceil(n_heads / 32)
    )
    figure.update_yaxes(
        title_text=_LAYER_AXIS, showgrid=False, range=[-0.5, n_layers - 0.5], tick0=0, dtick=math.ceil(n_layers / 32)
    )
    return figure


def key_value_norms(sinks: AttentionSinks) -> go.Figure:
    """Norms of the keys and values of watched tokens against those of all others, means over heads (logarithmic)."""
    figure = base_figure("Keys and values of the watched tokens against others'", height=480)
    table = sinks.by_layer()
    for part, colour in (("key", VERMILION), ("value", BLUE)):
        for group, name, dash in (("watched", "watched tokens", "solid"), ("other", "other tokens", "dash")):
            figure.add_scatter(
                x=table.layer.tolist(), y=table[f"{group}_{part}_norm"].tolist(), name=f"{part}s of {name}",
                mode="lines+markers", line={"color": colour, "dash": dash}, marker={"size": 5},
                hovertemplate=f"block %{{x}}<br>{part}s of {name}: %{{y:.3g}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title_text=_LAYER_AXIS)
    figure.update_yaxes(title_text="mean norm", type="log", tickvals=_NORM_TICKS)
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    return figure


def sinks_before_and_after(change: SinksWithout) -> go.Figure:
    """The share of each block's heads that have a sink on the first key, with and without the writes."""
    figure = base_figure(f"Sinks without the writes of {', '.join(change.components)} along the direction", height=460)
    table = change.by_layer()
    for name, column, colour, dash in (
        (f"whole model ({100 * change.before.sink_rate:.1f} % of all heads)", "before", BLUE, "solid"),
        (f"without ({100 * change.after.sink_rate:.1f} %)", "after", VERMILION, "dash"),
    ):
        figure.add_scatter(
            x=table.layer.tolist(), y=table[f"sink_{column}"].tolist(), name=name, mode="lines+markers",
            line={"color": colour, "dash": dash}, customdata=np.array(table[f"on_first_{column}"]),
            hovertemplate="block %{x}<br>%{y:.0%} of heads<br>mean attention %{customdata:.3f}<extra></extra>",
        )  # fmt: skip
    for label in change.components:
        layer = int(label[1 : -len("MLP")])
        figure.add_vline(x=layer, line={"color": VERMILION, "dash": "dot", "width": 1.5}, opacity=0.7)
    figure.update_xaxes(title_text=_LAYER_AXIS)
    figure.update_yaxes(title_text="heads with a sink", tickformat=".0%", range=[-0.04, 1.04])
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    return figure
