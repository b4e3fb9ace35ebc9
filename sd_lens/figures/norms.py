"""Norms of the residual stream: surface, heatmap, and per-layer curves."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Shaped

from sd_lens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    LAYER_AXIS,
    NORM_AXIS,
    ORANGE,
    SEQUENTIAL,
    VERMILION,
    base_figure,
    mark_layers,
    shown_number,
    shown_token,
)
from sd_lens.observations.high_norm import HighNormTokens
from sd_lens.observations.norms import TextNorms

_MOST_TOKEN_LABELS = 64
_HOVER = "token %{customdata}<br>position %{x}<br>block %{y}<br>norm %{text}<extra></extra>"


def norm_surface(text: TextNorms) -> go.Figure:
    """The norms of one text as a 3-D surface: tokens x blocks x norm (logarithmic)."""
    figure = base_figure("Norm of every token after every block", height=620)
    figure.add_surface(
        z=_log_norms(text), customdata=_hover_tokens(text), text=_hover_norms(text),
        colorscale=SEQUENTIAL, hovertemplate=_HOVER, colorbar=_colour_bar(text),
    )  # fmt: skip
    ticks = _decades(text)
    figure.update_layout(
        scene={
            "xaxis": {"title": {"text": "position of the token"}},
            "yaxis": {"title": {"text": "block (0-based)"}},
            "zaxis": {
                "title": {"text": "norm (log)"}, "tickvals": ticks, "ticktext": [shown_number(10.0**t) for t in ticks]
            },
            "camera": {"eye": {"x": -1.5, "y": -1.6, "z": 0.8}},
            "aspectratio": {"x": 1.4, "y": 1, "z": 0.7},
        }
    )  # fmt: skip
    return figure


def norm_heatmap(text: TextNorms) -> go.Figure:
    """The norms of one text as a heatmap: blocks x tokens, colour logarithmic."""
    figure = base_figure("Norm of every token after every block", height=560)
    figure.add_heatmap(
        z=_log_norms(text), customdata=_hover_tokens(text), text=_hover_norms(text),
        colorscale=SEQUENTIAL, hovertemplate=_HOVER, colorbar=_colour_bar(text),
    )  # fmt: skip
    n = len(text.tokens)
    figure.update_xaxes(title_text="position of the token")
    if n <= _MOST_TOKEN_LABELS:
        figure.update_xaxes(
            title_text="token", tickvals=list(range(n)), tickangle=-70, tickfont={"size": 9},
            ticktext=[shown_token(token) for token in text.tokens],
        )  # fmt: skip
    figure.update_yaxes(title_text=LAYER_AXIS)
    return figure


def layer_norms(found: HighNormTokens) -> go.Figure:
    """Maximum and median norms per block (logarithmic), with explosion and decay blocks marked."""
    figure = base_figure("Norms per block over the corpus", height=520)
    layers = list(range(len(found.threshold)))
    curves = [
        ("maximum of all tokens", found.scan.maximum, VERMILION, "solid"),
        ("median, initial tokens", found.scan.initial_median, ORANGE, "solid"),
        ("median, other tokens", found.scan.ordinary_median, BLUE, "solid"),
    ]
    if found.non_initial.n_tokens:
        curves.append(("median, non-initial high-norm tokens", found.non_initial.median, GREEN, "dash"))
    for name, values, colour, dash in curves:
        figure.add_scatter(
            x=layers, y=values.tolist(), name=name, mode="lines+markers", marker={"size": 5},
            line={"color": colour, "dash": dash}, hovertemplate=f"block %{{x}}<br>{name}: %{{y:,.4g}}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=layers, y=[t if t < float("inf") else None for t in found.threshold.tolist()], name="threshold",
        mode="markers", marker={"symbol": "line-ew-open", "size": 11, "color": GREY},
        hovertemplate="block %{x}<br>threshold %{y:,.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(title_text=NORM_AXIS, type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title_text=LAYER_AXIS)
    figure.update_layout(legend={"orientation": "h", "y": -0.18}, margin={"t": 110})
    mark_layers(figure, found.explosion_layers, found.decay_layers)
    return figure


def _log_norms(text: TextNorms) -> list[list[float]]:
    logs: list[list[float]] = text.norms.clamp_min(1e-12).log10().tolist()
    return logs


# Arrays of strings: plotly takes a nested list of strings for one string per row.
def _hover_tokens(text: TextNorms) -> Shaped[np.ndarray, "layer pos"]:
    return np.array([[shown_token(token) for token in text.tokens]] * len(text.norms))


def _hover_norms(text: TextNorms) -> Shaped[np.ndarray, "layer pos"]:
    return np.array([[shown_number(norm) for norm in row] for row in text.norms.tolist()])


def _decades(text: TextNorms) -> list[int]:
    logs = text.norms.clamp_min(1e-12).log10()
    return list(range(int(torch.floor(logs.min())), int(torch.ceil(logs.max())) + 1))


def _colour_bar(text: TextNorms) -> dict[str, object]:
    ticks = _decades(text)
    return {"title": {"text": "norm"}, "tickvals": ticks, "ticktext": [shown_number(10.0**t) for t in ticks]}
