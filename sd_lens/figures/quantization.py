"""Quantization: what sparing buys, which blocks suffer, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable

import plotly.graph_objects as go

from sd_lens.applications.quantization_report import QuantizationReport
from sd_lens.applications.sparing_search import SparingSearch
from sd_lens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    base_figure,
    mark_layers,
    shown_number,
    shown_token,
)
from sd_lens.observations.outliers import ActivationOutliers

_BLOCK_AXIS = "block (0-based)"
_COLOURS = {
    "full": GREY, "rounded": VERMILION, "spared": BLUE, "control": ORANGE, "smoothed": GREEN, "both": PURPLE,
}  # fmt: skip


def quantization_bars(report: QuantizationReport) -> go.Figure:
    """The perplexity of every method, with the share of the gap that it closes beside its bar."""
    table = report.table
    figure = base_figure(f"Perplexity under {report.scheme}", height=160 + 34 * len(table))
    closed = ["" if math.isnan(share) or kind in ("full", "rounded") else f" ({100 * share:.1f} % of the gap closed)"
              for kind, share in zip(table.kind, table.gap_closed, strict=True)]  # fmt: skip
    figure.add_bar(
        x=table.perplexity.tolist(), y=table.method.tolist(), orientation="h",
        marker={"color": [_COLOURS[kind] for kind in table.kind]},
        text=[shown_number(value) + share for value, share in zip(table.perplexity, closed, strict=True)],
        textposition="outside", cliponaxis=False,
        customdata=[f"W_out spared in {_named(layers)}" for layers in table.layers],
        hovertemplate="%{y}: %{x:.5g}<br>%{customdata}<extra></extra>",
    )  # fmt: skip
    longest = float(table.perplexity.max())
    figure.update_xaxes(title_text="perplexity", range=[0, 1.5 * longest] if math.isfinite(longest) else None)
    figure.update_yaxes(autorange="reversed", ticksuffix="  ")
    figure.update_layout(margin={"l": 190}, showlegend=False)
    return figure


def rounding_sensitivity(
    search: SparingSearch, *, explosion_layers: Iterable[int] = (), decay_layers: Iterable[int] = ()
) -> go.Figure:
    """What rounding each block's `W_out` alone costs, beside the error that the weights foretell.

    Args:
        search: of `search_spared_layers`.
        explosion_layers: marked where they are drawn.
        decay_layers: marked where they are drawn.
    """
    table = search.table
    figure = base_figure(
        f"Rounding one W_out: measured and forecast (rank correlation {search.rank_correlation:.2f})", height=480
    )
    for column, name, colour, symbol, axis, rank in (
        ("alone", "measured", VERMILION, "circle", "y", "alone_rank"),
        ("forecast", "forecast from the weights", BLUE, "diamond-open", "y2", "forecast_rank"),
    ):
        figure.add_scatter(
            x=table.layer.tolist(), y=[value if value > 0 else None for value in table[column]], name=name,
            mode="lines+markers", yaxis=axis, line={"color": colour, "dash": "solid" if axis == "y" else "dot"},
            marker={"symbol": symbol, "size": 8}, customdata=table[rank].tolist(),
            hovertemplate=f"block %{{x}}<br>{name}: %{{y:.3g}}<br>rank %{{customdata}} of {len(table)}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=_BLOCK_AXIS)
    figure.update_yaxes(title_text="divergence (nats per token)", type="log", exponentformat="power", dtick=1)
    figure.update_layout(
        yaxis2={"title": {"text": "relative error of the stream"}, "overlaying": "y", "side": "right", "type": "log",
                "showgrid": False, "exponentformat": "power", "dtick": 1},
        legend={"orientation": "h", "y": -0.18}, margin={"t": 130, "r": 80},
    )  # fmt: skip
    drawn = set(table.layer)
    mark_layers(
        figure,
        [layer for layer in explosion_layers if layer in drawn],
        [layer for layer in decay_layers if layer in drawn],
    )
    return figure


def outlier_ratios(
    outliers: ActivationOutliers, *, explosion_layers: Iterable[int] = (), decay_layers: Iterable[int] = ()
) -> go.Figure:
    """How far the largest input of each block's `W_out` stands above the median one.

    Above the line, eight bits for the whole tensor round more than half of the inputs to zero.

    Args:
        outliers: of `activation_outliers`.
        explosion_layers: marked.
        decay_layers: marked.
    """
    table = outliers.table
    figure = base_figure("Largest input of W_out, in medians", height=460)
    figure.add_scatter(
        x=table.layer.tolist(), y=[ratio if math.isfinite(ratio) else None for ratio in table.ratio],
        mode="lines+markers", line={"color": VERMILION}, name="largest over median",
        customdata=[
            f"neuron {neuron}, token {shown_token(token)} at position {position}<br>largest {shown_number(largest)}, "
            f"median {shown_number(median)}"
            for neuron, token, position, largest, median in zip(
                table.neuron, table.token, table.position, table.absmax, table["median"], strict=True
            )
        ], hovertemplate="block %{x}: %{y:,.4g} medians<br>%{customdata}<extra></extra>",
    )  # fmt: skip
    # A number below half a step is rounded to zero; 127 steps are the largest.
    figure.add_hline(y=254, line={"color": GREY, "dash": "dash", "width": 1.5})
    figure.update_xaxes(title_text=_BLOCK_AXIS)
    figure.update_yaxes(title_text="largest over median", type="log", exponentformat="power", dtick=1)
    figure.update_layout(margin={"t": 130}, showlegend=False)
    mark_layers(figure, explosion_layers, decay_layers)
    return figure


def _named(layers: tuple[int, ...]) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}" if layers else "no block"
