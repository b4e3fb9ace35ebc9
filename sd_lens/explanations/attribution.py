"""Attribution: the norm of a token, or its part along a direction, as a sum over everything that wrote it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.components import Component
from sd_lens.explanations.contributions import WritesCapture, projected, shares, unit_direction
from sd_lens.explanations.reading import at_last_token, of_text, peak_block
from sd_lens.models.hooks import residual_stream_points
from sd_lens.observations.texts import Text, one_row, token_strings


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Whether ablations agree with an attribution; made by `verify`.

    Attributes:
        rank_correlation: Spearman's, between contribution and effect, over heads and MLPs; NaN if all are equal.
        table: component, contribution, effect: the length along the direction that is lost when the component is
            ablated at this token, everything after it responding.
        mode: of the ablation.
        disagreement: what the two do not agree on, in a sentence; empty if they agree.
    """

    rank_correlation: float
    table: pd.DataFrame = field(repr=False)
    mode: str
    disagreement: str

    def __str__(self) -> str:
        agree = f"rank correlation with {self.mode} ablation {self.rank_correlation:.2f}"
        return f"{agree}; {self.disagreement}" if self.disagreement else agree


@dataclass(frozen=True, eq=False)
class Attribution:
    """The residual stream of one token after one block, as a sum of writes along a direction.

    Attributes:
        token_ids: the text up to the token, which is the last one; a causal model sees no more.
        tokens: the same as text.
        layer: the stream is the one after this block, 0-based.
        direction: unit; the token's own if none was given.
        norm: of the residual stream.
        total: the stream's length along the direction; with the token's own direction, the norm.
        residual_error: `|sum of contributions - total| / norm`.
        table: component (its label), kind, layer and head (missing where there is none), contribution (length along the
            direction, negative against it), share (of `total`; NaN where that is only rounding); in the order of
            writing.
        faithfulness: how ablations agree; None until `verify` was called.
    """

    token_ids: Int64[Tensor, " pos"]
    tokens: tuple[str, ...]
    layer: int
    direction: Float64[Tensor, " d_model"]
    norm: float
    total: float
    residual_error: float
    table: pd.DataFrame = field(repr=False)
    faithfulness: Faithfulness | None = None

    @property
    def position(self) -> int:
        """Where the token stands."""
        return len(self.tokens) - 1

    def __str__(self) -> str:
        return (
            f"Attribution of {self.tokens[-1]!r} at position {self.position} after block {self.layer}: "
            f"{self.total:,.5g} of norm {self.norm:,.5g}, mostly {leading(self.table)}; sum exact to "
            f"{self.residual_error:.0e}; {self.faithfulness or 'not verified by ablation yet'}"
        )

    __repr__ = __str__


def attribute(
    model: Any,
    text: Text,
    position: int = 0,
    layer: int | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    *,
    cache: Any | None = None,
    prepend_bos: bool | None = None,
) -> Attribution:
    """Who wrote a token's residual stream: embeddings, every head, every MLP and the biases.

    The stream is the sum of what they wrote, so its length along any direction is the sum of theirs; along
    its own direction that is the norm. Norms behind attention (Gemma 2, 3) are taken with their scale frozen.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        text: one text, or its token ids `[pos]` or `[1, pos]`.
        position: of the token; negative ones count from the end.
        layer: the stream after this block, 0-based; by default the block after which the token's norm is largest.
        direction: normalized before use; the token's own by default.
        cache: a TransformerLens `ActivationCache` of this text, to save the run; a complete one.
        prepend_bos: as for `scan_norms`.

    Raises:
        InputError: for a text, position, layer, direction or cache that cannot be used.
        NotSupportedError: if the writes do not sum to the stream.
        NumericalError: if the stream is not finite.

    Example:
        >>> attribute(model, "The sea was calm.")  # doctest: +SKIP
        Attribution of 'The' at position 0 after block 11: 22,712 of norm 22,712, mostly L11MLP (99.8 %), ...

    Source: the decomposition of the residual stream is Elhage et al. 2021; on the token's own direction it is exact
    for the norm.
    """
    row = one_row(model, text, prepend_bos=prepend_bos)
    n = len(row)
    if not -n <= position < n:
        raise InputError(f"position {position} does not exist: the text has {n} tokens")
    row = row[: position % n + 1]
    unit = unit_direction(direction, model.cfg.d_model)
    if cache is not None:
        _check_same_text(model, row, cache)
    capture = WritesCapture(model, model.cfg.n_layers - 1 if layer is None else layer)
    streams = residual_stream_points(model.cfg.n_layers)[1:] if layer is None else []
    read = at_last_token(model, row, list(dict.fromkeys([*capture.points(), *streams])), cache)
    if layer is None:
        layer = peak_block({name: read[name] for name in streams})
        capture = WritesCapture(model, layer)
    writes = capture.assembled(read)
    found = projected(writes, unit)
    return Attribution(
        token_ids=row,
        tokens=tuple(token_strings(model, row)),
        layer=layer,
        direction=found.directions[0].clone(),
        norm=float(found.norm[0]),
        total=float(found.total[0]),
        residual_error=float(found.error[0]),
        table=component_columns(writes.components()).assign(
            contribution=found.contributions[0].numpy(),
            share=shares(found.contributions[0], float(found.total[0]), float(found.norm[0])).numpy(),
        ),
    )


def _check_same_text(model: Any, row: Int64[Tensor, " pos"], cache: Any) -> None:
    ours = of_text(model, row, ["hook_embed"])["hook_embed"]
    cached = of_text(model, row, ["hook_embed"], cache)["hook_embed"]
    if cached.shape[-1] != ours.shape[-1] or not torch.allclose(cached[:, : len(row)].to(ours), ours):
        raise InputError("the cache is of another text or model: its embeddings differ from this text's")


def component_columns(components: list[Component]) -> pd.DataFrame:
    """Label, kind, layer and head of components, one a row; and neuron and channel, if there are any."""
    columns = {
        "component": pd.Series([str(c) for c in components], dtype="str"),
        "kind": pd.Series([c.kind for c in components], dtype="str"),
        "layer": pd.array([c.layer for c in components], dtype="Int64"),
        "head": pd.array([c.index if c.kind == "head" else None for c in components], dtype="Int64"),
    }
    if any(c.kind in ("neuron", "weight") for c in components):
        columns["neuron"] = pd.array([None if c.kind == "head" else c.index for c in components], dtype="Int64")
    if any(c.kind == "weight" for c in components):
        columns["channel"] = pd.array([c.channel for c in components], dtype="Int64")
    return pd.DataFrame(columns)


def leading(table: pd.DataFrame, n: int = 2) -> str:
    """The n largest contributions in words: `L11MLP (99.7 %), L10MLP (0.1 %)`."""
    largest = table.loc[table.contribution.abs().nlargest(n).index]
    return ", ".join(f"{c} ({100 * s:.1f} %)" for c, s in zip(largest.component, largest.share, strict=True))
