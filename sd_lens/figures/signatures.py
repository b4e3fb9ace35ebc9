"""Signatures: angles between models, what is related, and how a signature comes about in training."""

from __future__ import annotations

import html
import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sd_lens.applications.lineage import Lineage
from sd_lens.applications.trajectory import SignatureTrajectory
from sd_lens.figures.grids import NO_CELL
from sd_lens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SEQUENTIAL,
    VERMILION,
    base_figure,
    shown_number,
)

_ANGLE_AXIS = "acute angle (degrees)"
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE)
_MOST_NUMBERS = 16


def lineage_heatmap(lineage: Lineage) -> go.Figure:
    """Angles between all directions, kin beside kin; grey where there is nothing to compare."""
    names = [html.escape(lineage.names[i]) for i in lineage.order]
    angles = lineage.angles[list(lineage.order)][:, list(lineage.order)]
    hover = {}
    for row in lineage.table.itertuples():
        hover[row.first, row.second] = hover[row.second, row.first] = _pair(row)
    ordered = [lineage.names[i] for i in lineage.order]
    figure = base_figure("Angles between the directions of high-norm tokens", height=260 + 26 * len(names))
    figure.add_heatmap(
        z=[[None if math.isnan(angle) else angle for angle in row] for row in angles.tolist()], x=names, y=names,
        zmin=0, zmax=90, colorscale=SEQUENTIAL, xgap=1, ygap=1, hoverongaps=False,
        customdata=[[hover.get((one, other), html.escape(one)) for other in ordered] for one in ordered],
        hovertemplate="%{customdata}<extra></extra>", texttemplate="%{z:.1f}" if len(names) <= _MOST_NUMBERS else None,
        colorbar={"title": {"text": "degrees"}, "tick0": 0, "dtick": 15},
    )  # fmt: skip
    figure.update_layout(plot_bgcolor=NO_CELL)
    figure.update_xaxes(showgrid=False, tickangle=-40, type="category")
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return figure


def lineage_dendrogram(lineage: Lineage) -> go.Figure:
    """Single linkage by angle; models that cannot be compared are apart.

    Groups of related models have a colour each; a grey link joins models that are not related. The dotted line is the
    angle that uniform random directions undercut at the false-positive rate.
    """
    figure = base_figure("Models linked by the angle between their directions", height=480)
    places: dict[tuple[int, ...], tuple[float, float]] = {
        (model,): (place, 0.0) for place, model in enumerate(lineage.order)
    }
    group_of = {name: number for number, group in enumerate(lineage.groups) for name in group}
    for merge in lineage.merges:
        (left, low), (right, lower) = places[merge.left], places[merge.right]
        groups = {group_of[lineage.names[i]] for i in merge.left + merge.right}
        colour = _COLOURS[groups.pop() % len(_COLOURS)] if len(groups) == 1 else GREY
        figure.add_scatter(
            x=[left, left, right, right], y=[low, merge.height, merge.height, lower], mode="lines",
            line={"color": colour, "width": 2}, showlegend=False,
            hovertemplate=f"{merge.height:.2f} degrees<extra></extra>",
        )  # fmt: skip
        places[merge.left + merge.right] = ((left + right) / 2, merge.height)
    _add_thresholds(figure, lineage)
    names = [html.escape(lineage.names[i]) for i in lineage.order]
    figure.update_xaxes(
        tickvals=list(range(len(names))), ticktext=names, tickangle=-40, showgrid=False, zeroline=False,
        range=[-0.6, len(names) - 0.4],
    )  # fmt: skip
    figure.update_yaxes(title_text=_ANGLE_AXIS, range=[-1, 92], dtick=15)
    return figure


def signature_trajectory(trajectory: SignatureTrajectory) -> go.Figure:
    """How large the norms are at each checkpoint (logarithmic), and the angle of the direction to the last one's."""
    table = trajectory.to_dataframe()
    names = [html.escape(name) for name in trajectory.names]
    figure = base_figure("High-norm tokens over the checkpoints", height=480)
    figure.add_scatter(
        x=names, y=table.norm_ratio.tolist(), name="largest norm / ordinary norm", mode="lines+markers",
        line={"color": VERMILION}, text=[shown_number(ratio) for ratio in table.norm_ratio],
        hovertemplate="%{x}<br>%{text} times the ordinary norm<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=names, y=[None if math.isnan(angle) else angle for angle in table.angle], name="angle to the last checkpoint",
        mode="lines+markers", yaxis="y2", line={"color": BLUE, "dash": "dash"},
        hovertemplate="%{x}<br>%{y:.2f} degrees from the last<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title_text="checkpoint", type="category")
    figure.update_yaxes(title_text="largest norm / ordinary norm", type="log", exponentformat="power")
    figure.update_layout(
        yaxis2={"title": {"text": _ANGLE_AXIS}, "overlaying": "y", "side": "right", "range": [0, 92], "dtick": 15,
                "showgrid": False, "type": "linear"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        margin={"t": 100, "r": 70},
    )  # fmt: skip
    return figure


def _add_thresholds(figure: go.Figure, lineage: Lineage) -> None:
    """A line over the models of each width."""
    places = {lineage.names[model]: place for place, model in enumerate(lineage.order)}
    compared = lineage.table[lineage.table.angle.notna()]
    for threshold, pairs in compared.groupby("threshold"):
        members = [places[name] for name in pd.concat([pairs["first"], pairs["second"]])]
        figure.add_scatter(
            x=[min(members) - 0.4, max(members) + 0.4], y=[threshold, threshold], mode="lines",
            line={"color": GREY, "dash": "dot", "width": 1.5}, showlegend=False,
            hovertemplate=f"{threshold:.2f} degrees: what uniform random directions undercut at a rate of "
            f"{lineage.false_positive_rate:g} in {lineage.n_comparisons} comparisons<extra></extra>",
        )  # fmt: skip


def _pair(row: Any) -> str:
    """What is known of a pair, escaped."""
    start = f"{html.escape(row.first)}<br>{html.escape(row.second)}<br>{row.verdict}"
    if math.isnan(row.angle):
        return start
    return (
        f"{start}<br>{row.angle:.2f} degrees<br>{row.shared} largest channels shared, {row.required} required"
        f"<br>by chance: 10^{row.log10_p:.1f}<br>distance of the spectra {row.spectral_distance:.3g}"
    )
