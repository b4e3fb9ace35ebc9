"""Attention sinks beside norms: what keys receive, and how long the keys and values of high-norm tokens are."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import Callback, run_with_hooks
from sd_lens.observations.attention import SINK_THRESHOLD, received_attention
from sd_lens.observations.norms import not_finite
from sd_lens.observations.selection import Where, selected
from sd_lens.observations.texts import Batch, Texts, batches


@dataclass(frozen=True, eq=False)
class AttentionSinks:
    """What keys receive from the queries behind them, and the norms of keys and values; blocks are 0-based.

    Norms are those of `hook_k` and `hook_v`, means over tokens. Rotary embeddings do not change the norm of a key; a
    norm on keys (Qwen 3, Gemma 3) acts behind `hook_k` and is not in them.

    Attributes:
        n_texts: inputs run.
        n_tokens: their real tokens.
        n_watched: how many of these are watched.
        received: mean attention that the key at a position receives from a later query; NaN where there is none.
        sink_texts: share of the texts (of two tokens or more) in which the first key receives more than 0.3 on average,
            counting what the first query pays to itself.
        watched_received: mean attention that a watched token receives from a later query; NaN if none is later.
        other_received: the same of all other tokens.
        watched_key_norm: mean norm of the keys of watched tokens.
        other_key_norm: of all others; NaN if there are none.
        watched_value_norm: mean norm of the values of watched tokens.
        other_value_norm: of all others; NaN if there are none.
    """

    n_texts: int
    n_tokens: int
    n_watched: int
    received: Float64[Tensor, "layer head pos"] = field(repr=False)
    sink_texts: Float64[Tensor, "layer head"]
    watched_received: Float64[Tensor, "layer head"]
    other_received: Float64[Tensor, "layer head"]
    watched_key_norm: Float64[Tensor, "layer kv_head"]
    other_key_norm: Float64[Tensor, "layer kv_head"]
    watched_value_norm: Float64[Tensor, "layer kv_head"]
    other_value_norm: Float64[Tensor, "layer kv_head"]

    @property
    def on_first(self) -> Float64[Tensor, "layer head"]:
        """Mean attention on the first key."""
        return self.received[:, :, 0]

    @property
    def sink_rate(self) -> float:
        """Share of all heads that pay more than 0.3 of their attention to the first key."""
        return float((self.on_first > SINK_THRESHOLD).double().mean())

    @property
    def published_sink_rate(self) -> float:
        """The sink rate as Gu et al. 2024 compute it, threshold applied text by text: the mean of `sink_texts`."""
        return float(self.sink_texts.mean())

    @property
    def sink_rates(self) -> Float64[Tensor, " pos"]:
        """The same for the key at every position; NaN at the last, which no later query sees."""
        rates = (self.received > SINK_THRESHOLD).double().mean(dim=(0, 1))
        return torch.where(self.received.isnan().any(dim=1).any(dim=0), torch.nan, rates)

    @property
    def watched_sink_rate(self) -> float:
        """Share of all heads of which a watched token receives more than 0.3 on average."""
        return float((self.watched_received > SINK_THRESHOLD).double().mean())

    def __str__(self) -> str:
        keys = (self.watched_key_norm / self.other_key_norm).median()
        values = (self.watched_value_norm / self.other_value_norm).median()
        return (
            f"AttentionSinks: {100 * self.sink_rate:.1f} % of {self.on_first.numel()} heads have a sink on the first "
            f"key (mean attention {self.on_first.mean():.3f}); a watched token ({self.n_watched} of {self.n_tokens}) "
            f"receives {self.watched_received.mean():.3f} of a later query, another {self.other_received.mean():.3f}; "
            f"its keys are {keys:.3g} times as long as others', its values {values:.3g} times (medians)"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and head; the norms are those of the key-value head that it reads."""
        n_layers, n_heads = self.on_first.shape
        of_kv = torch.arange(n_heads) // (n_heads // self.watched_key_norm.shape[1])
        columns = {
            "on_first": self.on_first,
            "sink_texts": self.sink_texts,
            "watched_received": self.watched_received,
            "other_received": self.other_received,
            "watched_key_norm": self.watched_key_norm[:, of_kv],
            "other_key_norm": self.other_key_norm[:, of_kv],
            "watched_value_norm": self.watched_value_norm[:, of_kv],
            "other_value_norm": self.other_value_norm[:, of_kv],
        }
        places = pd.MultiIndex.from_product([range(n_layers), range(n_heads)], names=["layer", "head"])
        table = places.to_frame(index=False).assign(sink=(self.on_first > SINK_THRESHOLD).flatten().numpy())
        return table.assign(**{name: values.flatten().numpy() for name, values in columns.items()})

    def by_layer(self) -> pd.DataFrame:
        """One row per layer: the sink rate (`sink`) and the means over heads of everything else."""
        return self.to_dataframe().drop(columns="head").groupby("layer", as_index=False).mean()


def attention_sinks(
    model: Any,
    texts: Texts,
    watch: Where = 0,
    *,
    max_length: int = 64,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> AttentionSinks:
    """Attention received per key, and key and value norms, of every head over a corpus, in one pass.

    A query's attention on itself is left out, and means are over all texts before they are compared with 0.3, but in
    `sink_texts` and `published_sink_rate`.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors, read once.
        watch: the tokens that are told from the others, which need not stand first: a position (by default the
            initial one), tokens such as `[" the"]`, or a table with text and position such as `found.table`.
        max_length: cut texts to so many tokens. Attention on one key falls with the number of others, so rates of
            different lengths do not compare; 64 is the reference's.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        batch_tokens: tokens run at a time: bounds memory, most of which are attention patterns.
        progress: show a progress bar.

    Raises:
        InputError: for texts that cannot be used, that all have a single token, or that have none of the tokens to
            watch.
        NumericalError: if attention, keys or values are not finite.

    Source: Gu et al. 2024 (sink rate: threshold 0.3, inputs of 64 tokens).
    """
    sums = _Sums(model, watch)
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="attention sinks",
    ):  # fmt: skip
        sums.run(batch)
    return sums.result()


class _Sums:
    """Accumulates `AttentionSinks`, batch by batch; pairs are of a key and a real query behind it."""

    def __init__(self, model: Any, watch: Where):
        self.model = model
        self.watch = watch
        self._n_texts = self._n_long = 0
        self._tokens = torch.zeros(2, dtype=torch.float64)  # others, watched
        self._pairs = torch.zeros(2, dtype=torch.float64)
        self._pairs_at = torch.zeros(0, dtype=torch.float64)  # per position
        self._totals: dict[tuple[str, int], Tensor] = {}

    def run(self, batch: Batch) -> None:
        """Run a batch and count it."""
        watched = selected(self.model, batch, self.watch)
        groups = torch.stack([batch.real & ~watched, watched])
        later = (batch.real.sum(dim=1, keepdim=True) - 1 - torch.arange(batch.real.shape[1])).clamp_min(0)
        self._n_texts += len(batch.tokens)
        self._n_long += int((batch.real.sum(dim=1) > 1).sum())
        self._tokens += groups.sum(dim=(1, 2))
        self._pairs += (groups * later).sum(dim=(1, 2))
        self._pairs_at = _added(self._pairs_at, later.sum(dim=0).double())
        callbacks: dict[str, Callback] = {}
        for layer in range(self.model.cfg.n_layers):
            attn = f"blocks.{layer}.attn"
            callbacks[f"{attn}.hook_pattern"] = partial(self._add_pattern, layer, batch, groups)
            for name in ("hook_k", "hook_v"):
                callbacks[f"{attn}.{name}"] = partial(self._add_norms, f"{attn}.{name}", layer, batch, groups)
        run_with_hooks(self.model, batch.tokens, callbacks)

    def _add_pattern(
        self,
        layer: int,
        batch: Batch,
        groups: Bool[Tensor, "group batch pos"],
        pattern: Float[Tensor, "batch head query pos"],
    ) -> None:
        received = received_attention(pattern, batch.real)
        self._check(received, f"blocks.{layer}.attn.hook_pattern", batch, pattern.dtype)
        self._add("at", layer, received.sum(dim=0))
        lengths = batch.real.sum(dim=1)[:, None]
        on_first = (received[:, :, 0] + pattern[:, :, 0, 0].detach().double().cpu()) / lengths
        self._add("texts", layer, ((on_first > SINK_THRESHOLD) & (lengths > 1)).sum(dim=0).double())
        self._add("groups", layer, torch.einsum("bhk,gbk->gh", received, groups.double()))

    def _add_norms(
        self,
        point: str,
        layer: int,
        batch: Batch,
        groups: Bool[Tensor, "group batch pos"],
        activation: Float[Tensor, "batch pos kv_head d_head"],
    ) -> None:
        norms = torch.linalg.vector_norm(activation.detach(), dim=-1, dtype=torch.float64).cpu()
        norms = norms.where(batch.real[..., None], 0.0)
        self._check(norms, point, batch, activation.dtype)
        self._add(point[-1], layer, torch.einsum("bpn,gbp->gn", norms, groups.double()))

    def _add(self, name: str, layer: int, new: Tensor) -> None:
        before = self._totals.get((name, layer))
        self._totals[name, layer] = new if before is None else _added(before, new)

    @staticmethod
    def _check(values: Tensor, point: str, batch: Batch, dtype: torch.dtype) -> None:
        if not torch.isfinite(values).all():
            raise NumericalError(not_finite(point, batch, dtype))

    def result(self) -> AttentionSinks:
        """The sinks so far."""
        if self._tokens[1] == 0:
            raise InputError("the texts have none of the tokens to watch")
        if self._pairs.sum() == 0:
            raise InputError("every text has a single token, which only sees itself: pass longer texts")
        n_layers = self.model.cfg.n_layers
        at, texts, groups, k, v = (
            torch.stack([self._totals[name, layer] for layer in range(n_layers)])
            for name in ("at", "texts", "groups", "k", "v")
        )
        received, keys, values = (
            total / n[:, None] for total, n in ((groups, self._pairs), (k, self._tokens), (v, self._tokens))
        )
        return AttentionSinks(
            n_texts=self._n_texts,
            n_tokens=int(self._tokens.sum()),
            n_watched=int(self._tokens[1]),
            received=at / self._pairs_at,
            sink_texts=texts / self._n_long,
            watched_received=received[:, 1],
            other_received=received[:, 0],
            watched_key_norm=keys[:, 1],
            other_key_norm=keys[:, 0],
            watched_value_norm=values[:, 1],
            other_value_norm=values[:, 0],
        )


def _added(one: Float64[Tensor, "*n_a"], other: Float64[Tensor, "*n_b"]) -> Float64[Tensor, "*n_c"]:
    """The sum of two totals whose last axes, positions, may differ in length."""
    longest = max(one.shape[-1], other.shape[-1])
    a, b = (torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in (one, other))
    return a + b
