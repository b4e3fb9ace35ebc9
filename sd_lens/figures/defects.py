"""Singular defects: angles to the empirical direction, singular values, their spectra and gaps."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import sample_colorscale
from torch import Tensor

from sd_lens.explanations.defects import SingularDefects
from sd_lens.explanations.spectra import SingularSpectra
from sd_lens.figures.style import BLUE, GREY, LAYER_AXIS, ORANGE, SEQUENTIAL, VERMILION, base_figure, mark_layers


def direction_angles(
    defects: SingularDefects,
    direction: Float[Tensor, " d_model"],
    *,
    explosion_layers: Iterable[int] = (),
    decay_layers: Iterable[int] = (),
) -> go.Figure:
    """Acute angle between each block's left singular direction and `direction`, in degrees.

    Source: the first figure of Wang et al. 2025 on the prediction of high-norm directions.
    """
    figure = base_figure("Angle between the singular direction of each block and the high-norm tokens", height=480)
    figure.add_scatter(
        x=list(defects.layers), y=defects.angles_to(direction).tolist(), mode="lines+markers", line={"color": BLUE},
        customdata=list(zip(defects.block.values.tolist(), defects.block.gap.tolist(), strict=True)),
        hovertemplate="block %{x}<br>angle %{y:.2f} degrees<br>singular value %{customdata[0]:,.5g}, "
        "gap %{customdata[1]:.3g}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.update_yaxes(title_text="acute angle (degrees)", range=[0, 92], dtick=15)
    figure.update_xaxes(title_text="block (0-based)")
    figure.update_layout(margin={"t": 110})
    mark_layers(figure, explosion_layers, decay_layers)
    return figure


def singular_values(defects: SingularDefects) -> go.Figure:
    """Leading singular values of block, MLP and attention (logarithmic), from the weights alone."""
    figure = base_figure("Leading singular values, from the weights alone", height=480)
    for name, triples, colour in (
        ("block L", defects.block, VERMILION), ("MLP F", defects.ffn, ORANGE), ("attention A", defects.attention, BLUE),
    ):  # fmt: skip
        figure.add_scatter(
            x=list(defects.layers), y=triples.values.tolist(), name=name, mode="lines+markers",
            line={"color": colour}, customdata=triples.gap.tolist(),
            hovertemplate=f"block %{{x}}<br>{name}: %{{y:,.5g}}<br>gap s1/s2 %{{customdata:.3g}}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=list(defects.layers), y=defects.block.gap.tolist(), name="gap s1/s2 of L", mode="lines",
        line={"color": GREY, "dash": "dot"}, hovertemplate="block %{x}<br>gap %{y:.3g}<extra></extra>",
    )  # fmt: skip
    _style_value_axes(figure)
    return figure


def singular_spectra(spectra: SingularSpectra) -> go.Figure:
    """The leading singular values of every block's L, and the gap between the first two (logarithmic).

    Source: Wang et al. 2025, section 3 (the leading singular value against the others).
    """
    figure = base_figure(f"The {spectra.values.shape[1]} leading singular values of every block", height=520)
    n_others = spectra.values.shape[1] - 1
    # Without the yellow end of the scale, which is faint on white.
    shades = sample_colorscale(SEQUENTIAL, [0.8 * i / max(n_others - 1, 1) for i in range(n_others)])
    for rank, colour in enumerate([VERMILION, *shades]):
        figure.add_scatter(
            x=list(spectra.layers), y=spectra.values[:, rank].tolist(), name=f"s{rank + 1}",
            mode="lines+markers" if rank == 0 else "lines", line={"color": colour, "width": 1 if rank else 2},
            hovertemplate=f"block %{{x}}<br>s{rank + 1}: %{{y:,.5g}}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=list(spectra.layers), y=spectra.gap.tolist(), name="gap s1/s2", mode="lines",
        line={"color": GREY, "dash": "dot"}, hovertemplate="block %{x}<br>gap %{y:.3g}<extra></extra>",
    )  # fmt: skip
    _style_value_axes(figure)
    return figure


def _style_value_axes(figure: go.Figure) -> None:
    figure.update_yaxes(title_text="singular value, and gap", type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title_text=LAYER_AXIS.split(";")[0] + ")")
    figure.update_layout(legend={"orientation": "h", "y": -0.18})
