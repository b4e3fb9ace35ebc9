"""Attributions: who wrote a norm, as a waterfall and as a grid; an MLP's neurons, a head's source tokens."""

from __future__ import annotations

import math
from itertools import accumulate

import pandas as pd
import plotly.graph_objects as go

from sd_lens.errors import InputError
from sd_lens.explanations.attribution import Attribution
from sd_lens.explanations.corpus import CorpusAttribution
from sd_lens.explanations.drilling import NeuronAttribution, SourceAttribution
from sd_lens.figures.grids import component_heatmap, short_share, shown_share, token_axis
from sd_lens.figures.style import BLUE, GREY, ORANGE, VERMILION, base_figure, shown_number, shown_token

_LENGTH_AXIS = "length along the direction"
_SHARE_FONT = {"size": 11}


def contribution_waterfall(attribution: Attribution | CorpusAttribution, largest: int = 12) -> go.Figure:
    """The largest contributions in the order of writing, everything else in one step, and the total that they sum to.

    Raises:
        InputError: if `largest` is less than one.
    """
    table = attribution.table
    is_shown = table.index.isin(_largest(table, largest))
    shown, others = table[is_shown], table[~is_shown]
    rest = _rest(shown, others, attribution.total)
    labels = [*map(shown_token, shown.component), f"everything else ({len(others)})", "total"]
    hover = [*_hover(shown), rest[1], f"total<br>{shown_number(attribution.total)}"]
    figure = base_figure(_title(attribution), height=520)
    figure.add_waterfall(
        x=list(range(len(labels))), y=[*shown.contribution.tolist(), rest[0], attribution.total],
        measure=["relative"] * (len(labels) - 1) + ["total"],
        customdata=hover, hovertemplate="%{customdata}<extra></extra>", showlegend=False,
        increasing={"marker": {"color": VERMILION}}, decreasing={"marker": {"color": BLUE}},
        totals={"marker": {"color": GREY}}, connector={"line": {"color": GREY, "width": 1}},
    )  # fmt: skip
    # Plotly's own labels go below bars that fall, onto the axis; these are above every bar.
    after = list(accumulate([*shown.contribution, rest[0]]))
    figure.add_scatter(
        x=list(range(len(after))), y=[max(pair) for pair in zip([0.0, *after], after, strict=False)], mode="text",
        text=[short_share(share) for share in [*shown.share, others.share.sum(skipna=False)]],
        textposition="top center", textfont=_SHARE_FONT, hoverinfo="skip", showlegend=False, cliponaxis=False,
    )  # fmt: skip
    # Numbers with labels, not categories: the same label twice would be one bar.
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=-45)
    figure.update_yaxes(title_text=_LENGTH_AXIS, tickformat=",")
    return figure


def contribution_heatmap(attribution: Attribution | CorpusAttribution) -> go.Figure:
    """Every head's and MLP's contribution, blocks x (heads | MLP); biases and embeddings have no cell.

    The colour is a signed logarithm, since contributions span five orders of magnitude.
    """
    return component_heatmap(
        _title(attribution),
        attribution.table,
        "contribution",
        _hover(attribution.table),
        colour_title="length along<br>the direction",
    )


def neuron_bars(neurons: NeuronAttribution, largest: int = 20) -> go.Figure:
    """The neurons of an MLP that contribute most, largest first.

    Raises:
        InputError: if `largest` is less than one.
    """
    table = neurons.table.loc[_largest(neurons.table, largest)]
    figure = base_figure(
        f"L{neurons.layer}MLP: the {len(table):,} largest of {len(neurons.table):,} neurons", height=460
    )
    figure.add_bar(
        x=list(range(len(table))), y=table.contribution.tolist(), marker={"color": _signs(table)},
        text=[short_share(share) for share in table.share], textposition="outside", textangle=0, textfont=_SHARE_FONT,
        constraintext="none", cliponaxis=False,
        customdata=[
            f"L{neurons.layer}N{neuron}<br>activation {shown_number(activation)}<br>"
            f"contribution {shown_number(contribution)}<br>share {shown_share(share)}"
            for neuron, activation, contribution, share in zip(
                table.neuron, table.activation, table.contribution, table.share, strict=True
            )
        ], hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(
        title_text="neuron", tickvals=list(range(len(table))), ticktext=[f"{n}" for n in table.neuron], tickangle=-45
    )
    figure.update_yaxes(title_text=_LENGTH_AXIS, tickformat=",")
    return figure


def source_map(sources: SourceAttribution) -> go.Figure:
    """What a head writes from each token, and how much it attends to it."""
    table = sources.table
    tokens = [shown_token(token) for token in table.token]
    hover = [
        f"token {token}<br>position {position}<br>contribution {shown_number(contribution)}<br>"
        f"share {shown_share(share)}<br>attention {attention:.3g}"
        for token, position, contribution, share, attention in zip(
            tokens, table.position, table.contribution, table.share, table.attention, strict=True
        )
    ]
    figure = base_figure(f"L{sources.layer}H{sources.head}: what it writes from each token", height=480)
    figure.add_bar(
        x=table.position.tolist(), y=table.contribution.tolist(), name="contribution", marker={"color": BLUE},
        customdata=hover, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=table.position.tolist(), y=table.attention.tolist(), yaxis="y2", name="attention", mode="markers",
        marker={"color": ORANGE, "size": 10, "symbol": "diamond", "line": {"color": "white", "width": 1}},
        customdata=hover, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    # Both axes have their zero at the same height, or a diamond would seem to belong to a length.
    size = 1.1 * (float(table.contribution.abs().max()) or 1.0)
    bottom = -1.0 if (table.contribution < 0).any() else 0.0
    figure.update_layout(
        yaxis={"title": {"text": _LENGTH_AXIS}, "tickformat": ",", "range": [bottom * size, size]},
        yaxis2={
            "title": {"text": "attention"}, "range": [1.1 * bottom, 1.1], "overlaying": "y", "side": "right",
            "showgrid": False, "zeroline": False, "tickvals": [0, 0.25, 0.5, 0.75, 1],
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        margin={"r": 70},
    )  # fmt: skip
    token_axis(figure, tokens)
    return figure


def _title(attribution: Attribution | CorpusAttribution) -> str:
    if isinstance(attribution, CorpusAttribution):
        return f"Who wrote {attribution.n_tokens:,} tokens, up to block {attribution.layer}: means"
    return f"Who wrote {attribution.tokens[-1]!r} at position {attribution.position}, up to block {attribution.layer}"


def _largest(table: pd.DataFrame, n: int) -> pd.Index:
    if n < 1:
        raise InputError(f"largest={n}: at least one must be shown")
    return table.contribution.abs().nlargest(n).index


def _rest(shown: pd.DataFrame, others: pd.DataFrame, total: float) -> tuple[float, str]:
    """What brings the bars to the total, rounding included, and its hover."""
    rest = total - math.fsum(shown.contribution)
    rounding = rest - math.fsum(others.contribution)
    return rest, (
        f"{len(others)} others<br>contribution {shown_number(rest)}<br>"
        f"share {shown_share(float(others.share.sum(skipna=False)))}<br>of it rounding {rounding:.1e}"
    )


def _hover(table: pd.DataFrame) -> list[str]:
    spread = table.get("contribution_std")
    return [
        f"{shown_token(component)}<br>contribution {shown_number(contribution)}<br>share {shown_share(share)}"
        + ("" if spread is None else f"<br>spread between tokens {shown_number(spread.iloc[i])}")
        for i, (component, contribution, share) in enumerate(
            zip(table.component, table.contribution, table.share, strict=True)
        )
    ]


def _signs(table: pd.DataFrame) -> list[str]:
    return [VERMILION if c >= 0 else BLUE for c in table.contribution]
