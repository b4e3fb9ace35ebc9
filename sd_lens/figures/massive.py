"""Massive activations by channel, and the neurons and single weights behind them."""

from __future__ import annotations

import plotly.graph_objects as go

from sd_lens.explanations.super_weights import SuperWeights
from sd_lens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    LAYER_AXIS,
    NORM_AXIS,
    ORANGE,
    PURPLE,
    VERMILION,
    base_figure,
    shown_number,
)
from sd_lens.observations.massive import MassiveActivations

_CHANNEL_STYLES = (
    (VERMILION, "circle"), (BLUE, "diamond"), (GREEN, "square"), (ORANGE, "cross"), (PURPLE, "triangle-up"),
)  # fmt: skip


def massive_channels(massive: MassiveActivations) -> go.Figure:
    """The largest magnitude in each channel with massive activations, per block, with both criteria (logarithmic).

    The five channels that have most of them are shown.
    """
    table = massive.channels()
    most = table.groupby("channel")["count"].sum().nlargest(len(_CHANNEL_STYLES)).index.tolist()
    n_channels = table.channel.nunique()
    title = f"Massive activations in {n_channels} of {massive.channel_share.shape[1]} channels"
    figure = base_figure(title + (f", {len(most)} shown" if n_channels > len(most) else ""), height=520)
    layers = list(range(len(massive.median)))
    for channel, (colour, symbol) in zip(most, _CHANNEL_STYLES, strict=False):
        rows = table[table.channel == channel].set_index("layer").reindex(layers)
        figure.add_scatter(
            x=layers, y=[None if y != y else y for y in rows.largest.tolist()], name=f"channel {channel}",
            mode="lines+markers", line={"color": colour}, marker={"symbol": symbol, "size": 7},
            customdata=rows["count"].tolist(),
            hovertemplate=f"block %{{x}}<br>channel {channel}: %{{y:,.4g}}<br>%{{customdata}} tokens<extra></extra>",
        )  # fmt: skip
    for name, values, dash in (
        ("usual criterion", massive.usual_threshold, "dash"),
        ("relative criterion", massive.threshold, "dot"),
        ("median of all entries", massive.median, "solid"),
    ):
        figure.add_scatter(
            x=layers, y=[y if y < float("inf") else None for y in values.tolist()], name=name, mode="lines",
            line={"color": GREY, "dash": dash}, hovertemplate=f"block %{{x}}<br>{name} %{{y:,.4g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=LAYER_AXIS)
    figure.update_yaxes(title_text="magnitude", type="log", exponentformat="power", dtick=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.18})
    return figure


def write_sparsity(found: SuperWeights) -> go.Figure:
    """The share of an MLP's write along the direction that its n largest neurons make, against n (logarithmic)."""
    figure = base_figure(
        f"L{found.layer}MLP: {found.n_neurons:,} of {len(found.cumulative):,} neurons write 99 % of "
        f"{shown_number(found.written)} along the direction",
        height=460,
    )
    n = list(range(1, len(found.cumulative) + 1))
    labels = [*found.neurons.component, *[""] * (len(n) - len(found.neurons))]
    figure.add_scatter(
        x=n, y=found.cumulative.tolist(), mode="lines+markers", line={"color": BLUE}, marker={"size": 5},
        customdata=[f"<br>the last of them {label}" if label else "" for label in labels], showlegend=False,
        hovertemplate="%{x:,} neurons: %{y:.2%}%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.add_vline(x=found.n_neurons, line={"color": VERMILION, "dash": "dash", "width": 1.5})
    figure.update_xaxes(title_text="number of neurons, largest first", type="log", dtick=1)
    figure.update_yaxes(title_text="share of the write", tickformat=".0%", rangemode="tozero")
    return figure


def zeroed_norms(found: SuperWeights) -> go.Figure:
    """The norm after the block with each of the largest neurons, and each of the largest weights, zeroed."""
    figure = base_figure(
        f"Norm after block {found.layer} with one neuron, or one weight, of its MLP zeroed", height=480
    )
    start = 0
    for name, table, colour in (("neuron", found.neurons, BLUE), ("single weight", found.entries, ORANGE)):
        figure.add_bar(
            x=list(range(start, start + len(table))), y=table.norm.tolist(), name=name, marker={"color": colour},
            customdata=[
                f"without {component}<br>norm {shown_number(norm)}<br>loss {loss:.4g} nats per token<br>"
                f"share of the write {100 * share:.3g} %"
                for component, norm, loss, share in zip(
                    table.component, table.norm, table.loss, table.share, strict=True
                )
            ], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
        start += len(table)
    figure.add_hline(y=found.before["norm"], line={"color": GREY, "dash": "dash", "width": 1.5})
    labels = [*found.neurons.component, *found.entries.component]
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=-45)
    figure.update_yaxes(title_text=NORM_AXIS, tickformat=",")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"})
    return figure
