"""Eigenvalues along the defect direction, block by block."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

from sd_lens.explanations.decay import DefectEigenvalues
from sd_lens.figures.grids import signed_log, signed_log_ticks
from sd_lens.figures.style import BLUE, GREY, VERMILION, base_figure, mark_layers, shown_number


def eigenvalues(
    found: DefectEigenvalues, *, explosion_layers: Iterable[int] = (), decay_layers: Iterable[int] = ()
) -> go.Figure:
    """Eigenvalue of the eigenvector nearest to the direction, with its angle, and the Rayleigh quotient, per block.

    Values are on a signed logarithm, angles on the axis to the right.

    Source: the paper's figure on the decay of high norms (Wang et al. 2025).
    """
    figure = base_figure("Eigenvalues of the residual step along the direction", height=520)
    layers = list(found.layers)
    shown = (
        ("eigenvalue (real part)", found.eigenvalue.real, VERMILION, "solid"),
        ("Rayleigh quotient", found.rayleigh, BLUE, "dash"),
    )
    limit = max(1.0, *(float(values.abs().max()) for _, values, _, _ in shown))
    for name, values, colour, dash in shown:
        figure.add_scatter(
            x=layers, y=signed_log(values.numpy()).tolist(), name=name, mode="lines+markers",
            line={"color": colour, "dash": dash}, text=[shown_number(value) for value in values.tolist()],
            hovertemplate=f"block %{{x}}<br>{name} %{{text}}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=layers, y=found.angle.tolist(), name="angle of the eigenvector", mode="markers", yaxis="y2",
        marker={"color": GREY, "symbol": "diamond-open", "size": 8},
        hovertemplate="block %{x}<br>angle %{y:.1f} degrees<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(title_text="eigenvalue (signed logarithm)", **signed_log_ticks(limit))
    figure.update_xaxes(title_text="block (0-based)")
    figure.update_layout(
        yaxis2={"title": {"text": "angle (degrees)"}, "overlaying": "y", "side": "right", "range": [0, 92],
                "showgrid": False, "tickmode": "linear", "tick0": 0, "dtick": 15},
        legend={"orientation": "h", "y": -0.18}, margin={"t": 110, "r": 70},
    )  # fmt: skip
    mark_layers(figure, explosion_layers, decay_layers)
    return figure
