"""Outliers: how far the largest neuron of each MLP stands above the others, and at which token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import NumericalError
from sd_lens.models.blocks import wanted_blocks
from sd_lens.models.hooks import run_with_hooks
from sd_lens.observations.histograms import NormHistogram
from sd_lens.observations.linear_fits import real_rows
from sd_lens.observations.norms import not_finite
from sd_lens.observations.texts import Batch, Texts, batches, token_strings

SMALLEST = 1e-11
"""Medians below are 0 (the grid's lowest bin), as where relu silences most neurons."""


@dataclass(frozen=True, eq=False)
class ActivationOutliers:
    """The inputs of each block's `W_out` (`mlp.hook_post`) on a corpus: what tensor-wise quantization rounds.

    Attributes:
        table: layer; absmax, the largest absolute value; median, of the absolute values; ratio, of the two (inf where
            the median is 0); and where the largest was: neuron, text, position, token.
        n_tokens: real tokens run.
    """

    table: pd.DataFrame = field(repr=False)
    n_tokens: int

    def __str__(self) -> str:
        worst = self.table.iloc[int(self.table.ratio.argmax())]
        return (
            f"ActivationOutliers of {self.n_tokens} tokens: {worst.ratio:,.4g} times the median in block {worst.layer} "
            f"(neuron {worst.neuron}, token {worst.token!r}); half of the blocks stay below "
            f"{self.table.ratio.median():,.4g} times"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block."""
        return self.table.copy()


def activation_outliers(
    model: Any,
    texts: Texts,
    *,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> ActivationOutliers:
    """The largest and the median absolute input of each block's `W_out`, over a corpus in one pass.

    A step of tensor-wise quantization is the largest over 127: where the ratio of largest to median exceeds 254, more
    than half of the numbers are rounded to zero. Medians are read off a grid, exact to 0.14 %.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors, read once.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens.
        batch_tokens: tokens run at a time.
        progress: show a progress bar.

    Raises:
        InputError: for texts that cannot be used.
        NotSupportedError: for an architecture that is not covered.
        NumericalError: if an activation is not finite.
    """
    sums = [_LayerOutliers(block.layer) for block in wanted_blocks(model, None)]
    n_tokens = 0
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="outliers",
    ):  # fmt: skip
        run_with_hooks(model, batch.tokens, {layer.point: partial(layer.add, batch) for layer in sums})
        n_tokens += int(batch.real.sum())
    table = pd.DataFrame([layer.row() for layer in sums])
    token_id = table.pop("token_id")
    table["token"] = pd.Series(token_strings(model, token_id.tolist()), dtype="str")
    return ActivationOutliers(table, n_tokens)


class _LayerOutliers:
    """The neurons of one block, batch by batch."""

    def __init__(self, layer: int):
        self.layer = layer
        self.point = f"blocks.{layer}.mlp.hook_post"
        self._histogram = NormHistogram(1)
        self._largest = -1.0
        self._where: dict[str, int] = {}

    def add(self, batch: Batch, activation: Float[Tensor, "*batch_pos d_mlp"]) -> None:
        """Count the neurons of the batch's real tokens."""
        sizes = real_rows(activation.detach(), batch.real).abs()
        if not torch.isfinite(sizes).all():
            raise NumericalError(not_finite(self.point, batch, activation.dtype))
        self._histogram.add(0, sizes.flatten().double())
        largest = float(sizes.max())
        if largest > self._largest:
            row, neuron = divmod(int(sizes.argmax()), sizes.shape[1])
            text, position = batch.real.nonzero()[row].tolist()
            self._largest = largest
            self._where = {
                "neuron": neuron, "text": text + batch.first_text, "position": position,
                "token_id": int(batch.tokens[text, position]),
            }  # fmt: skip

    def row(self) -> dict[str, float | int]:
        """What was found."""
        median = float(self._histogram.median()[0])
        median = median if median > SMALLEST else 0.0
        ratio = self._largest / median if median else math.inf
        return {"layer": self.layer, "absmax": self._largest, "median": median, "ratio": ratio} | self._where
