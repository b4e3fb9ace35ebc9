"""What the figures of components and places share: the grid, the signed logarithm, the token axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float64, Shaped

from sd_lens.figures.style import BLUE, VERMILION, base_figure, shown_number, shown_token

# Both ends are darker than the palette's blue and vermilion: lightness tells sizes apart without any colour vision.
DIVERGING = [[0.0, "#00304D"], [0.25, BLUE], [0.5, "#FFFFFF"], [0.75, VERMILION], [1.0, "#662200"]]
NO_CELL = "#D0D0D0"  # behind the cells: a white cell is a zero, a grey one was not measured
_GAP = 0.4  # between the heads and the MLP, in columns
_MOST_TOKEN_LABELS = 64
_MOST_HEAD_LABELS = 32

Ticks = dict[str, list[float] | list[str]]
"""`tickvals` and `ticktext`, as plotly's axes and colour bars take them."""


def signed_log(values: Float64[np.ndarray, "*shape"], unit: float = 1.0) -> Float64[np.ndarray, "*shape"]:
    """`sign(x) log10(1 + |x| / unit)`: logarithmic far above the unit, linear below it, and zero stays zero."""
    logarithm: np.ndarray = np.sign(values) * np.log1p(np.abs(values) / unit) / math.log(10)
    return logarithm


def signed_log_ticks(limit: float, unit: float = 1.0, shown: Callable[[float], str] = shown_number) -> Ticks:
    """Ticks from -limit to limit at powers of ten of the unit, labelled with the numbers themselves."""
    n_decades = math.floor(math.log10(limit / unit)) if limit >= unit else -1
    # On a long scale the unit is too close to zero for a label, and on a very long one every second power is enough;
    # a short scale needs steps between the powers.
    powers = range(1 if n_decades >= 3 else 0, n_decades + 1, 2 if n_decades > 6 else 1)
    steps = (1, 3) if n_decades < 2 else (1,)
    sizes = [size for power in powers for step in steps if (size := step * unit * 10.0**power) <= limit] or [limit]
    numbers = [*(-size for size in reversed(sizes)), 0.0, *sizes]
    return {"tickvals": signed_log(np.array(numbers), unit).tolist(), "ticktext": [shown(x) for x in numbers]}


def component_heatmap(
    title: str,
    table: pd.DataFrame,
    value: str,
    hover: Sequence[str],
    *,
    colour_title: str,
    unit: float = 1.0,
    shown: Callable[[float], str] = shown_number,
) -> go.Figure:
    """Blocks x (heads | MLP), coloured by the signed logarithm of a column; other components have no cell.

    Args:
        title: plain text.
        table: kind, layer, head and the value, one row a component.
        value: the column.
        hover: what to show when a component is pointed at, escaped.
        colour_title: what the colour is, in short lines.
        unit: below it the colour is linear.
        shown: a value as the text of a tick.
    """
    heads, mlps = table.kind == "head", table.kind == "mlp"
    n_rows = int(table["layer"][heads | mlps].max()) + 1
    n_heads = int(table["head"][heads].max()) + 1 if heads.any() else 0
    cells, texts = np.full((n_rows, n_heads + 2), np.nan), np.full((n_rows, n_heads + 2), "", dtype=object)
    for where, columns in ((heads, table["head"][heads]), (mlps, n_heads + 1)):
        place = (table["layer"][where].to_numpy(dtype="int64"), np.asarray(columns, dtype="int64"))
        cells[place] = table[value][where].to_numpy(dtype="float64")
        texts[place] = np.array(hover, dtype=object)[where.to_numpy()]
    figure = base_figure(title, height=max(360, 170 + 16 * n_rows))
    limit = float(np.nanmax(np.abs(cells))) or unit
    ticks = signed_log_ticks(limit, unit, shown)
    edges = [i - 0.5 for i in range(n_heads + 1)] + [n_heads - 0.5 + _GAP, n_heads + 0.5 + _GAP]
    draw_cells(figure, signed_log(cells, unit), texts, edges, signed_log(np.array([limit]), unit).item(), ticks)
    figure.update_layout(coloraxis_colorbar_title_text=colour_title)
    figure.add_vrect(x0=edges[-3], x1=edges[-2], fillcolor="white", line_width=0, layer="above")
    labelled = range(0, n_heads, math.ceil(n_heads / _MOST_HEAD_LABELS) or 1)
    figure.update_xaxes(
        title_text="head (0-based), and MLP", tickvals=[*labelled, n_heads + _GAP],
        ticktext=[*map(str, labelled), "MLP"],
    )  # fmt: skip
    return figure


def draw_cells(
    figure: go.Figure,
    cells: Float64[np.ndarray, "layer column"],
    hover: Shaped[np.ndarray, "layer column"],
    edges: Sequence[float],
    limit: float,
    ticks: Ticks,
) -> None:
    """Cells between the edges, blocks upwards, coloured from -limit to limit; NaN: no cell, and nothing to point at."""
    figure.add_heatmap(
        z=cells, x=list(edges), customdata=hover, hovertemplate="%{customdata}<extra></extra>", hoverongaps=False,
        coloraxis="coloraxis", xgap=1, ygap=1,
    )  # fmt: skip
    bar = {"title": {"side": "top"}, **ticks, "tickfont": {"size": 11}, "thickness": 16}
    figure.update_layout(
        plot_bgcolor=NO_CELL, coloraxis={"colorscale": DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar}
    )
    n_rows = len(cells)
    figure.update_xaxes(showgrid=False, zeroline=False, range=[edges[0], edges[-1]])
    figure.update_yaxes(
        title_text="block (0-based)", showgrid=False, zeroline=False, range=[-0.5, n_rows - 0.5],
        tick0=0, dtick=math.ceil(n_rows / 32),
    )  # fmt: skip


def token_axis(figure: go.Figure, labels: Sequence[str]) -> None:
    """Positions named by escaped tokens, as long as there is room for names."""
    figure.update_xaxes(title_text="position of the token")
    if len(labels) <= _MOST_TOKEN_LABELS:
        figure.update_xaxes(
            title_text="token", tickvals=list(range(len(labels))), ticktext=list(labels), tickangle=-55,
            tickfont={"size": 11},
        )  # fmt: skip


def shown_share(share: float) -> str:
    """A share as a percentage for reading: `99.7 %`."""
    return "undefined" if math.isnan(share) else f"{100 * share:.3g} %"


def short_share(share: float) -> str:
    """A share in the little room above a bar: `99.8 %`; nothing for what rounds to nothing."""
    return f"{100 * share:.1f} %" if abs(share) >= 0.0005 else ""


def shown_pair(clean: str, corrupted: str) -> str:
    """A token that two texts share, or both tokens, escaped."""
    return shown_token(clean) if clean == corrupted else f"{shown_token(clean)}/{shown_token(corrupted)}"
