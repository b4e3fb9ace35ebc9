"""Attribution over many texts: means, spread, and who writes most how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.attribution import Faithfulness, component_columns
from sd_lens.explanations.components import Component
from sd_lens.explanations.contributions import Projected, WritesCapture, projected, shares, unit_direction
from sd_lens.explanations.faithfulness import as_ablated, attributable, compared, effects
from sd_lens.observations.selection import Where, selected
from sd_lens.observations.texts import Texts, batches


@dataclass(frozen=True, eq=False)
class CorpusAttribution:
    """The residual streams of many tokens after one block, as sums of writes.

    Attributes:
        n_tokens: how many tokens were attributed.
        layer: the streams are those after this block, 0-based.
        norm: their mean norm.
        total: the mean length along the direction; with each token's own direction, the mean norm.
        residual_error: the largest `|sum of contributions - total| / norm` of any token.
        table: component, kind, layer, head, contribution (mean over the tokens), contribution_std (its spread between
            them), share (of the mean `total`), share_std (spread of the contribution about that share of each token's
            own total, relative to the mean `total`), top (for how many tokens it is the largest contribution, either
            way).
        faithfulness: how ablations agree, over the first `verify_tokens`; None without any.
    """

    n_tokens: int
    layer: int
    norm: float
    total: float
    residual_error: float
    table: pd.DataFrame = field(repr=False)
    faithfulness: Faithfulness | None = None

    def __str__(self) -> str:
        most = self.table.nlargest(2, "top")
        named = ", ".join(
            f"{c} for {n:,} of them ({100 * s:.1f} % on average)"
            for c, n, s in zip(most.component, most.top, most.share, strict=True)
            if n
        )
        return (
            f"CorpusAttribution of {self.n_tokens:,} tokens after block {self.layer}: mean length {self.total:,.5g} of "
            f"mean norm {self.norm:,.5g}; largest contribution: {named}; sums exact to {self.residual_error:.0e}; "
            f"{self.faithfulness or 'not verified by ablation'}"
        )

    __repr__ = __str__


def attribute_corpus(
    model: Any,
    texts: Texts,
    layer: int,
    where: Where = 0,
    direction: Float[Tensor, " d_model"] | None = None,
    *,
    verify_tokens: int = 0,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> CorpusAttribution:
    """Who wrote the residual streams of many tokens, in one pass and bounded memory.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors, read once.
        layer: the streams after this block, 0-based.
        where: the tokens: a position (the initial ones by default), tokens such as `[" the"]`, a table with text and
            position such as rows of `found.table`, or None for all.
        direction: one for all tokens, normalized before use; each token's own by default.
        verify_tokens: ablate every head and MLP at the first so many of the tokens, and compare; see `verify`.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens.
        batch_tokens: tokens run at a time: what bounds memory.
        progress: show progress bars.

    Raises:
        InputError: for texts that cannot be used, or without any of the tokens; for a block or direction that the
            model does not have.
        NotSupportedError: if the writes do not sum to the streams.
        NumericalError: if a stream is not finite.
    """
    capture = WritesCapture(model, layer)
    unit = unit_direction(direction, model.cfg.d_model)
    moments = _Moments()
    to_verify: list[tuple[Tensor, Projected, int]] = []
    components = None
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="attribution",
    ):  # fmt: skip
        mask = selected(model, batch, where)
        if bool(mask.any()):
            # Causal: neither other texts nor later tokens matter.
            has_any, last = mask.any(dim=1), int(mask.any(dim=0).nonzero().max())
            tokens, (rows, positions) = batch.tokens[has_any, : last + 1], mask[has_any].nonzero().unbind(dim=1)
            writes = capture.run(tokens, (rows, positions))
            found = projected(writes, unit)
            moments.add(found)
            components = writes.components()
            to_verify += _first(tokens, rows, positions, found, verify_tokens - len(to_verify))
    if components is None:
        raise InputError("the texts have none of the tokens that were asked for")
    norm, total = moments.norm / moments.n, moments.total / moments.n
    share = shares(moments.mean, total, norm)
    table = component_columns(components).assign(
        contribution=moments.mean.numpy(), contribution_std=moments.spread().numpy(), share=share.numpy(),
        share_std=shares(moments.spread_about(share), abs(total), norm).numpy(), top=moments.top.numpy(),
    )  # fmt: skip
    return CorpusAttribution(
        n_tokens=moments.n,
        layer=layer,
        norm=norm,
        total=total,
        residual_error=moments.error,
        table=table,
        faithfulness=_verified(model, layer, to_verify, components, progress) if to_verify else None,
    )


def _first(
    tokens: Int64[Tensor, "batch pos"],
    rows: Int64[Tensor, " n"],
    positions: Int64[Tensor, " n"],
    found: Projected,
    n: int,
) -> list[tuple[Tensor, Projected, int]]:
    """The first n tokens of a batch, each as its text up to it and its place in `found`."""
    pairs = list(zip(rows.tolist(), positions.tolist(), strict=True))[: max(n, 0)]
    return [(tokens[row, : position + 1], found, i) for i, (row, position) in enumerate(pairs)]


def _verified(
    model: Any, layer: int, tokens: list[tuple[Tensor, Projected, int]], components: list[Component], progress: bool
) -> Faithfulness:
    ablated = attributable(model, layer)
    lost = [effects(model, row, layer, p.directions[i], ablated, progress=progress) for row, p, i in tokens]
    contributions = torch.stack([p.contributions[i] for _, p, i in tokens]).mean(dim=0)
    written = as_ablated(ablated, dict(zip(map(str, components), contributions.tolist(), strict=True)))
    total = sum(float(p.total[i]) for _, p, i in tokens) / len(tokens)
    return compared([str(c) for c in ablated], written, torch.stack(lost).mean(dim=0), total, "zero")


class _Moments:
    """Running means, squared deviations and products of contributions and totals (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.n = 0
        self.norm = self.total = self.error = 0.0
        self.top = torch.zeros(0, dtype=torch.long)
        self.mean = self._squares = self._products = torch.zeros(0, dtype=torch.float64)
        self._total_squares = 0.0

    def add(self, found: Projected) -> None:
        """Add n tokens."""
        n, n_components = found.contributions.shape
        if self.n == 0:
            self.mean = self._squares = self._products = torch.zeros(n_components, dtype=torch.float64)
            self.top = torch.zeros(n_components, dtype=torch.long)
        mean, total = found.contributions.mean(dim=0), found.total.mean()
        deviations, total_deviations = found.contributions - mean, found.total - total
        away, total_away = mean - self.mean, float(total) - (self.total / self.n if self.n else 0.0)
        weight = self.n * n / (self.n + n)
        self._squares = self._squares + deviations.square().sum(dim=0) + away.square() * weight
        self._products = self._products + total_deviations @ deviations + away * total_away * weight
        self._total_squares += float(total_deviations.square().sum()) + total_away**2 * weight
        self.mean = self.mean + away * (n / (self.n + n))
        self.n += n
        self.norm += float(found.norm.sum())
        self.total += float(found.total.sum())
        self.error = max(self.error, float(found.error.max()))
        self.top += torch.bincount(found.contributions.abs().argmax(dim=1), minlength=n_components)

    def spread(self) -> Float64[Tensor, " component"]:
        """Standard deviation between tokens; 0 for one token."""
        return (self._squares / max(self.n - 1, 1)).sqrt()

    def spread_about(self, share: Float64[Tensor, " component"]) -> Float64[Tensor, " component"]:
        """Standard deviation of contribution - share * total between tokens."""
        squares = self._squares - 2 * share * self._products + share.square() * self._total_squares
        return (squares.clamp_min(0) / max(self.n - 1, 1)).sqrt()
