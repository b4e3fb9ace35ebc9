"""What the direction says as a signature, and which other models share a base with this one: sentences and a figure."""

from __future__ import annotations

import html
import math
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float64
from torch import Tensor

from sd_lens import figures
from sd_lens.applications.lineage import NOT_COMPARABLE, Lineage
from sd_lens.linear.largest_channels import channels_beyond_chance, n_largest

THIS_MODEL = "this model"

_RATE = 1e-3


def kinship_sentences(direction: Float64[Tensor, " d_model"] | None, kinship: Lineage | None) -> list[str]:
    """What chance would have to do, and a sentence for each model that `THIS_MODEL` is compared with; HTML-escaped."""
    sentences = [] if direction is None else [_signature(direction)]
    if kinship is not None:
        pairs = kinship.table[kinship.table["first"] == THIS_MODEL]
        sentences += [html.escape(_pair(pair), quote=False) for pair in pairs.itertuples()]
    return sentences


def kinship_figures(kinship: Lineage) -> list[tuple[str, go.Figure]]:
    """Captions and figures."""
    return [
        ("Fine-tunes of one base have nearly one direction; grey where there is none, or another width.",
         figures.lineage_heatmap(kinship)),
    ]  # fmt: skip


def _signature(direction: Float64[Tensor, " d_model"]) -> str:
    width = len(direction)
    channel = int(direction.abs().argmax())
    required = channels_beyond_chance(math.log10(_RATE), width)
    chance = (
        f"an unrelated model shares {required} or more of its {n_largest(width)} largest channels, with one relative "
        f"sign, at most once in {round(1 / _RATE):,} times"
        if required is not None
        else "the model is too narrow for its largest channels to tell it from unrelated ones"
    )
    share = 100 * float(direction[channel] ** 2)
    return f"As a signature: {share:.1f} % of the direction's square is channel {channel}; {chance}."


def _pair(pair: Any) -> str:
    if pair.verdict == NOT_COMPARABLE:
        return f"{pair.second} cannot be compared with this model: another width, or no high-norm tokens."
    chance = "likely by chance" if pair.log10_p > -1 else f"by chance once in 10^{-pair.log10_p:.1f}"
    spectra = (
        "their numbers of blocks differ"
        if math.isnan(pair.spectral_distance)
        else f"singular values differ by {100 * math.expm1(pair.spectral_distance):.2g} % at most"
    )
    return (
        f"{pair.second} is {pair.verdict}: its direction is {pair.angle:.2f} degrees away and shares {pair.shared} of "
        f"the largest channels ({chance}); {spectra}."
    )
