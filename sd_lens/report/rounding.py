"""What quantization does to the model, and what sparing the blocks of the defect buys: sentences and figures."""

from __future__ import annotations

import html
import math

import plotly.graph_objects as go

from sd_lens import figures
from sd_lens.applications.quantization_report import QuantizationReport
from sd_lens.figures.style import shown_number
from sd_lens.observations.high_norm import HighNormTokens
from sd_lens.report.findings import named_blocks


def rounding_sentences(report: QuantizationReport | None) -> list[str]:
    """The findings, HTML-escaped; None is for a model in which no block is to be spared."""
    if report is None:
        return ["Quantization was not measured: no norm explodes or decays here, so there is nothing to spare."]
    sentences = [_sparing(report), _others(report), _outliers(report)]
    return [html.escape(sentence, quote=False) for sentence in sentences if sentence]


def rounding_figures(report: QuantizationReport, found: HighNormTokens) -> list[tuple[str, go.Figure]]:
    """Captions and figures."""
    return [
        (f"Simulated quantization ({report.scheme}), perplexity over {report.n_predicted:,} tokens.",
         figures.quantization_bars(report)),
        ("Above the line, one step for all inputs rounds more than half of them to zero.",
         figures.outlier_ratios(
             report.outliers, explosion_layers=found.explosion_layers, decay_layers=found.decay_layers
         )),
    ]  # fmt: skip


def _sparing(report: QuantizationReport) -> str:
    perplexities = (
        f"{shown_number(report.full_perplexity)} in full precision, {shown_number(report.rounded_perplexity)} with "
        f"every linear layer rounded, {shown_number(report.spared_perplexity)} with the W_out of "
        f"{named_blocks(report.spared.layers)} spared ({100 * report.spared.parameter_share:.2g} % of the weights)"
    )
    closed = (
        "rounding costs next to nothing"
        if math.isnan(report.gap_closed)
        else f"{100 * report.gap_closed:.0f} % of the gap closed"
    )
    return f"Quantization ({report.scheme}): perplexity {perplexities}: {closed}."


def _others(report: QuantizationReport) -> str:
    compared = [
        f"{what} {'closes' if share >= 0 else 'widens it by'} {100 * abs(share):.0f} %"
        for what, share in (
            ("sparing as many other blocks at best", report.best_control),
            ("SmoothQuant by itself", report.best_smoothing),
        )
        if not math.isnan(share)
    ]
    return f"For comparison, of the gap, {' and '.join(compared)}." if compared else ""


def _outliers(report: QuantizationReport) -> str:
    worst = report.outliers.table.sort_values("ratio", ascending=False).head(len(report.spared.layers))
    return (
        f"The inputs of W_out have the largest outliers in {named_blocks(sorted(worst.layer.tolist()))}, up to "
        f"{shown_number(float(worst.ratio.max()))} times the median."
    )
