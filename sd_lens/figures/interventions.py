"""Interventions: the ablation sweep and patching as grids, attribution against ablation as a scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sd_lens.errors import InputError
from sd_lens.explanations.attribution import Faithfulness
from sd_lens.explanations.components import Component
from sd_lens.explanations.patching import Patching
from sd_lens.explanations.sweep import AblationSweep
from sd_lens.figures.grids import (
    Ticks,
    component_heatmap,
    draw_cells,
    shown_pair,
    signed_log,
    signed_log_ticks,
    token_axis,
)
from sd_lens.figures.style import BLUE, GREY, VERMILION, base_figure, shown_number, shown_token


def _percent(change: float) -> str:
    return f"{100 * change:+,.3g} %" if change else "0"


def _signed(change: float) -> str:
    return f"{change:+,.3g}" if change else "0"


# Column of `changes`, title, colour bar, and a change as text.
_MEASURES: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "norm": ("norm of the watched tokens after block {layer}", "relative change<br>of the norm", _percent),
    "loss": ("next-token loss", "change of the loss<br>(nats per token)", _signed),
    "sink": ("attention on the first token", "change of the<br>mean attention", _signed),
}
_UNIT = 0.01  # 1 %, or 0.01 nats: most components change less, which is then shown in proportion
_N_NAMED = 3
# An estimate may be wrong by any factor: the colours end at the whole difference, and their labels say so.
_RESTORED_TICKS: Ticks = {
    "tickvals": [-1.0, -0.5, 0.0, 0.5, 1.0],
    "ticktext": ["\u2264 -1", "-0.5", "0", "0.5", "\u2265 1"],
}


def ablation_heatmap(sweep: AblationSweep, measure: Literal["norm", "loss", "sink"] = "norm") -> go.Figure:
    """What changes without each component, blocks x (heads | MLP); grey: not ablated.

    Raises:
        InputError: for another measure, or a sweep without heads and MLPs.
    """
    if measure not in _MEASURES:
        raise InputError(f"unknown measure {measure!r}; expected one of {tuple(_MEASURES)}")
    changes = sweep.changes()
    if not changes.kind.isin(["head", "mlp"]).any():
        raise InputError("the sweep has no head and no MLP, which are what this figure shows: sweep some")
    hover = [
        f"without {shown_token(component)}<br>norm {_percent(norm)}<br>loss {_signed(loss)} nats per token<br>"
        f"attention on the first token {_signed(sink)}"
        for component, norm, loss, sink in zip(
            changes.component, changes.norm_change, changes.loss_change, changes.sink_change, strict=True
        )
    ]
    what, colour, shown = _MEASURES[measure]
    title = f"{sweep.mode.capitalize()} ablation of each component: {what.format(layer=sweep.layer)}"
    return component_heatmap(
        title, changes, f"{measure}_change", hover, colour_title=colour, unit=_UNIT, shown=shown
    )  # fmt: skip


def patching_heatmap(
    patching: Patching,
    site: str = "resid_pre",
    measure: Literal["restored", "estimate"] = "restored",
    *,
    position: int | None = None,
) -> go.Figure:
    """How much of the metric each clean activation brings back, blocks x positions, or blocks x heads for `z`.

    Args:
        patching: of `patch`.
        site: one of those that were patched.
        measure: `"restored"` by true patching, or its `"estimate"` by attribution patching; one colour scale for both.
        position: for site `z`: whose heads; negative ones count from the end, the last by default.

    Raises:
        InputError: for a site that was not patched, an unknown measure, or a position that does not exist.
    """
    if measure not in ("restored", "estimate"):
        raise InputError(f"unknown measure {measure!r}; expected 'restored' or 'estimate'")
    places = patching.table[patching.table.site == site]
    if places.empty:
        sites = tuple(patching.table.site.unique())
        raise InputError(f"site {site!r} was not patched; expected one of {sites}")
    tokens = [shown_pair(*pair) for pair in zip(patching.clean_tokens, patching.corrupted_tokens, strict=True)]
    title = f"{'Restored' if measure == 'restored' else 'Estimated to be restored'} by clean {site}: {patching.metric}"
    column = "position"
    if site == "z":
        at = _checked_position(position, len(tokens))
        places, column = places[places.position == at], "head"
        title += f"; heads at position {at}"
    elif position is not None:
        raise InputError(f"position={position} is for site 'z'; {site!r} is shown at all positions")
    by_place = places.assign(hover=_hover(places, tokens)).pivot_table(
        index="layer", columns=column, values=[measure, "hover"], aggfunc="first"
    )
    cells = by_place[measure].to_numpy(dtype="float64")
    n_rows, n_columns = by_place[measure].shape
    figure = base_figure(title, height=max(360, 210 + 16 * n_rows))
    edges = [i - 0.5 for i in range(n_columns + 1)]
    draw_cells(figure, cells, by_place["hover"].to_numpy(), edges, 1.0, _RESTORED_TICKS)
    figure.update_layout(coloraxis_colorbar_title_text="0: as corrupted<br>1: as clean")
    if site == "z":
        figure.update_xaxes(title_text="head (0-based)", tick0=0, dtick=1 if n_columns <= 32 else 4)
    else:
        token_axis(figure, tokens)
    return figure


def faithfulness_scatter(faithfulness: Faithfulness) -> go.Figure:
    """What each component writes against what is lost when it is ablated; on the diagonal the two are equal."""
    table = faithfulness.table
    correlation = faithfulness.rank_correlation
    named = "undefined" if np.isnan(correlation) else f"{correlation:.2f}"
    figure = base_figure(
        f"Contributions against {faithfulness.mode} ablation: rank correlation {named}", height=560
    )  # fmt: skip
    both = signed_log(table[["contribution", "effect"]].to_numpy(dtype="float64"))
    margin = 0.06 * (float(np.ptp(both)) or 1.0)
    ends = [float(both.min()) - margin, float(both.max()) + margin]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dash", "width": 1}, name="equal", hoverinfo="skip"
    )
    size = table[["contribution", "effect"]].abs().max(axis=1)
    with_name = size.index.isin(size.nlargest(_N_NAMED).index)
    is_head = np.array([Component.parse(label).kind == "head" for label in table.component], dtype=bool)
    for name, where, colour, symbol in (
        ("heads", is_head, BLUE, "circle"), ("MLPs", ~is_head, VERMILION, "square"),
    ):  # fmt: skip
        rows = table[where]
        figure.add_scatter(
            x=both[where, 0], y=both[where, 1], name=name, mode="markers+text",
            marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.75},
            text=[shown_token(c) if n else "" for c, n in zip(rows.component, with_name[where], strict=True)],
            textposition="top center",
            customdata=[
                f"{shown_token(component)}<br>contribution {shown_number(contribution)}<br>"
                f"effect {shown_number(effect)}"
                for component, contribution, effect in zip(
                    rows.component, rows.contribution, rows.effect, strict=True
                )
            ], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    ticks = signed_log_ticks(float(size.max()) or 1.0)
    figure.update_xaxes(title_text="contribution: what it writes (signed logarithm)", range=ends, **ticks)
    figure.update_yaxes(title_text="effect: what is lost without it (signed logarithm)", range=ends, **ticks)
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"})
    return figure


def _checked_position(position: int | None, n: int) -> int:
    at = -1 if position is None else position
    if not -n <= at < n:
        raise InputError(f"position {at} does not exist: the texts have {n} tokens")
    return at % n


def _hover(places: pd.DataFrame, tokens: list[str]) -> list[str]:
    return [
        f"block {layer}{'' if pd.isna(head) else f', head {head}'}<br>token {tokens[position]}<br>"
        f"position {position}<br>restored {restored:.3g}<br>estimate {estimate:.3g}<br>metric {shown_number(value)}"
        for layer, head, position, restored, estimate, value in zip(
            places.layer, places["head"], places.position, places.restored, places.estimate, places.value, strict=True
        )
    ]
