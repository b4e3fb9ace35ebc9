"""How norms explode: the vocabulary on both paths, the explosion subspace, and coefficients on it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sd_lens.explanations.contexts import ExplosionInContext
from sd_lens.explanations.explosion import ExplosionPath
from sd_lens.explanations.subspace import ExplosionSubspace
from sd_lens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    base_figure,
    shown_number,
    shown_token,
)

_MOST_POINTS = 3000  # drawn one by one; of a larger vocabulary the first and then every so many-th
_N_BINS = 80
_LONGEST_LABEL = 12  # characters of a token below the axis


def vocabulary_scatter(path: ExplosionPath) -> go.Figure:
    """Every token's norm on the initial path against that on the non-initial path (logarithmic).

    Of a large vocabulary the tokens with the largest norms on the non-initial path are drawn, and an even selection of
    the others.

    Source: Wang et al. 2025, section 4.
    """
    table = _thinned(path.table)
    drawn = "" if len(table) == len(path.table) else f" ({len(table):,} of {len(path.table):,} drawn)"
    figure = base_figure(f"One-token texts: norm after block {path.layer}{drawn}", height=560)
    groups = (
        ("explodes without attention", table[table.explodes], VERMILION),
        ("does not", table[~table.explodes], BLUE),
        ("untrained", _thinned(path.untrained), GREY),
    )
    for name, rows, colour in groups:
        if len(rows):
            figure.add_scatter(
                x=rows.non_initial.tolist(), y=rows.initial.tolist(), name=name, mode="markers",
                marker={"color": colour, "size": 4, "opacity": 0.6},
                text=[shown_token(str(token)) for token in rows.token],
                hovertemplate="%{text}<br>without attention %{x:,.4g}<br>with attention %{y:,.4g}<extra></extra>",
            )  # fmt: skip
    figure.add_vline(x=path.threshold, line={"color": GREY, "dash": "dash"})
    figure.add_hline(y=path.threshold, line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(title_text="norm without attention (non-initial path)", type="log", exponentformat="power")
    figure.update_yaxes(title_text="norm with attention (initial path)", type="log", exponentformat="power")
    figure.update_layout(legend={"orientation": "h", "y": -0.16, "itemsizing": "constant"})
    return figure


def context_norms(found: ExplosionInContext) -> go.Figure:
    """Norms of tokens put into real texts: median and range over the contexts, beside what the path says."""
    figure = base_figure(f"The same tokens in real texts: norm after block {found.layer}", height=520)
    places = np.arange(len(found.table))
    for name, is_named, colour in (("named by the path", True, VERMILION), ("others", False, BLUE)):
        here = (found.table.named == is_named).to_numpy()
        rows = found.table[here]
        figure.add_scatter(
            x=places[here].tolist(), y=rows["median"].tolist(), name=f"{name}, in text (median and range)",
            mode="markers", marker={"color": colour, "size": 7},
            error_y={"array": (rows.highest - rows["median"]).tolist(), "symmetric": False, "thickness": 1,
                     "arrayminus": (rows["median"] - rows.lowest).tolist()},
            text=[shown_token(str(token)) for token in rows.token],
            hovertemplate="%{text}<br>median %{y:,.4g}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=places.tolist(), y=found.table.non_initial.tolist(), name="on the path (no attention)", mode="markers",
        marker={"color": GREY, "symbol": "diamond-open", "size": 7}, hovertemplate="path %{y:,.4g}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(y=found.threshold, line={"color": GREY, "dash": "dash"})
    labels = [shown_token(str(token)[:_LONGEST_LABEL]) for token in found.table.token]
    figure.update_xaxes(
        title_text="token", tickvals=places.tolist(), ticktext=labels, tickangle=-60, tickfont={"size": 9}
    )
    figure.update_yaxes(title_text="norm of the residual stream", type="log", exponentformat="power", dtick=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.3}, margin={"b": 120})
    return figure


def subspace_curve(subspace: ExplosionSubspace) -> go.Figure:
    """What the MLP writes for each right singular vector of its linear map, in either sign (logarithmic).

    Source: Wang et al. 2025, section 4 (explosion subspace).
    """
    figure = base_figure(f"What the MLP of block {subspace.layer} writes for its right singular vectors", height=480)
    ranks = list(range(1, len(subspace.outputs) + 1))
    for name, norms, colour in (
        ("with the sign that writes more", subspace.outputs, VERMILION), ("turned round", subspace.opposite, BLUE),
    ):  # fmt: skip
        figure.add_scatter(
            x=ranks, y=norms.tolist(), name=name, mode="lines+markers", marker={"size": 4}, line={"color": colour},
            text=[shown_number(norm) for norm in norms.tolist()],
            hovertemplate=f"v%{{x}}, {name}: %{{text}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="rank of the singular value", type="log", dtick=1)
    figure.update_yaxes(title_text="norm of the MLP's write", type="log", exponentformat="power", dtick=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.18})
    return figure


def subspace_dimensions(subspace: ExplosionSubspace) -> go.Figure:
    """What the MLP writes for initial tokens, with only the leading dimensions of their input, and without them."""
    figure = base_figure(f"How many dimensions make the write of block {subspace.layer}'s MLP", height=480)
    for name, norms, colour in (
        ("only the leading dimensions", subspace.kept, VERMILION), ("all but these", subspace.removed, BLUE),
    ):  # fmt: skip
        figure.add_scatter(
            x=list(subspace.n_dimensions), y=norms.tolist(), name=name, mode="lines+markers", line={"color": colour},
            hovertemplate=f"%{{x}} dimensions, {name}: %{{y:,.4g}}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=float(subspace.kept[-1]), line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(title_text="leading right singular vectors", type="log", dtick=1)
    figure.update_yaxes(title_text="norm of the MLP's write (median)", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": -0.18})
    return figure


def coefficient_distributions(subspace: ExplosionSubspace) -> go.Figure:
    """How the tokens' coefficients on v1 are distributed in the initial and in the second position.

    Source: Wang et al. 2025, section 4 (subspace coefficient).
    """
    figure = base_figure(f"Coefficient of the input of block {subspace.layer}'s MLP on v1", height=460)
    trained = subspace.table[~subspace.table.untrained]
    both = trained[["initial", "second"]].to_numpy()
    edges = np.linspace(both.min(), both.max(), _N_BINS + 1)
    for column, name, colour in (
        ("initial", "initial position", VERMILION), ("second", "second position", BLUE),
    ):  # fmt: skip
        counts, _ = np.histogram(trained[column], edges)
        figure.add_bar(
            x=((edges[1:] + edges[:-1]) / 2).tolist(), y=(counts / len(trained)).tolist(), name=name,
            marker={"color": colour, "opacity": 0.6}, width=float(edges[1] - edges[0]),
            hovertemplate=f"{name}<br>about %{{x:.3g}}: %{{y:.2%}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="coefficient on v1")
    figure.update_yaxes(title_text="share of the tokens", tickformat=".0%")
    figure.update_layout(barmode="overlay", legend={"orientation": "h", "y": -0.18})
    return figure


def coefficient_sources(subspace: ExplosionSubspace) -> go.Figure:
    """What the median coefficient on v1 comes from, in the initial and in the second position."""
    figure = base_figure(f"What carries tokens to v1 of block {subspace.layer}'s MLP", height=420)
    sources = subspace.sources
    for part, name, colour in (
        ("token", "the stream in front of the block", GREEN), ("attention", "attention's write", ORANGE),
        ("norm", "change of the norm's scale", PURPLE),
    ):  # fmt: skip
        figure.add_bar(
            x=[f"{place} position" for place in sources.index], y=sources[part].tolist(), name=name,
            marker={"color": colour}, hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(title_text="median part of the coefficient")
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.18})
    return figure


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """At most `_MOST_POINTS` rows: the first half of them as they are, an even selection of the rest."""
    if len(table) <= _MOST_POINTS:
        return table
    first = _MOST_POINTS // 2
    others = np.linspace(first, len(table) - 1, _MOST_POINTS - first).round().astype("int64")
    return table.iloc[np.concatenate([np.arange(first), others])]
