"""Massive activations: the single coordinates of the residual stream that carry a token's norm."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import residual_stream_points, run_with_hooks
from sd_lens.observations.histograms import NormHistogram, norm_gaps
from sd_lens.observations.norms import initial_positions, not_finite
from sd_lens.observations.selection import Where, selected
from sd_lens.observations.texts import Batch, Texts, batches, token_strings

LEAST_VALUE = 100.0
"""A massive activation by the usual criterion is larger than this ..."""

LEAST_RATIO = 1000.0
"""... and than so many times the layer's median magnitude (Sun et al. 2024)."""

MOST = 0.99
"""The channels that carry a norm are the fewest that hold this share of its square."""


@dataclass(frozen=True, eq=False)
class MassiveActivations:
    """Coordinates (token, channel) of the residual stream after each block (0-based) that stand out by their size.

    Attributes:
        n_tokens: real tokens run.
        n_watched: how many of these are watched.
        table: text, position, token, layer, channel, value, ratio (magnitude over the layer's median), share (of the
            token's squared norm), absolute (above 100 and 1000 medians) and relative (above `threshold`): the entries
            that are either.
        median: median magnitude of all entries per layer, to 0.14 %.
        largest: largest magnitude per layer (exact).
        threshold: magnitude from which an entry is massive by the relative criterion: the gap rule of `norm_gaps`,
            applied to each token's largest magnitude instead of its norm; inf where nothing stands out.
        channel_share: mean share of each channel in the squared norm of a watched token.
        watched_channels: how many channels hold 99 % of a watched token's squared norm, mean.
        other_channels: the same for all other tokens; NaN if there are none.
    """

    n_tokens: int
    n_watched: int
    table: pd.DataFrame = field(repr=False)
    median: Float64[Tensor, " layer"]
    largest: Float64[Tensor, " layer"]
    threshold: Float64[Tensor, " layer"]
    channel_share: Float64[Tensor, "layer d_model"] = field(repr=False)
    watched_channels: Float64[Tensor, " layer"]
    other_channels: Float64[Tensor, " layer"]

    def __str__(self) -> str:
        peak = int(self.largest.argmax())
        named = ", ".join(map(str, self.channels().groupby("channel")["count"].sum().nlargest(4).index)) or "none"
        return (
            f"MassiveActivations: {len(self.table):,} entries of {self.n_tokens:,} tokens, "
            f"{int(self.table.absolute.sum()):,} by the usual criterion; channels {named}; largest "
            f"{self.largest[peak]:,.5g} after block {peak}, {self.largest[peak] / self.median[peak]:,.4g} medians, "
            f"where {self.watched_channels[peak]:.4g} channels hold 99 % of a watched token's squared norm"
        )

    __repr__ = __str__

    @property
    def usual_threshold(self) -> Float64[Tensor, " layer"]:
        """Magnitude from which an entry is massive by the usual criterion."""
        return (LEAST_RATIO * self.median).clamp_min(LEAST_VALUE)

    def channels(self) -> pd.DataFrame:
        """One row per layer and channel with massive activations: count, absolute (how many of these), largest."""
        sized = self.table.assign(largest=self.table.value.abs(), count=1)
        totals = {"count": "sum", "absolute": "sum", "largest": "max"}
        return sized.groupby(["layer", "channel"], as_index=False).agg(totals)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: sizes, criteria, entries found and channels needed for 99 % of the squared norm."""
        layers = range(len(self.median))
        found = self.table.groupby("layer")[["absolute", "relative"]].sum().reindex(layers, fill_value=0)
        return pd.DataFrame(
            {
                "layer": layers,
                "median": self.median.numpy(),
                "largest": self.largest.numpy(),
                "threshold": self.threshold.numpy(),
                "absolute": found.absolute.to_numpy(),
                "relative": found.relative.to_numpy(),
                "watched_channels": self.watched_channels.numpy(),
                "other_channels": self.other_channels.numpy(),
            }
        )


def massive_activations(
    model: Any,
    texts: Texts,
    watch: Where = 0,
    *,
    max_length: int | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 1024,
    max_entries: int = 10_000,
    progress: bool = True,
) -> MassiveActivations:
    """The coordinates (token, channel) that carry the norm, after every block, in one pass over a corpus.

    Two criteria: the usual one, and a relative one without any number of the model's, since the usual one depends on
    the scale of the stream.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors, read once.
        watch: the high-norm tokens whose channels are counted: a position (by default the initial one), tokens such
            as `[" the"]`, or a table with text and position such as `found.table`.
        max_length: cut texts to so many tokens; `cfg.n_ctx` by default.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        batch_tokens: tokens run at a time: what bounds memory.
        max_entries: how many of the largest entries of each layer may enter the table.
        progress: show a progress bar.

    Raises:
        InputError: for texts that cannot be used, or without any of the tokens to watch.
        NumericalError: if the residual stream is not finite.

    Warns:
        UserWarning: if a layer has more massive activations than `max_entries`.

    Source: Sun et al. 2024 for the usual criterion.
    """
    if max_entries < 1:
        raise InputError(f"max_entries={max_entries}: expected at least one")
    sums = _Sums(model, watch, max_entries)
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="massive activations",
    ):  # fmt: skip
        sums.run(batch)
    return sums.result()


class _Sums:
    """Accumulates `MassiveActivations`, batch by batch; of each layer's entries, the largest are kept."""

    def __init__(self, model: Any, watch: Where, max_entries: int):
        self.model = model
        self.watch = watch
        self.max_entries = max_entries
        self.points = residual_stream_points(model.cfg.n_layers)[1:]
        n_layers, d_model = len(self.points), model.cfg.d_model
        self._entries = NormHistogram(n_layers)
        self._peaks, self._ordinary_peaks = NormHistogram(n_layers), NormHistogram(n_layers)
        self._tokens = torch.zeros(2, dtype=torch.float64)  # others, watched
        self._channels = torch.zeros(2, n_layers, dtype=torch.float64)
        self._shares = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self._largest: list[Tensor] = [torch.zeros(0, len(_COLUMNS), dtype=torch.float64) for _ in self.points]

    def run(self, batch: Batch) -> None:
        """Run a batch and count it."""
        watched = selected(self.model, batch, self.watch)[batch.real]
        self._tokens += torch.stack([(~watched).sum(), watched.sum()]).double()
        add = {point: partial(self._add, layer, batch, watched) for layer, point in enumerate(self.points)}
        run_with_hooks(self.model, batch.tokens, add)

    def _add(self, layer: int, batch: Batch, watched: Bool[Tensor, " n"], activation: Float[Tensor, "b p d"]) -> None:
        states = activation.detach()[batch.real.to(activation.device)].cpu().double()
        squares = states.square()
        norms = squares.sum(dim=1, keepdim=True)
        if not torch.isfinite(norms).all():
            raise NumericalError(not_finite(self.points[layer], batch, activation.dtype))
        sizes, shares = states.abs(), squares / norms.clamp_min(torch.finfo(torch.float64).tiny)
        self._entries.add(layer, sizes.flatten())
        peaks, initial = sizes.amax(dim=1), initial_positions(batch)
        self._peaks.add(layer, peaks)
        self._ordinary_peaks.add(layer, peaks[~initial])
        held = shares.sort(dim=1, descending=True).values.cumsum(dim=1)
        needed = (held[:, :-1] < MOST).sum(dim=1) + 1
        self._channels[:, layer] += torch.stack([needed[~watched].sum(), needed[watched].sum()])
        self._shares[layer] += shares[watched].sum(dim=0)
        self._keep(layer, batch, states, shares)

    def _keep(
        self, layer: int, batch: Batch, states: Float64[Tensor, "n d_model"], shares: Float64[Tensor, "n d_model"]
    ) -> None:
        """The largest entries so far, one a row, as `_COLUMNS`."""
        chosen = states.flatten().abs().topk(min(self.max_entries + 1, states.numel())).indices
        row, channel = chosen // states.shape[1], chosen % states.shape[1]
        text, position = batch.real.nonzero()[row].unbind(dim=1)
        found = (text + batch.first_text, position, batch.tokens[text, position], channel)
        new = torch.stack([*(c.double() for c in found), states.flatten()[chosen], shares.flatten()[chosen]], dim=1)
        every = torch.cat([self._largest[layer], new])
        # One more than allowed: whether it is massive tells whether the table is complete.
        self._largest[layer] = every[every[:, 4].abs().topk(min(self.max_entries + 1, len(every))).indices]

    def result(self) -> MassiveActivations:
        """The massive activations so far."""
        if self._tokens[1] == 0:
            raise InputError("the texts have none of the tokens to watch")
        median = self._entries.median()
        alone = self._ordinary_peaks.total == 0  # one-token texts: nothing to compare with
        threshold = torch.full_like(median, torch.inf) if alone else norm_gaps(self._ordinary_peaks, self._peaks)
        other_channels, watched_channels = self._channels / self._tokens[:, None]
        return MassiveActivations(
            n_tokens=int(self._tokens.sum()),
            n_watched=int(self._tokens[1]),
            table=self._table(median, threshold),
            median=median,
            largest=torch.stack([rows[0, 4].abs() for rows in self._largest]),
            threshold=threshold,
            channel_share=self._shares / self._tokens[1],
            watched_channels=watched_channels,
            other_channels=other_channels,
        )

    def _table(self, median: Float64[Tensor, " layer"], threshold: Float64[Tensor, " layer"]) -> pd.DataFrame:
        layer = torch.arange(len(median)).repeat_interleave(torch.tensor([len(rows) for rows in self._largest]))
        every = pd.DataFrame(torch.cat(self._largest).numpy(), columns=_COLUMNS)
        every.insert(3, "layer", layer.numpy())
        size = every.value.abs()
        every.insert(6, "ratio", size / median.clamp_min(torch.finfo(torch.float64).tiny).numpy()[layer])
        every["absolute"] = (size > LEAST_VALUE) & (every.ratio > LEAST_RATIO)
        every["relative"] = size > threshold.numpy()[layer]
        found = every[every.absolute | every.relative]
        if (found.groupby("layer").size() > self.max_entries).any():
            warnings.warn(
                f"a layer has more than max_entries={self.max_entries} massive activations: the table holds the "
                "largest",
                stacklevel=4,
            )
            found = found.groupby("layer").head(self.max_entries)
        found = found.astype(dict.fromkeys(("text", "position", "token", "channel"), "int64")).reset_index(drop=True)
        return found.assign(token=pd.Series(token_strings(self.model, found.token.tolist()), dtype="str"))


_COLUMNS = ["text", "position", "token", "channel", "value", "share"]
