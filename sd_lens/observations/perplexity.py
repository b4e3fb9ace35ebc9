"""Perplexity: how well a model predicts texts, in windows that move along each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import logits_with_hooks
from sd_lens.observations.behaviour import next_token_loss, perplexity_of
from sd_lens.observations.texts import Batch, Texts, token_rows


@dataclass(frozen=True, eq=False)
class Perplexity:
    """How well a model predicts the tokens of a corpus.

    Attributes:
        loss: mean next-token loss, nats per token.
        n_predicted: how many tokens were predicted.
        n_texts: in how many texts.
        window: longest run of tokens that the model saw at once.
        stride: by how many tokens the window moves.
    """

    loss: float
    n_predicted: int
    n_texts: int
    window: int
    stride: int

    @property
    def value(self) -> float:
        """The perplexity: the exponential of the loss."""
        return perplexity_of(self.loss)

    def __str__(self) -> str:
        return (
            f"Perplexity {self.value:,.5g}: {self.loss:.4f} nats per token over {self.n_predicted} tokens of "
            f"{self.n_texts} texts (window {self.window}, stride {self.stride})"
        )

    __repr__ = __str__


def perplexity(
    model: Any,
    texts: Texts,
    *,
    window: int | None = None,
    stride: int | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Perplexity:
    """The perplexity of a model on texts, one window at a time.

    Each text is for itself: the window stands at its beginning, then moves by `stride` tokens until it reaches the end.
    In each place those tokens are predicted that were not before, every token but the first of a text once; where
    `stride` equals `window` (chunks, the default), also the first token of each chunk is not. To chunk a corpus
    as a whole, as is usual for WikiText, join its texts into one. Nothing is padded and nothing runs beside another
    window, since one step of tensor-wise quantization would be shared by both.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors, read once.
        window: longest run of tokens; `cfg.n_ctx` at most, and by default.
        stride: tokens that the window moves by, 1 to `window`; `window` by default.
        prepend_bos: put a beginning-of-sequence token in front of each text (not of each window); None for the
            model's habit.
        progress: show a progress bar.

    Raises:
        InputError: for a window or stride that cannot be used, or texts without any token to predict.
        NumericalError: if the loss is not finite.

    Example:
        >>> perplexity(model, default_texts(), progress=False)  # doctest: +SKIP
        Perplexity 52.706: 3.9647 nats per token over 4178 tokens of 40 texts (window 8192, stride 8192)
    """
    window = model.cfg.n_ctx if window is None else window
    stride = window if stride is None else stride
    if not 2 <= window <= model.cfg.n_ctx:
        raise InputError(f"window={window}: expected 2 to {model.cfg.n_ctx} tokens, the model's context")
    if not 1 <= stride <= window:
        raise InputError(f"stride={stride}: expected 1 to {window}, the window")
    total, n_predicted, n_texts = 0.0, 0, 0
    rows = token_rows(model, texts, prepend_bos=prepend_bos)
    n_known = len(texts) if isinstance(texts, list | tuple) else None
    for row in tqdm(rows, desc="perplexity", total=n_known, unit="text", disable=not progress, leave=False):
        for tokens, n_seen in windows(row, window, stride):
            loss, n = _loss(model, tokens, n_seen)
            if not math.isfinite(loss):
                raise NumericalError(f"the next-token loss of text {n_texts} is {loss}")
            total, n_predicted = total + loss, n_predicted + n
        n_texts += 1
    if n_predicted == 0:
        raise InputError("there is no token to predict: pass at least one text of two tokens")
    return Perplexity(total / n_predicted, n_predicted, n_texts, window, stride)


def windows(row: Int[Tensor, " pos"], window: int, stride: int) -> Iterator[tuple[Int[Tensor, " window"], int]]:
    """The windows of a text that predict something, each with how many of its tokens earlier ones have read."""
    read = 0
    for start in range(0, len(row), stride):
        tokens = row[start : start + window]
        end = start + len(tokens)
        if end > max(read, start + 1):
            yield tokens, max(read - start, 0)
        if end == len(row):
            return
        read = end


def _loss(model: Any, tokens: Int[Tensor, " pos"], n_seen: int) -> tuple[float, int]:
    """Summed loss of a window's tokens that were not seen, and their number."""
    logits = logits_with_hooks(model, tokens[None], {})
    first = max(n_seen - 1, 0)  # what stands here is not predicted, but predicts
    part = tokens[None, first:]
    return next_token_loss(logits[:, first:], Batch(part, torch.ones_like(part, dtype=torch.bool), 0, 0))
