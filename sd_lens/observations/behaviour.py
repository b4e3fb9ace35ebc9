"""What ablations change: norms per layer, next-token loss and attention sinks, in one pass over a corpus."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import Callback, logits_with_hooks
from sd_lens.observations.attention import SINK_THRESHOLD, SinkSums
from sd_lens.observations.selection import Where, selected
from sd_lens.observations.texts import Batch, Texts, batches


@dataclass(frozen=True, eq=False)
class Behaviour:
    """How a model runs on a corpus; layer l is the residual stream after block l, 0-based.

    Attributes:
        n_tokens: real tokens run.
        watched_norm: mean norm of the watched tokens per layer.
        other_norm: mean norm of all others; NaN if there are none.
        maximum: largest norm per layer.
        loss: mean next-token loss, nats per token; NaN if no text has two tokens.
        sinks: mean attention that the first token receives from all later ones, per layer and head.
    """

    n_tokens: int
    watched_norm: Float64[Tensor, " layer"]
    other_norm: Float64[Tensor, " layer"]
    maximum: Float64[Tensor, " layer"]
    loss: float
    sinks: Float64[Tensor, "layer head"]

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; inf where float64 has no such number (from 709.8 nats on)."""
        return perplexity_of(self.loss)

    @property
    def sink_rate(self) -> float:
        """Share of all heads whose attention on the first token exceeds 0.3 on average."""
        return float((self.sinks > SINK_THRESHOLD).double().mean())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer."""
        return pd.DataFrame(
            {
                "layer": range(len(self.maximum)),
                "watched_norm": self.watched_norm.numpy(),
                "other_norm": self.other_norm.numpy(),
                "maximum": self.maximum.numpy(),
                "attention_on_first": self.sinks.mean(dim=1).numpy(),
            }
        )


class BehaviourSums:
    """Accumulates a `Behaviour`, batch by batch."""

    def __init__(self, model: Any, watch: Where):
        self.model = model
        self.watch = watch
        n_layers = model.cfg.n_layers
        self._norms = torch.zeros(2, n_layers, dtype=torch.float64)  # others, watched
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._maximum = torch.zeros(n_layers, dtype=torch.float64)
        self._sinks = SinkSums(n_layers)
        self._loss = torch.zeros((), dtype=torch.float64)
        self._n_predicted = 0

    def run(self, batch: Batch) -> None:
        """Run a batch and count it."""
        watched = selected(self.model, batch, self.watch)[batch.real]
        self._counts += torch.stack([(~watched).sum(), watched.sum()]).double()
        self._sinks.count(batch.real)
        callbacks: dict[str, Callback] = {}
        for layer in range(self.model.cfg.n_layers):
            callbacks[f"blocks.{layer}.attn.hook_pattern"] = partial(self._sinks.add, layer, batch.real)
            callbacks[f"blocks.{layer}.hook_resid_post"] = partial(self._add_norms, layer, batch, watched)
        logits = logits_with_hooks(self.model, batch.tokens, callbacks)
        loss, n = next_token_loss(logits, batch)
        if not math.isfinite(loss):
            last = batch.first_text + len(batch.tokens) - 1
            raise NumericalError(f"the next-token loss of texts {batch.first_text} to {last} is {loss}")
        self._loss += loss
        self._n_predicted += n

    def _add_norms(self, layer: int, batch: Batch, watched: Bool[Tensor, " n"], activation: Tensor) -> None:
        states = activation.detach()[batch.real.to(activation.device)]
        norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float64).cpu()
        if not torch.isfinite(norms).all():
            raise NumericalError(f"the residual stream after block {layer} is not finite in {activation.dtype}")
        self._norms[:, layer] += torch.stack([norms[~watched].sum(), norms[watched].sum()])
        self._maximum[layer] = torch.maximum(self._maximum[layer], norms.max())

    def result(self) -> Behaviour:
        """The behaviour so far."""
        if self._counts[1] == 0:
            raise InputError("the texts have none of the tokens to watch")
        other, watched = self._norms / self._counts[:, None]
        return Behaviour(
            n_tokens=int(self._counts.sum()),
            watched_norm=watched,
            other_norm=other,
            maximum=self._maximum,
            loss=float(self._loss) / self._n_predicted if self._n_predicted else math.nan,
            sinks=self._sinks.mean(),
        )


def observe_behaviour(
    model: Any,
    texts: Texts,
    watch: Where = 0,
    *,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Behaviour:
    """Norms per layer, next-token loss and attention sinks over a corpus, in one pass.

    Run it inside `ablated` to see what an ablation changes.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        texts: a text; or any iterable of texts and token tensors, read once.
        watch: the tokens whose norms are averaged apart from the others: a position (by default the initial one),
            tokens such as `[" the"]`, or a table with text and position such as `found.table`.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens.
        batch_tokens: tokens run at a time: bounds memory, most of which are logits.
        progress: show a progress bar.

    Raises:
        InputError: for texts that cannot be used, or without any token to watch.
        NumericalError: if the residual stream or the loss is not finite.
    """
    sums = BehaviourSums(model, watch)
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="behaviour",
    ):  # fmt: skip
        sums.run(batch)
    return sums.result()


def perplexity_of(loss: float) -> float:
    """The exponential of a loss in nats; inf where float64 has no such number (from 709.8 nats on)."""
    return math.inf if loss > math.log(sys.float_info.max) else math.exp(loss)


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> tuple[float, int]:
    """Summed loss of the batch's real next tokens, in nats, and their number; a text at a time, to bound memory."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for row, tokens, real in zip(logits, batch.tokens, batch.real, strict=True):
        length = int(real.sum())
        if length > 1:
            targets = tokens[1:length].to(row.device)
            losses = torch.nn.functional.cross_entropy(row[: length - 1].float(), targets, reduction="none")
            total += losses.double().sum().cpu()
            n += length - 1
    return float(total), n
