"""The main job in one call: observe, predict, and write the page."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sd_lens import figures
from sd_lens.applications.lineage import Lineage, lineage
from sd_lens.applications.quantization_report import QuantizationReport, quantization_report
from sd_lens.applications.signatures import Signature, signature
from sd_lens.errors import InputError, NumericalError
from sd_lens.explanations.contexts import explosion_in_context
from sd_lens.explanations.decay import defect_eigenvalues
from sd_lens.explanations.defects import SingularDefects, singular_defects
from sd_lens.explanations.explosion import explosion_path
from sd_lens.explanations.forecast import Forecast, forecast
from sd_lens.explanations.origins import NormOrigin, norm_origins
from sd_lens.explanations.prediction import PredictedNorms, predict_norms
from sd_lens.explanations.sinks import sinks_without
from sd_lens.explanations.spectra import SingularSpectra, singular_spectra
from sd_lens.explanations.subspace import explosion_subspace
from sd_lens.explanations.super_weights import SuperWeights, super_weights
from sd_lens.observations.high_norm import HighNormTokens, find_high_norm_tokens
from sd_lens.observations.massive import massive_activations
from sd_lens.observations.texts import Texts, default_texts, resolved_prepend_bos, token_rows
from sd_lens.report.explosions import Explosion, explosion_figures, explosion_sentences
from sd_lens.report.findings import findings
from sd_lens.report.forecasts import Forecasts, forecast_figures, forecast_sentences
from sd_lens.report.kinship import THIS_MODEL, kinship_figures, kinship_sentences
from sd_lens.report.origins import origin_figures, origin_sentences
from sd_lens.report.page import Page
from sd_lens.report.rounding import rounding_figures, rounding_sentences
from sd_lens.report.traces import Traces, trace_figures, trace_sentences
from sd_lens.storage import written_whole

_TEXTS_TO_EXPLAIN = 16
"""Attribution, ablation and paths look at so many of the first texts."""

_TEXTS_TO_ZERO = 4
"""Single neurons and weights are zeroed in so many texts."""

_TOKENS_TO_FOLLOW = 2048
"""So many tokens of the vocabulary, drawn at random, are followed along the paths of an explosion."""


def write_report(
    model: Any,
    path: str | Path,
    texts: Texts | None = None,
    *,
    prepend_bos: bool | None = None,
    threshold: float | Literal["auto"] = "auto",
    max_length: int | None = None,
    quantize: bool = False,
    compare: Mapping[str, Signature] | None = None,
    texts_name: str | None = None,
    progress: bool = True,
) -> list[str]:
    """Write one self-contained HTML file about a model's high-norm tokens, and return its sentences.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        path: of the HTML file; it is written whole or not at all.
        texts: what to run; the package's default passages if None.
        prepend_bos: as for `find_high_norm_tokens`.
        threshold: as for `find_high_norm_tokens`.
        max_length: as for `find_high_norm_tokens`.
        quantize: also measure what simulated quantization (W8A8) does to the perplexity of the first texts, and what
            sparing the `W_out` of explosion and decay blocks buys; some ten more runs of them.
        compare: signatures of other models, by name: which of them share a base with this one (`lineage`)?
        texts_name: how the page calls the texts.
        progress: show progress bars.

    Raises:
        InputError: if texts or path cannot be used.
        NotSupportedError: for an architecture that is not covered.
        NumericalError: if the model's weights or residual stream are not finite.
    """
    if compare and THIS_MODEL in compare:
        raise InputError(f"no other model can be called {THIS_MODEL!r} here: give its signature another name")
    with written_whole(path) as temporary:
        defects = singular_defects(model, progress=progress)
        rows = token_rows(model, default_texts() if texts is None else texts, prepend_bos=prepend_bos)
        first: list[Tensor] = []
        found = find_high_norm_tokens(
            model, _remembered(rows, first, min(max_length or model.cfg.n_ctx, model.cfg.n_ctx)), threshold,
            prepend_bos=resolved_prepend_bos(model, prepend_bos), max_length=max_length, progress=progress,
        )  # fmt: skip
        spectra = singular_spectra(model, k=min(8, model.cfg.d_model), progress=progress)
        forecasts = _forecasts(model, found, progress)
        explosions = _explosions(model, found, first, progress)
        origins = norm_origins(model, found, first, progress=progress)
        traces = _traces(model, found, first, progress)
        kinship = _kinship(model, found, compare, progress) if compare else None
        rounding = _rounding(model, found, first, progress) if quantize else None
        sentences = [
            *findings(found, defects), *forecast_sentences(found, forecasts), *explosion_sentences(explosions),
            *origin_sentences(origins), *([] if traces is None else trace_sentences(traces)),
            *kinship_sentences(found.direction, kinship), *(rounding_sentences(rounding) if quantize else []),
        ]  # fmt: skip
        settings = _settings(model, found, defects, threshold)
        settings["texts"] = texts_name or ("the package's default passages" if texts is None else "given")
        page = Page(
            title=f"High-norm tokens of {defects.model_name}",
            subtitle=f"{model.cfg.n_layers} blocks, numbered from 0; width {model.cfg.d_model}. "
            "Norms are Euclidean norms of the residual stream after a block.",
            findings=sentences,
            figures=[
                *_figures(found, defects, spectra, forecasts, explosions, origins, traces),
                *([] if kinship is None else kinship_figures(kinship)),
                *([] if rounding is None else rounding_figures(rounding, found)),
            ],
            tokens=found.table,
            settings=settings,
        )
        temporary.write_text(page.to_html(), encoding="utf-8")
    return sentences


def _remembered(
    rows: Iterator[Int[Tensor, " pos"]], first: list[Tensor], longest: int
) -> Iterator[Int[Tensor, " pos"]]:
    """The same rows; the first of them stay in `first`, for a corpus can be read only once."""
    for row in rows:
        if len(first) < _TEXTS_TO_EXPLAIN:
            first.append(row[:longest])
        yield row


def _forecasts(model: Any, found: HighNormTokens, progress: bool) -> Forecasts:
    foretold = forecast(model, progress=progress)
    predicted = _behind_explosion(model, foretold, progress)
    if found.direction is None:
        return Forecasts(foretold, predicted, None)
    try:
        eigenvalues = defect_eigenvalues(model, found.direction, progress=progress)
    except NumericalError as error:  # an iteration that does not converge: the rest of the report stands without it
        return Forecasts(foretold, predicted, None, str(error))
    return Forecasts(foretold, predicted, eigenvalues)


def _behind_explosion(model: Any, foretold: Forecast, progress: bool) -> PredictedNorms | None:
    """Norms behind the forecast's last explosion that has blocks behind it."""
    explosions = [layer for layer in foretold.explosion_layers if layer < model.cfg.n_layers - 1]
    if foretold.direction is None or not explosions:
        return None
    norm = float(foretold.norms[explosions[-1]])
    return predict_norms(model, foretold.direction, norm, explosions[-1], progress=progress)


def _explosions(model: Any, found: HighNormTokens, first: Sequence[Tensor], progress: bool) -> list[Explosion]:
    """How each observed explosion comes about, for tokens drawn from the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(model.cfg.d_vocab, generator=generator)[:_TOKENS_TO_FOLLOW]
    explosions = []
    for layer in found.explosion_layers:
        subspace = explosion_subspace(model, layer, token_ids=ids, progress=progress)
        try:
            path = explosion_path(model, layer, token_ids=ids, progress=progress)
        except InputError as error:  # an explosion that needs a context: no lone token has it
            explosions.append(Explosion(layer, subspace, None, None, str(error)))
            continue
        context = explosion_in_context(model, path, first, progress=progress)
        explosions.append(Explosion(layer, subspace, path, context))
    return explosions


def _traces(model: Any, found: HighNormTokens, first: Sequence[Tensor], progress: bool) -> Traces | None:
    """Sinks, massive activations and super weights in the first texts; None where nothing explodes."""
    if found.direction is None or not found.explosion_layers:
        return None
    rows = list(first)
    supers = [_super_weights(model, found, rows[:_TEXTS_TO_ZERO], layer, progress) for layer in found.explosion_layers]
    return Traces(
        sinks=sinks_without(model, rows, found.explosion_layers, found.direction, progress=progress),
        explosion_layers=found.explosion_layers,
        massive=massive_activations(model, rows, progress=progress),
        super_weights=[each for each in supers if each is not None],
    )


def _kinship(model: Any, found: HighNormTokens, others: Mapping[str, Signature], progress: bool) -> Lineage:
    """The model among others, by its direction as observed."""
    return lineage({THIS_MODEL: signature(model, found, progress=progress), **others})


def _rounding(model: Any, found: HighNormTokens, first: Sequence[Tensor], progress: bool) -> QuantizationReport | None:
    """Perplexities of the first texts under quantization; None where there is nothing to spare."""
    if not (found.explosion_layers or found.decay_layers):
        return None
    return quantization_report(model, list(first), found, progress=progress)


def _super_weights(
    model: Any, found: HighNormTokens, rows: list[Tensor], layer: int, progress: bool
) -> SuperWeights | None:
    """Of the tokens in some texts that explode in a block, initial ones if they do; None without any."""
    initial = layer in found.initial.explosion_layers
    table = found.table[(found.table.layer == layer) & (found.table.text < len(rows))]
    tokens = table[(table.position == 0) == initial]
    if tokens.empty:
        return None
    return super_weights(model, rows, layer, tokens, neurons=1, entries=1, progress=progress)


def _figures(
    found: HighNormTokens,
    defects: SingularDefects,
    spectra: SingularSpectra,
    forecasts: Forecasts,
    explosions: Sequence[Explosion],
    origins: Sequence[NormOrigin],
    traces: Traces | None,
) -> Sequence[tuple[str, Any]]:
    shown = [
        ("Largest and median norms per block. Dashes: the threshold above which a norm counts as high.",
         figures.layer_norms(found)),
        ("Leading singular values of each block's linear map L = (I + F)(I + A), and of its parts.",
         figures.singular_values(defects)),
        ("Where the first value stands above the others, the block has a direction of its own.",
         figures.singular_spectra(spectra)),
    ]  # fmt: skip
    if found.direction is not None:
        angles = figures.direction_angles(
            defects,
            found.direction,
            explosion_layers=found.explosion_layers,
            decay_layers=found.decay_layers,
        )
        shown.insert(1, ("Small angles: the weights alone predict the direction of the high-norm tokens.", angles))
    shown += forecast_figures(found, forecasts)
    shown += explosion_figures(explosions)
    shown += origin_figures(origins)
    shown += [] if traces is None else trace_figures(traces)
    for text in found.scan.samples[:1]:
        shown += [
            ("The first text: every token, every block. Turn it with the mouse.", figures.norm_surface(text)),
            ("The same as a heatmap; point at a cell to see the token.", figures.norm_heatmap(text)),
        ]
    return shown


def _settings(
    model: Any, found: HighNormTokens, defects: SingularDefects, threshold: float | Literal["auto"]
) -> dict[str, str]:
    packages = ("sd_lens", "transformer-lens", "transformers", "torch", "plotly")
    return {
        "model": defects.model_name,
        "wrapper": f"{type(model).__name__}, {model.cfg.dtype}, {model.cfg.device}",
        "threshold": str(threshold),
        "beginning-of-sequence token": "prepended" if found.scan.prepend_bos else "not prepended",
        "linearization": f"{defects.linearization}, {defects.convention}",
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }
