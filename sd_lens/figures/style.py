"""What all figures share: colours that colour-blind readers can tell apart, layers, token text."""

from __future__ import annotations

import html
from collections.abc import Iterable

import plotly.graph_objects as go

# Okabe & Ito's palette (2008)
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666",
)  # fmt: skip
SEQUENTIAL = "Cividis"  # made for readers with and without colour vision (Nuñez et al. 2018)

LAYER_AXIS = "block (0-based; the residual stream after it)"
NORM_AXIS = "norm of the residual stream"


def shown_token(token: str) -> str:
    """A token as text for a figure or a page: spaces and line breaks visible, markup escaped."""
    visible = token.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t").replace(" ", "\u00b7")
    return html.escape(visible)


def shown_number(x: float) -> str:
    """A number for reading: `23,518` or `6.153`."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def base_figure(title: str, **layout: object) -> go.Figure:
    """An empty figure in the common style."""
    figure = go.Figure()
    figure.update_layout(
        title={"text": html.escape(title), "x": 0.01, "xanchor": "left"},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 30, "t": 70, "b": 60},
        **layout,
    )
    return figure


def mark_layers(figure: go.Figure, explosion: Iterable[int], decay: Iterable[int]) -> None:
    """Vertical lines at explosion and decay blocks, named above the plot."""
    for layers, name, colour, dash in (
        (explosion, "explosion", VERMILION, "dash"),
        (decay, "decay", BLUE, "dot"),
    ):
        for layer in layers:
            figure.add_vline(x=layer, line={"color": colour, "dash": dash, "width": 1.5}, opacity=0.7)
            figure.add_annotation(
                x=layer, y=1.0, yref="paper", yanchor="bottom", text=f"{name} {layer}", textangle=-35,
                showarrow=False, font={"color": colour, "size": 11}, xanchor="left",
            )  # fmt: skip
