"""What the weights alone say about norms, beside what was observed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from jaxtyping import Float64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.forecast import Forecast
from sd_lens.explanations.prediction import PredictedNorms
from sd_lens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    LAYER_AXIS,
    NORM_AXIS,
    VERMILION,
    base_figure,
    mark_layers,
    shown_number,
)


def forecast_norms(forecast: Forecast, observed: Float64[Tensor, " n_layers"] | None = None) -> go.Figure:
    """Norms on the initial path and ordinary norms, from the weights alone; with `observed`, those of a run.

    Args:
        forecast: its explosion and decay blocks are marked.
        observed: norms after every block of the model, such as `found.initial.median`.

    Raises:
        InputError: if `observed` has not one norm for each block.

    Source: Wang et al. 2025, section 4 (initial and non-initial paths).
    """
    n_layers = len(forecast.norms)
    if observed is not None and len(observed) != n_layers:
        raise InputError(f"expected {n_layers} norms, one per block; got {len(observed)}")
    figure = base_figure("Norms forecast from the weights alone", height=480)
    for name, norms, colour, dash in (
        ("observed", observed, GREEN, "solid"),
        ("forecast, initial path", forecast.norms, VERMILION, "dash"),
        ("forecast, ordinary norms", forecast.ordinary_norms, BLUE, "dot"),
    ):
        if norms is not None:
            _add_norms(figure, range(n_layers), norms.tolist(), name, colour, dash)
    _style_norm_axes(figure)
    mark_layers(figure, forecast.explosion_layers, forecast.decay_layers)
    return figure


def predicted_norms(
    predicted: PredictedNorms,
    observed: Float64[Tensor, " n_layers"] | None = None,
    *,
    explosion_layers: Iterable[int] = (),
    decay_layers: Iterable[int] = (),
) -> go.Figure:
    """Norms after the explosion, by the local linear picture and exactly, and the local eigenvalue of each block.

    Norms are on a logarithm, eigenvalues on the axis to the right.

    Args:
        predicted: of `predict_norms`.
        observed: norms after every block of the model, such as `found.initial.median`.
        explosion_layers: marked where they are drawn.
        decay_layers: marked where they are drawn.

    Raises:
        InputError: if `observed` has not one positive norm for each block.

    Source: Wang et al. 2025, section 3 (decay).
    """
    table = predicted.to_dataframe(observed)
    figure = base_figure("Norms after the explosion, predicted from the weights alone", height=520)
    for column, name, colour, dash in (
        ("observed", "observed", GREEN, "solid"),
        ("exact", "predicted, exact blocks", BLUE, "dot"),
        ("linear", "predicted, local linear picture", VERMILION, "dash"),
    ):
        if column in table:
            _add_norms(figure, predicted.layers, table[column].tolist(), name, colour, dash)
    behind = table.iloc[1:]
    figure.add_scatter(
        x=behind.layer.tolist(), y=behind.rate.tolist(), name="local eigenvalue", mode="markers", yaxis="y2",
        marker={"color": GREY, "symbol": "diamond-open", "size": 8},
        hovertemplate="block %{x}<br>local eigenvalue %{y:.3g}<extra></extra>",
    )  # fmt: skip
    _style_norm_axes(figure)
    lowest, highest = min(-1.0, *behind.rate), max(0.0, *behind.rate)
    figure.update_yaxes(dtick="D2")
    figure.update_layout(
        yaxis2={"title": {"text": "local eigenvalue"}, "overlaying": "y", "side": "right", "showgrid": False,
                "zeroline": False, "tickmode": "auto", "type": "linear",
                "range": [lowest - 0.05, highest + 0.4 * (highest - lowest)]},
        margin={"t": 130, "r": 70},
    )  # fmt: skip
    drawn = set(predicted.layers)
    mark_layers(
        figure,
        [layer for layer in explosion_layers if layer in drawn],
        [layer for layer in decay_layers if layer in drawn],
    )
    return figure


def _add_norms(
    figure: go.Figure, layers: Sequence[int], norms: Sequence[float], name: str, colour: str, dash: str
) -> None:
    """A curve; norms of 0 have no place on a logarithm."""
    shown = [norm if norm > 0 else None for norm in norms]
    figure.add_scatter(
        x=list(layers), y=shown, name=name, mode="lines+markers", line={"color": colour, "dash": dash},
        text=["" if norm is None else shown_number(norm) for norm in shown],
        hovertemplate=f"block %{{x}}<br>{name}: %{{text}}<extra></extra>",
    )  # fmt: skip


def _style_norm_axes(figure: go.Figure) -> None:
    figure.update_yaxes(title_text=NORM_AXIS, type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title_text=LAYER_AXIS)
    figure.update_layout(legend={"orientation": "h", "y": -0.18}, margin={"t": 110})
