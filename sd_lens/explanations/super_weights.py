"""Super weights: the few neurons, and the single entries of `W_out`, through which an MLP writes a high norm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.contributions import unit_direction
from sd_lens.explanations.mlp_writes import MlpWriteSums
from sd_lens.explanations.sweep import measures, sweep_ablations
from sd_lens.models.hooks import hooked
from sd_lens.observations.behaviour import observe_behaviour
from sd_lens.observations.selection import Where
from sd_lens.observations.texts import Texts, batches, token_rows

MOST = 0.99
"""The write is that of the fewest neurons whose contributions sum to this share of it."""


@dataclass(frozen=True, eq=False)
class SuperWeights:
    """One MLP's write along a direction at some tokens: its neurons, its single weights, and what zeroing them does.

    Attributes:
        layer: the MLP's block, 0-based.
        n_tokens: how many tokens the means are over.
        direction: unit; along it contributions are measured.
        written: mean length that the neurons write along it, the output bias apart.
        n_neurons: the smallest number of neurons whose summed contributions reach 99 % of it.
        cumulative: share of `written` that the n + 1 largest neurons write together.
        before: norm (of these tokens after the block, mean), loss (nats per token, of the texts) and sink (mean
            attention on the first token) of the whole model.
        without: the same with these `n_neurons` zeroed together.
        neurons: the largest, in the order of `cumulative`: component, neuron, activation (mean `hook_post`),
            contribution (mean), share (of `written`), and norm, loss and sink with this neuron zeroed.
        entries: the entries `W_out[neuron, channel]` that write most, of either sign: component, neuron, channel,
            weight, size (mean `|hook_post weight|`; behind a norm, of what enters the stream), contribution, share,
            and norm, loss and sink with this entry zeroed.
    """

    layer: int
    n_tokens: int
    direction: Float64[Tensor, " d_model"] = field(repr=False)
    written: float
    n_neurons: int
    cumulative: Float64[Tensor, " d_mlp"] = field(repr=False)
    before: dict[str, float]
    without: dict[str, float]
    neurons: pd.DataFrame = field(repr=False)
    entries: pd.DataFrame = field(repr=False)

    def __str__(self) -> str:
        entry = self.entries.iloc[int((self.entries.norm - self.before["norm"]).abs().argmax())]
        return (
            f"SuperWeights of L{self.layer}MLP at {self.n_tokens} tokens: {self.n_neurons} of {len(self.cumulative)} "
            f"neurons write 99 % of {self.written:,.5g} along the direction; norm after the block "
            f"{self.before['norm']:,.5g} -> {self.without['norm']:,.5g} without them, {entry.norm:,.5g} without the "
            f"single weight {entry.component} (loss {self.before['loss']:.4g} -> {entry.loss:.4g} nats per token)"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """Neurons and entries in one table, one row each."""
        return pd.concat([self.neurons.assign(kind="neuron"), self.entries.assign(kind="weight")], ignore_index=True)


def super_weights(
    model: Any,
    texts: Texts,
    layer: int,
    where: Where = 0,
    direction: Float[Tensor, " d_model"] | None = None,
    *,
    neurons: int = 8,
    entries: int = 8,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> SuperWeights:
    """Which neurons, and which single weights, of an MLP write the norm of some tokens; measured without each.

    Contributions are read off one run. Norms and losses come from running the texts again with one neuron, or one
    entry of `W_out`, zeroed everywhere: by hooks, the weights are never touched. Behind an MLP with a norm of its own
    (Gemma 2, 3) an entry is taken out in front of that norm, which is then applied anew.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors. A few short ones do: they are run once for every
            neuron and entry. Their token ids are held in memory.
        layer: the MLP's block, such as one of `found.explosion_layers`.
        where: the tokens: a position (the initial ones by default), tokens such as `[" the"]`, or a table with text
            and position such as rows of `found.table`.
        direction: the write's length along it is what neurons share, such as `found.direction`; normalized before
            use. By default the mean of the tokens' streams after the block.
        neurons: how many of the largest neurons to zero, one at a time.
        entries: how many of the largest entries.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens.
        batch_tokens: tokens run at a time: bounds memory.
        progress: show progress bars.

    Raises:
        InputError: for texts that cannot be used, or without any of the tokens; for a block or direction that the
            model does not have; if the MLP writes nothing along the direction.
        NotSupportedError: for an MLP that has no neurons with one `W_out`, or whose neurons do not sum to it.
        NumericalError: if the residual stream or the loss is not finite, with or without a neuron or entry.

    Example:
        >>> super_weights(model, default_texts()[:8], 11)  # doctest: +SKIP
        SuperWeights of L11MLP at 8 tokens: 2 of 1536 neurons write 99 % of 23,447 along the direction; ...

    Source: Yu et al. 2024 for single weights that a model cannot do without.
    """
    if neurons < 1 or entries < 1:
        raise InputError(f"neurons={neurons}, entries={entries}: expected at least one of each")
    unit = unit_direction(direction, model.cfg.d_model)
    rows = list(token_rows(model, texts, prepend_bos=prepend_bos))
    options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "progress": progress}
    sums = MlpWriteSums(model, layer, where)
    for batch in batches(model, rows, description="neurons", **options):
        sums.add(batch)
    write = sums.along(unit)
    ranked = (write.contribution * math.copysign(1.0, write.total)).argsort(descending=True)
    cumulative = write.contribution[ranked].cumsum(dim=0) / write.total
    n_neurons = int((cumulative >= MOST).long().argmax()) + 1
    by_neuron, by_entry = write.neurons(ranked[:neurons]), write.largest_entries(entries)
    labels = [*by_neuron.component, *by_entry.component]
    sweep = sweep_ablations(model, rows, layer=layer, components=labels, watch=where, **options)
    measured = sweep.table.set_index("component")[list(sweep.before)]
    with hooked(model, {f"blocks.{layer}.mlp.hook_post": partial(_silenced, ranked[:n_neurons])}):
        without = observe_behaviour(model, rows, where, **options)
    return SuperWeights(
        layer=layer,
        n_tokens=sums.n,
        direction=write.direction,
        written=write.total,
        n_neurons=n_neurons,
        cumulative=cumulative,
        before=sweep.before,
        without=measures(without, layer),
        neurons=by_neuron.join(measured, on="component"),
        entries=by_entry.join(measured, on="component"),
    )


def _silenced(neurons: Int64[Tensor, " n"], post: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_mlp"]:
    return post.index_fill(2, neurons.to(post.device), 0.0)
