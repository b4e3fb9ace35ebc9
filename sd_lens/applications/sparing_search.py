"""The search for blocks to spare: each `W_out` by itself, then one by one, beside what the weights forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.applications.quantization import RoundedGroup, check_bites, entered
from sd_lens.applications.rounding_forecast import forecast_rounding
from sd_lens.applications.schemes import W8A8, QuantizationScheme
from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import logits_with_hooks
from sd_lens.models.linear_layers import linear_groups
from sd_lens.observations.divergence import summed_divergence
from sd_lens.observations.texts import Texts, batches, token_rows


@dataclass(frozen=True, eq=False)
class SparingSearch:
    """What rounding each block's `W_out` costs, measured and forecast.

    Divergences are those of the next-token predictions from the full-precision model's, in nats per token.

    Attributes:
        table: layer; forecast, the relative error that the weights foretell (`forecast_rounding`); alone, the
            divergence where this `W_out` is the only thing that is rounded; forecast_rank and alone_rank, 1 for the
            largest.
        steps: n_spared, layer (the one added; <NA> in the first row), divergence: of the quantized model with the best
            block added to those that are spared, one by one.
        scheme: how everything was rounded.
        n_tokens: tokens measured.
    """

    table: pd.DataFrame = field(repr=False)
    steps: pd.DataFrame = field(repr=False)
    scheme: QuantizationScheme
    n_tokens: int

    @property
    def forecast_order(self) -> tuple[int, ...]:
        """The blocks as the weights rank them, those that suffer most first."""
        return tuple(self.table.sort_values("forecast_rank").layer.tolist())

    @property
    def measured_order(self) -> tuple[int, ...]:
        """The blocks as measured one at a time, those that suffer most first."""
        return tuple(self.table.sort_values("alone_rank").layer.tolist())

    @property
    def added(self) -> tuple[int, ...]:
        """The blocks in the order in which the search spared them."""
        return tuple(int(layer) for layer in self.steps.layer.dropna())

    @property
    def rank_correlation(self) -> float:
        """Spearman's, between forecast and measured ranks; NaN for fewer than two blocks."""
        return float(self.table.forecast_rank.corr(self.table.alone_rank))

    def agreement(self, n: int) -> float:
        """The share of the `n` blocks that suffer most which is also among the `n` that the weights name.

        Raises:
            InputError: if the model has not so many blocks.
        """
        if not 1 <= n <= len(self.table):
            raise InputError(f"n={n}: expected 1 to {len(self.table)}, the model's blocks")
        return len({*self.forecast_order[:n]} & {*self.measured_order[:n]}) / n

    def __str__(self) -> str:
        k = min(5, len(self.table))
        added = f"; one by one: {', '.join(map(str, self.added))}" if self.added else ""
        return (
            f"SparingSearch ({self.scheme}) on {self.n_tokens} tokens: rounding hurts most in blocks "
            f"{', '.join(map(str, self.measured_order[:k]))}; forecast {', '.join(map(str, self.forecast_order[:k]))} "
            f"(rank correlation {self.rank_correlation:.2f} over {len(self.table)} blocks){added}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block."""
        return self.table.copy()


def search_spared_layers(
    model: Any,
    texts: Texts,
    scheme: QuantizationScheme = W8A8,
    *,
    steps: int = 6,
    n_probes: int = 256,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SparingSearch:
    """Measure which `W_out` rounding hurts, beside what the weights foretell.

    First every block's `W_out` is the only layer that is rounded. Then all layers of the model are, and at each step
    the block is spared without which the divergence from the full-precision model is least. Each takes one run of the
    texts per block: a few short texts do. One text runs at a time, so that steps are not shared between texts. Needs
    memory for a second copy of the blocks' weights.

    Args:
        model: as for `quantize`.
        texts: a text; or any iterable of texts and token tensors. Their token ids are held in memory.
        scheme: bits, and which numbers share a step.
        steps: blocks to spare one by one; 0 to measure each alone only.
        n_probes: of `forecast_rounding`.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens.
        seed: of `forecast_rounding`.
        progress: show progress bars.

    Raises:
        InputError: for texts that cannot be used, a number of steps that the model has no blocks for, or a scheme
            without rounded activations.
        NotSupportedError: as `quantize`.
        NumericalError: if a prediction is not finite.
    """
    if not 0 <= steps <= model.cfg.n_layers:
        raise InputError(f"steps={steps}: expected 0 to {model.cfg.n_layers}, the model's blocks")
    foretold = forecast_rounding(model, scheme, n_probes=n_probes, seed=seed, progress=progress).table
    rows = list(token_rows(model, texts, prepend_bos=prepend_bos))
    groups = [RoundedGroup(group, scheme) for group in linear_groups(model)]
    neurons = {rounded.group.layer: rounded for rounded in groups if rounded.group.reads == "neurons"}
    others = [rounded for rounded in groups if rounded.group.reads != "neurons"]
    with entered(groups):
        check_bites(model, groups)
    measure = _Divergences(model, rows, max_length, progress)
    layers = list(neurons)
    alone = measure([[neurons[layer]] for layer in layers], "alone")
    added: list[tuple[int | None, float]] = []
    if steps:
        (everything,) = measure([groups], "all rounded")
        added.append((None, everything))
    for step in range(steps):
        spared = [layer for layer, _ in added]
        left = [layer for layer in layers if layer not in spared]
        candidates = [others + [neurons[other] for other in left if other != candidate] for candidate in left]
        found = measure(candidates, f"step {step + 1} of {steps}")
        best = min(range(len(left)), key=found.__getitem__)
        added.append((left[best], found[best]))
    table = pd.DataFrame({"layer": layers, "forecast": foretold.error, "alone": alone})
    for column in ("forecast", "alone"):
        table[f"{column}_rank"] = table[column].rank(ascending=False, method="first").astype(int)
    path = pd.DataFrame(added, columns=["layer", "divergence"])
    path.insert(0, "n_spared", range(len(path)))
    path["layer"] = path.layer.astype("Int64")
    return SparingSearch(table, path, scheme, measure.n_tokens)


class _Divergences:
    """Measures ways to round a model against full precision, text by text: memory does not grow with the texts."""

    def __init__(self, model: Any, rows: list[Tensor], max_length: int | None, progress: bool):
        self._model = model
        self._rows = rows
        self._max_length = max_length
        self._progress = progress
        self.n_tokens = 0

    def __call__(self, ways: Sequence[Sequence[RoundedGroup]], description: str) -> list[float]:
        """The divergence of each way, nats per token."""
        sums, n_tokens = torch.zeros(len(ways), dtype=torch.float64), 0
        with tqdm(total=len(self._rows) * len(ways), desc=description, disable=not self._progress, leave=False) as bar:
            for batch in batches(self._model, self._rows, max_length=self._max_length, batch_tokens=1, progress=False):
                n_tokens += batch.tokens.numel()
                reference = self._logits(batch.tokens)
                for number, way in enumerate(ways):
                    with entered(way):
                        divergence = summed_divergence(reference, self._logits(batch.tokens))
                    if not torch.isfinite(divergence):
                        raise NumericalError(f"the divergence of text {batch.first_text} is {float(divergence)}")
                    sums[number] += divergence
                    bar.update()
        self.n_tokens = n_tokens
        return (sums / n_tokens).tolist()

    def _logits(self, tokens: Tensor) -> Float[Tensor, "pos d_vocab"]:
        return logits_with_hooks(self._model, tokens, {})[0]
