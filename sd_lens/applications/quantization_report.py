"""What sparing buys: perplexity in full precision, rounded, and rounded but for a few `W_out`, with controls."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sd_lens.applications.quantization import quantize
from sd_lens.applications.schemes import W8A8, QuantizationScheme
from sd_lens.applications.smoothing import BEHIND_NORMS, smoothing_factors
from sd_lens.applications.spare_list import SpareList, spare_list
from sd_lens.applications.sparing import Spare, random_controls
from sd_lens.errors import InputError
from sd_lens.models.linear_layers import Reads
from sd_lens.observations.outliers import ActivationOutliers, activation_outliers
from sd_lens.observations.perplexity import Perplexity, perplexity
from sd_lens.observations.texts import Texts, token_rows

_SMOOTHED: dict[str, tuple[Reads, ...]] = {
    "SmoothQuant": BEHIND_NORMS,
    "SmoothQuant, W_out too": (*BEHIND_NORMS, "neurons"),
}

_SMALLEST_GAP = 0.01
"""Of the full-precision perplexity; what is less is noise, of which no share can be closed."""


@dataclass(frozen=True, eq=False)
class QuantizationReport:
    """Perplexities of a model under simulated quantization.

    Attributes:
        table: method, kind (full, rounded, spared, control, smoothed, both), layers (spared), perplexity, loss (nats
            per token), gap_closed (share of the gap between rounded and full perplexity; NaN where that is less than a
            hundredth of the full one), n_spared, n_parameters and parameter_share (spared weights, of all of the
            blocks' linear layers).
        spared: the modules that were spared.
        scheme: how everything else was rounded.
        outliers: of the inputs of `W_out`: why sparing helps.
        n_predicted: tokens that each perplexity is over.
    """

    table: pd.DataFrame = field(repr=False)
    spared: SpareList
    scheme: QuantizationScheme
    outliers: ActivationOutliers
    n_predicted: int

    @property
    def full_perplexity(self) -> float:
        """In full precision."""
        return self._of("full", "perplexity")

    @property
    def rounded_perplexity(self) -> float:
        """With every linear layer rounded."""
        return self._of("rounded", "perplexity")

    @property
    def spared_perplexity(self) -> float:
        """With every linear layer rounded but those that are spared."""
        return self._of("spared", "perplexity")

    @property
    def gap_closed(self) -> float:
        """The share of the gap that sparing closes; NaN where rounding costs next to nothing."""
        return self._of("spared", "gap_closed")

    @property
    def best_control(self) -> float:
        """The largest share of the gap that sparing as many other blocks closes; NaN without controls."""
        return self._of("control", "gap_closed")

    @property
    def best_smoothing(self) -> float:
        """The largest share of the gap that SmoothQuant closes by itself; NaN where it was not run."""
        return self._of("smoothed", "gap_closed")

    def __str__(self) -> str:
        closed = (
            ": there is no gap to close"
            if math.isnan(self.gap_closed)
            else f": {100 * self.gap_closed:.1f} % of the gap closed"
            + ("" if math.isnan(self.best_control) else f", other blocks at most {100 * self.best_control:.1f} %")
        )
        return (
            f"QuantizationReport ({self.scheme}): perplexity {self.full_perplexity:.4g} in full precision, "
            f"{self.rounded_perplexity:.4g} rounded, {self.spared_perplexity:.4g} with W_out of blocks "
            f"{self.spared.layers} spared{closed}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per method."""
        return self.table.copy()

    def _of(self, kind: str, column: str) -> float:
        return float(self.table[self.table.kind == kind][column].max())


def quantization_report(
    model: Any,
    texts: Texts,
    spare: Spare = "auto",
    *,
    scheme: QuantizationScheme = W8A8,
    n_controls: int = 3,
    alpha: float | None = 0.5,
    calibration: Texts | None = None,
    window: int | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> QuantizationReport:
    """Perplexities in full precision, rounded, and rounded but for some `W_out`, with controls and SmoothQuant.

    Args:
        model: as for `quantize`.
        texts: a text; or any iterable of texts and token tensors. Their token ids are held in memory, and run ten times
            or so.
        spare: as for `quantize`; at least one block.
        scheme: bits, and which numbers share a step.
        n_controls: random sets of as many blocks, none of them spared; fewer where the model has not so many.
        alpha: of SmoothQuant, which is tried behind norms (as published), with `W_out` as well, and (behind norms)
            together with sparing; None leaves it out.
        calibration: texts for SmoothQuant; `texts` by default, which flatters it.
        window: of `perplexity`, in chunks, which the calibration and the outliers are of as well.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        seed: of the controls.
        progress: show progress bars.

    Raises:
        InputError: for texts or blocks that cannot be used.
        NotSupportedError: as `quantize`.
        NumericalError: if a loss is not finite.

    Source: Wang et al. 2025, section 5.1 (quantization); Xiao et al. 2023 (SmoothQuant).
    """
    spared = spare_list(model, spare)
    if not spared.layers:
        raise InputError("spare is empty: name at least one block")
    if n_controls < 0:
        raise InputError(f"n_controls={n_controls}: expected 0 or more")
    rows = list(token_rows(model, texts, prepend_bos=prepend_bos))

    def measured() -> Perplexity:
        return perplexity(model, rows, window=window, progress=progress)

    found = [("full precision", "full", spare_list(model, ()), measured())]
    chunks = [chunk for row in rows if len(row) for chunk in row.split(window or model.cfg.n_ctx)]
    factors = {}
    if alpha is not None:
        for name, reads in _SMOOTHED.items():
            factors[name] = smoothing_factors(
                model, chunks if calibration is None else calibration, alpha,
                reads=reads, prepend_bos=prepend_bos, max_length=window, progress=progress,
            )  # fmt: skip

    def add(method: str, kind: str, layers: tuple[int, ...], smoothed: str | None = None) -> None:
        with quantize(model, layers, scheme=scheme, smoothing=None if smoothed is None else factors[smoothed]):
            found.append((method, kind, spare_list(model, layers), measured()))

    add("round to nearest", "rounded", ())
    add("spared", "spared", spared.layers)
    for number, control in enumerate(random_controls(model.cfg.n_layers, spared.layers, n_controls, seed)):
        add(f"control {number + 1}", "control", control)
    for name in factors:
        add(name, "smoothed", (), name)
    if factors:
        add("SmoothQuant and spared", "both", spared.layers, "SmoothQuant")
    outliers = activation_outliers(model, chunks, progress=progress)
    return QuantizationReport(_table(found), spared, scheme, outliers, found[0][3].n_predicted)


def _table(found: list[tuple[str, str, SpareList, Perplexity]]) -> pd.DataFrame:
    full, rounded = found[0][3].value, found[1][3].value
    gap = rounded - full if rounded > (1 + _SMALLEST_GAP) * full else math.nan
    return pd.DataFrame(
        [
            {
                "method": method, "kind": kind, "layers": spared.layers, "perplexity": measured.value,
                "loss": measured.loss, "gap_closed": (rounded - measured.value) / gap, "n_spared": len(spared.layers),
                "n_parameters": spared.n_parameters, "parameter_share": spared.parameter_share,
            }
            for method, kind, spared, measured in found
        ]
    )  # fmt: skip
