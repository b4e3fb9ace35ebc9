"""Norms of the residual stream over a corpus: one pass, bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sd_lens.errors import NumericalError
from sd_lens.models.hooks import residual_stream_points, run_with_hooks
from sd_lens.observations.histograms import NormHistogram
from sd_lens.observations.texts import Batch, Texts, batches, resolved_prepend_bos, token_strings

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""The levels of `NormScan.quantiles`."""


@dataclass(frozen=True, eq=False)
class TextNorms:
    """The norms of one text, every token and layer.

    Attributes:
        tokens: the tokens as they were run, the initial one first.
        norms: the residual stream's norm after each block.
    """

    tokens: tuple[str, ...]
    norms: Float64[Tensor, "layer pos"]


@dataclass(frozen=True, eq=False)
class NormScan:
    """Norms of the residual stream after each block (0-based), over a corpus.

    Attributes:
        n_texts: texts scanned.
        n_tokens: real tokens scanned.
        n_truncated: texts that were cut to the longest length allowed.
        prepend_bos: whether a beginning-of-sequence token was put in front.
        initial_tokens: the tokens at position 0 and how often each stood there, as they were run.
        maximum: largest norm per layer (exact).
        initial_median: median norm of the tokens at position 0, to 0.14 %.
        ordinary_median: median norm of all others.
        quantiles: of all tokens, at the levels `QUANTILES`, to 0.14 %.
        samples: the first texts in full.
    """

    n_texts: int
    n_tokens: int
    n_truncated: int
    prepend_bos: bool
    initial_tokens: dict[str, int]
    maximum: Float64[Tensor, " layer"]
    initial_median: Float64[Tensor, " layer"]
    ordinary_median: Float64[Tensor, " layer"]
    quantiles: Float64[Tensor, "layer level"]
    samples: tuple[TextNorms, ...]

    @property
    def median(self) -> Float64[Tensor, " layer"]:
        """Median norm of all tokens per layer."""
        return self.quantiles[:, QUANTILES.index(0.5)]

    def __str__(self) -> str:
        peak = int(self.maximum.argmax())
        return (
            f"NormScan: {self.n_tokens} tokens of {self.n_texts} texts; largest norm "
            f"{self.maximum[peak]:.5g} after block {peak}, median there {self.median[peak]:.4g}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: maximum, medians and quantiles of the norm."""
        columns = {
            "layer": range(len(self.maximum)),
            "maximum": self.maximum,
            "initial_median": self.initial_median,
            "ordinary_median": self.ordinary_median,
        } | {f"q{100 * level:g}": self.quantiles[:, i] for i, level in enumerate(QUANTILES)}
        return pd.DataFrame({name: list(map(float, values)) for name, values in columns.items()}).astype({"layer": int})


def scan_norms(
    model: Any,
    texts: Texts,
    *,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    keep_texts: int = 4,
    progress: bool = True,
) -> NormScan:
    """Norms of the residual stream after every block, over a corpus of any size.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors (`[pos]` or `[n, pos]`), read once.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens; `cfg.n_ctx` by default.
        batch_tokens: tokens run at a time: what bounds memory.
        keep_texts: how many of the first texts to keep in full.
        progress: show a progress bar.

    Raises:
        InputError: for texts that cannot be used.
        NumericalError: if the residual stream is not finite.

    Example:
        >>> scan_norms(model, ["The sea was calm."], progress=False)  # doctest: +SKIP
        NormScan: 5 tokens of 1 texts; largest norm 22712 after block 11, median there 165.3
    """
    scanner = NormScanner(model, keep_texts=keep_texts)
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="residual norms",
    ):  # fmt: skip
        scanner.scan(batch)
    return scanner.result(resolved_prepend_bos(model, prepend_bos))


class NormScanner:
    """Accumulates a `NormScan`, batch by batch; point 0 is the stream before block 0."""

    def __init__(self, model: Any, *, keep_texts: int):
        self.model = model
        self.points = residual_stream_points(model.cfg.n_layers)
        self.initial = NormHistogram(len(self.points))
        self.ordinary = NormHistogram(len(self.points))
        self._maximum = torch.zeros(len(self.points), dtype=torch.float64)
        self._initial_tokens: Counter[int] = Counter()
        self._samples: list[TextNorms] = []
        self._keep_texts = keep_texts
        self._n_texts = self._n_truncated = 0

    def scan(
        self,
        batch: Batch,
        on_states: Callable[[int, Float[Tensor, "n d_model"], Float64[Tensor, " n"]], None] | None = None,
    ) -> Float64[Tensor, "point n"]:
        """Run a batch; count its norms and return them, for its real tokens row by row.

        `on_states` is called with each point, the states there and their norms.
        """
        real = batch.real
        norms = torch.zeros(len(self.points), int(real.sum()), dtype=torch.float64)

        def observe(point: int, activation: Tensor) -> None:
            states = activation.detach()[real.to(activation.device)]
            norms[point] = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float64)
            if not torch.isfinite(norms[point]).all():
                raise NumericalError(not_finite(self.points[point], batch, activation.dtype))
            if on_states is not None:
                on_states(point, states, norms[point])

        run_with_hooks(
            self.model,
            batch.tokens,
            {name: partial(observe, point) for point, name in enumerate(self.points)},
        )
        self._count(batch, norms)
        return norms

    def _count(self, batch: Batch, norms: Float64[Tensor, "point n"]) -> None:
        is_initial = initial_positions(batch)
        for point in range(len(self.points)):
            self.initial.add(point, norms[point, is_initial])
            self.ordinary.add(point, norms[point, ~is_initial])
        self._maximum = torch.maximum(self._maximum, norms.max(dim=1).values)
        self._initial_tokens.update(batch.tokens[:, 0].tolist())
        self._n_texts += len(batch.tokens)
        self._n_truncated += batch.n_truncated
        lengths = batch.real.sum(dim=1).tolist()
        for row, part in zip(batch.tokens, norms.split(lengths, dim=1), strict=True):
            if len(self._samples) < self._keep_texts:
                tokens = token_strings(self.model, row[: part.shape[1]])
                self._samples.append(TextNorms(tuple(tokens), part[1:].clone()))

    def everything(self) -> NormHistogram:
        """Initial and other tokens together."""
        both = NormHistogram(len(self.points))
        both.counts = self.initial.counts + self.ordinary.counts
        return both

    def result(self, prepend_bos: bool) -> NormScan:
        """The scan so far."""
        everything = self.everything()
        ids = list(self._initial_tokens)
        names = token_strings(self.model, ids)
        initial_tokens: Counter[str] = Counter()
        for name, token_id in zip(names, ids, strict=True):
            initial_tokens[name] += self._initial_tokens[token_id]
        return NormScan(
            n_texts=self._n_texts,
            n_tokens=everything.total,
            n_truncated=self._n_truncated,
            prepend_bos=prepend_bos,
            initial_tokens=dict(initial_tokens.most_common()),
            maximum=self._maximum[1:],
            initial_median=self.initial.median()[1:],
            ordinary_median=self.ordinary.median()[1:],
            quantiles=everything.quantiles(torch.tensor(QUANTILES, dtype=torch.float64))[1:],
            samples=tuple(self._samples),
        )


def initial_positions(batch: Batch) -> Bool[Tensor, " n"]:
    """Which real tokens of a batch, row by row, stand at position 0."""
    return (torch.arange(batch.tokens.shape[1]) == 0).expand_as(batch.real)[batch.real]


def not_finite(point: str, batch: Batch, dtype: torch.dtype) -> str:
    """What is wrong where a batch's activations are NaN or inf, and what may help."""
    last = batch.first_text + len(batch.tokens) - 1
    advice = " (float16 ends at 65,504): load the model in float32 or bfloat16" if dtype == torch.float16 else ""
    return f"the activations are not finite at {point}, texts {batch.first_text} to {last}, in {dtype}{advice}"
