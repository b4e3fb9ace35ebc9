"""Whether tokens that should explode really do: put at non-initial positions of real texts, beside others."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, NumericalError
from sd_lens.explanations.explosion import ExplosionPath
from sd_lens.models.hooks import run_with_hooks
from sd_lens.observations.texts import Texts, token_rows


@dataclass(frozen=True, eq=False)
class ExplosionInContext:
    """Norms of vocabulary tokens put at non-initial positions of texts.

    Attributes:
        layer: the block after which norms are read, 0-based.
        threshold: the path's, above which a token counts as exploded.
        table: token_id, token, named, non_initial (the norm of the path), median, lowest, highest (over the contexts),
            share (of the contexts in which the token exploded). `named` are those with the largest norm on the
            non-initial path, the others are drawn from those that it says do not explode.
        n_contexts: how many contexts each token was put into.
    """

    layer: int
    threshold: float
    table: pd.DataFrame = field(repr=False)
    n_contexts: int

    @property
    def named_rate(self) -> float:
        """Share of (named token, context) pairs that exploded."""
        return float(self.table.share[self.table.named].mean())

    @property
    def other_rate(self) -> float:
        """The same of the other tokens; NaN without any."""
        return float(self.table.share[~self.table.named].mean())

    def __str__(self) -> str:
        return (
            f"ExplosionInContext: after block {self.layer} the {int(self.table.named.sum())} tokens that the path "
            f"ranks first exploded in {100 * self.named_rate:.1f} % of {self.n_contexts} contexts, "
            f"{int((~self.table.named).sum())} others in {100 * self.other_rate:.1f} %"
        )

    __repr__ = __str__


def explosion_in_context(
    model: Any,
    path: ExplosionPath,
    texts: Texts,
    *,
    n_tokens: int = 32,
    n_contexts: int = 8,
    longest: int = 32,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ExplosionInContext:
    """Put the tokens that the non-initial path ranks first behind beginnings of real texts, and measure their norm.

    Each of the first texts is cut at a random position from 1 on, and each token takes the place of the token there:
    all tokens see the same contexts. As many others, which the path says do not explode, are put there to compare.

    Args:
        model: the model of the path.
        path: of `explosion_path`.
        texts: as for `find_high_norm_tokens`; the first `n_contexts` are read.
        n_tokens: how many tokens of each kind; fewer where the path has fewer.
        n_contexts: how many texts, one context of each.
        longest: the largest position, 1 or more.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        seed: of positions and of the other tokens.
        progress: show a progress bar.

    Raises:
        InputError: for texts or numbers that cannot be used, or a path of another model.
        NumericalError: if a norm is not finite.

    Source: Wang et al. 2025, section 4 (tokens that explode at non-initial positions).
    """
    for name, number in (("n_tokens", n_tokens), ("n_contexts", n_contexts), ("longest", longest)):
        if number < 1:
            raise InputError(f"{name}={number}: expected at least 1")
    if int(path.table.token_id.max()) >= model.cfg.d_vocab or path.layer >= model.cfg.n_layers:
        raise InputError("the path is of another model: its tokens or its block do not exist in this one")
    generator = np.random.default_rng(seed)
    named = path.table.head(n_tokens)
    rest = path.table.iloc[len(named) :]
    rest = rest[~rest.explodes]
    others = rest.iloc[np.sort(generator.permutation(len(rest))[:n_tokens])]
    chosen = pd.concat([named.assign(named=True), others.assign(named=False)], ignore_index=True)
    tokens = torch.tensor(chosen.token_id.to_numpy())
    limit = min(longest, model.cfg.n_ctx - 1)
    beginnings = list(islice(token_rows(model, texts, prepend_bos=prepend_bos), n_contexts))
    if not beginnings or any(len(row) == 0 for row in beginnings):
        raise InputError("explosion_in_context needs texts of at least one token, to put others behind")
    norms = []
    for row in tqdm(beginnings, desc="contexts", unit="text", disable=not progress, leave=False):
        position = int(generator.integers(1, min(len(row), limit), endpoint=True))
        norms.append(_norms_behind(model, path.layer, row[:position], tokens))
    several = torch.stack(norms)
    return ExplosionInContext(
        layer=path.layer,
        threshold=path.threshold,
        table=chosen[["token_id", "token", "named", "non_initial"]].assign(
            median=several.quantile(0.5, dim=0).numpy(),
            lowest=several.amin(dim=0).numpy(),
            highest=several.amax(dim=0).numpy(),
            share=(several > path.threshold).double().mean(dim=0).numpy(),
        ),
        n_contexts=len(beginnings),
    )


def _norms_behind(model: Any, layer: int, beginning: Tensor, tokens: Tensor) -> Float64[Tensor, " token"]:
    """The norm after a block of each token behind one beginning."""
    rows = torch.cat([beginning.expand(len(tokens), -1), tokens[:, None]], dim=1)
    found: list[Tensor] = []

    def read(stream: Tensor) -> None:
        found.append(torch.linalg.vector_norm(stream[:, -1], dim=-1, dtype=torch.float64).cpu())

    run_with_hooks(model, rows, {f"blocks.{layer}.hook_resid_post": read})
    if not torch.isfinite(found[0]).all():
        raise NumericalError(f"the residual stream after block {layer} is not finite in {model.cfg.dtype}")
    return found[0]
