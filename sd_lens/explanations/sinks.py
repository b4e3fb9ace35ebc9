"""Whether attention sinks live on what blocks write along the defect direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sd_lens.explanations.components import Component, parsed
from sd_lens.explanations.interventions import ablated
from sd_lens.models.blocks import wanted_layers
from sd_lens.observations.attention import SINK_THRESHOLD
from sd_lens.observations.selection import Where
from sd_lens.observations.sinks import AttentionSinks, attention_sinks
from sd_lens.observations.texts import Texts, token_rows


@dataclass(frozen=True, eq=False)
class SinksWithout:
    """Attention sinks with and without what some MLPs write along a direction.

    Attributes:
        components: the MLPs' labels.
        before: of the whole model.
        after: without these writes.
    """

    components: tuple[str, ...]
    before: AttentionSinks = field(repr=False)
    after: AttentionSinks = field(repr=False)

    @property
    def remaining(self) -> float:
        """Share of the heads with a sink on the first key that still have one; NaN if none had."""
        had = self.before.on_first > SINK_THRESHOLD
        return float((self.after.on_first > SINK_THRESHOLD)[had].double().mean())

    def __str__(self) -> str:
        kept = (
            "no head had a sink"
            if math.isnan(self.remaining)
            else f"{100 * self.remaining:.1f} % of the heads with a sink keep it"
        )
        return (
            f"SinksWithout the writes of {', '.join(self.components)} along the direction: sink rate "
            f"{100 * self.before.sink_rate:.1f} % -> {100 * self.after.sink_rate:.1f} %, attention on the first key "
            f"{self.before.on_first.mean():.3f} -> {self.after.on_first.mean():.3f}; {kept}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and head, before and after."""
        return self.before.to_dataframe().merge(
            self.after.to_dataframe(), on=["layer", "head"], suffixes=("_before", "_after")
        )

    def by_layer(self) -> pd.DataFrame:
        """One row per layer: sink rate and means over heads, before and after."""
        return self.before.by_layer().merge(self.after.by_layer(), on="layer", suffixes=("_before", "_after"))


def sinks_without(
    model: Any,
    texts: Texts,
    layers: int | Iterable[int],
    direction: Float[Tensor, " d_model"],
    watch: Where = 0,
    *,
    positions: int | Sequence[int] | None = None,
    max_length: int = 64,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> SinksWithout:
    """Attention sinks before and after taking away what the MLPs of explosion blocks write along the defect direction.

    Nothing else that they write is touched, which ablating them whole would do.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors. Their token ids are held in memory.
        layers: the blocks whose MLPs are meant, such as `found.explosion_layers`; all of them at once.
        direction: what is taken away, such as `found.direction`; normalized before use.
        watch: as for `attention_sinks`.
        positions: take it away at these positions only; everywhere by default.
        max_length: as for `attention_sinks`.
        prepend_bos: as for `attention_sinks`.
        batch_tokens: as for `attention_sinks`.
        progress: show progress bars.

    Raises:
        InputError: as `attention_sinks`; for blocks that do not exist, or a direction that cannot be used.
        NumericalError: if attention, keys or values are not finite, before or after.
    """
    wanted = wanted_layers(model.cfg.n_layers, [layers] if isinstance(layers, int) else layers)
    components = parsed(model, [Component("mlp", layer) for layer in wanted])
    options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "progress": progress}
    rows = list(token_rows(model, texts, prepend_bos=prepend_bos))
    before = attention_sinks(model, rows, watch, **options)
    with ablated(model, components, "direction", direction=direction, positions=positions):
        after = attention_sinks(model, rows, watch, **options)
    return SinksWithout(tuple(map(str, components)), before, after)
