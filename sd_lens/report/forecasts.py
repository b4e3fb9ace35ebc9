"""What the weights alone foretell, beside what the texts showed: sentences and figures of the report."""

from __future__ import annotations

import html
from dataclasses import dataclass

import plotly.graph_objects as go
from jaxtyping import Float64
from torch import Tensor

from sd_lens import figures
from sd_lens.explanations.decay import DefectEigenvalues
from sd_lens.explanations.forecast import Forecast
from sd_lens.explanations.prediction import PredictedNorms
from sd_lens.figures.style import shown_number
from sd_lens.linear.angles import acute_angles
from sd_lens.observations.high_norm import HighNormTokens
from sd_lens.report.findings import named_blocks, quoted

_MOST_TOKENS = 5


@dataclass(frozen=True, eq=False)
class Forecasts:
    """What a report has from the weights alone, singular defects apart.

    Attributes:
        forecast: of the model.
        predicted: norms behind the last explosion block of the forecast; None without one, or if it is the last block.
        eigenvalues: along the observed direction; None without one, or where they were not found.
        missing: why eigenvalues were not found; empty where nothing went wrong.
    """

    forecast: Forecast
    predicted: PredictedNorms | None
    eigenvalues: DefectEigenvalues | None
    missing: str = ""


def forecast_sentences(found: HighNormTokens, forecasts: Forecasts) -> list[str]:
    """The forecast against the observation, in reading order; HTML-escaped."""
    forecast = forecasts.forecast
    sentences = [_events(found, forecast), _norms(found, forecast), _tokens(forecast)]
    if forecasts.predicted is not None:
        sentences.append(_decay(forecasts.predicted, observed_norms(found)))
    if forecasts.missing:
        sentences.append(html.escape(f"There is no figure of eigenvalues: {forecasts.missing}.", quote=False))
    return [sentence for sentence in sentences if sentence]


def forecast_figures(found: HighNormTokens, forecasts: Forecasts) -> list[tuple[str, go.Figure]]:
    """Captions and figures; none where there is nothing to show."""
    shown: list[tuple[str, go.Figure]] = []
    forecast, observed = forecasts.forecast, observed_norms(found)
    beside = "" if observed is None else ", and the median of the initial high-norm tokens in the texts"
    if forecast.direction is not None:
        shown.append(
            ("Medians of random embeddings carried through the weights, as tokens that see only themselves (initial "
             f"path) and without attention (ordinary norms){beside}.",
             figures.forecast_norms(forecast, observed)),
        )  # fmt: skip
    if forecasts.predicted is not None:
        shown.append(
            ("A stream along the forecast direction, carried on from the last explosion block: by the blocks' tangents "
             f"at the direction and by the blocks themselves{beside}. Negative eigenvalues take the norm away.",
             figures.predicted_norms(
                 forecasts.predicted, observed,
                 explosion_layers=forecast.explosion_layers, decay_layers=forecasts.predicted.decay_layers,
             )),
        )  # fmt: skip
    if forecasts.eigenvalues is not None:
        shown.append(
            ("How each block's residual step R = L - I acts on the observed direction, by the Gaussian maps: the "
             "eigenvalue whose eigenvector is nearest. Where it is far from the direction, it says nothing about it; "
             "and under a gated MLP its sign can be wrong, unlike that of the local eigenvalues.",
             figures.eigenvalues(
                 forecasts.eigenvalues, explosion_layers=found.explosion_layers, decay_layers=found.decay_layers
             )),
        )  # fmt: skip
    return shown


def observed_norms(found: HighNormTokens) -> Float64[Tensor, " layer"] | None:
    """The median norm of the initial high-norm tokens after each block, None where there are none."""
    is_usable = found.initial.n_tokens and bool((found.initial.median > 0).all())
    return found.initial.median if is_usable else None


def _events(found: HighNormTokens, forecast: Forecast) -> str:
    if forecast.direction is None:
        other = (
            "; explosions that need a particular token, such as those observed, are not seen this way"
            if found.direction is not None
            else ""
        )
        return (
            "From the weights alone, without running text, no explosion is forecast: random embeddings that see only "
            f"themselves keep ordinary norms{other}."
        )
    return (
        "From the weights alone, without running text: the norm explodes in "
        f"{named_blocks(forecast.explosion_layers) or 'no single block'} and decays in "
        f"{named_blocks(forecast.decay_layers) or 'no single block'}; {_direction(found, forecast.direction)}."
    )


def _direction(found: HighNormTokens, direction: Float64[Tensor, " d_model"]) -> str:
    if found.direction is None:
        return "in the texts no high-norm tokens were observed"
    angle = float(acute_angles(direction[None], found.direction))
    turned = ", turned round" if float(direction @ found.direction) < 0 else ""
    return f"the forecast direction is {angle:.1f} degrees from the observed one{turned}"


def _norms(found: HighNormTokens, forecast: Forecast) -> str:
    observed = observed_norms(found)
    if forecast.direction is None or observed is None:
        return ""
    peak = int(forecast.norms.argmax())
    return (
        f"The largest norm of initial tokens is forecast after block {peak}, "
        f"{shown_number(float(forecast.norms[peak]))}, and observed after block {int(observed.argmax())}, "
        f"{shown_number(float(observed.max()))} (medians)."
    )


def _tokens(forecast: Forecast) -> str:
    trained = forecast.vocabulary[~forecast.vocabulary.untrained]
    first = trained.dropna(subset=["non_initial"]).nlargest(_MOST_TOKENS, "non_initial")
    if first.empty:
        return ""
    listed = ", ".join(
        f"{quoted(str(token))} ({score:.3g})"
        for token, score in zip(first.token, first.non_initial.tolist(), strict=True)
    )
    return (
        f"Of {len(trained):,} tokens with trained embeddings, those with the largest coefficient on the leading right "
        f"singular vector of block {forecast.score_layer}'s MLP, without attention, are {listed}."
    )


def _decay(predicted: PredictedNorms, observed: Float64[Tensor, " layer"] | None) -> str:
    decays = named_blocks(predicted.decay_layers) or "no block"
    sentence = (
        f"Carried on from block {predicted.layers[0]} along the forecast direction, with the norm forecast there, the "
        f"stream loses a third of its length or more in {decays}, by the blocks' tangents"
    )
    if observed is None:
        return f"{sentence}."
    table = predicted.to_dataframe(observed)
    errors = table.log_error.abs()
    worst = int(errors.argmax())
    return (
        f"{sentence}; the logarithm of its norm is off from the observed medians by {100 * errors[worst]:.1f} % "
        f"at most (after block {table.layer[worst]}: {shown_number(float(table.linear[worst]))} predicted, "
        f"{shown_number(float(table.observed[worst]))} observed)."
    )
