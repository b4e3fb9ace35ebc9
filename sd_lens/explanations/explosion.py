"""How norms explode: every vocabulary token on the initial and on the non-initial path, and random embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float64, Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, NumericalError
from sd_lens.models.blocks import check_layer
from sd_lens.models.hooks import Callback, run_with_hooks
from sd_lens.observations.histograms import NormHistogram, norm_gaps
from sd_lens.observations.texts import token_strings
from sd_lens.observations.vocabulary import (
    TOKENS_AT_ONCE,
    chosen_tokens,
    embedding_norms,
    is_untrained,
    random_embeddings,
)


@dataclass(frozen=True, eq=False)
class ExplosionPath:
    """The norm of every vocabulary token after one block, as the only token of a text; blocks are 0-based.

    Attributes:
        layer: the block after which norms are read.
        threshold: the norm above which a token counts as exploded.
        table: token_id, token, embedding_norm, initial, non_initial, explodes; one row per token, the largest
            `non_initial` first. `initial` is the norm with attention, `non_initial` the norm with the outputs of all
            attention zeroed; `explodes` tells whether the latter exceeds the threshold: the tokens that the path
            names as exploding at non-initial positions.
        untrained: the same of the tokens whose embedding is shorter than a tenth of the mean.
        random: norms of random embeddings of the mean norm of trained ones, with attention.
        model_name: as TransformerLens calls the model.
    """

    layer: int
    threshold: float
    table: pd.DataFrame = field(repr=False)
    untrained: pd.DataFrame = field(repr=False)
    random: Float64[Tensor, " n"]
    model_name: str

    @property
    def initial_rate(self) -> float:
        """Share of the trained tokens that explode on the initial path."""
        return float((self.table.initial > self.threshold).mean())

    @property
    def non_initial_rate(self) -> float:
        """Share of the trained tokens that explode on the non-initial path."""
        return float(self.table.explodes.mean())

    @property
    def random_rate(self) -> float:
        """Share of the random embeddings that explode on the initial path."""
        return float((self.random > self.threshold).double().mean())

    def __str__(self) -> str:
        return (
            f"ExplosionPath of {self.model_name}: after block {self.layer} {100 * self.initial_rate:.1f} % of "
            f"{len(self.table):,} tokens and {100 * self.random_rate:.1f} % of random embeddings exceed "
            f"{self.threshold:,.4g}; without attention {int(self.table.explodes.sum()):,} tokens"
        )

    __repr__ = __str__


def explosion_path(
    model: Any,
    layer: int,
    threshold: float | Literal["auto"] = "auto",
    *,
    token_ids: Int[Tensor, " token"] | None = None,
    n_random: int = 1024,
    batch_tokens: int = TOKENS_AT_ONCE,
    seed: int = 0,
    progress: bool = True,
) -> ExplosionPath:
    """The norms after block `layer` of all vocabulary tokens as one-token texts, with and without attention.

    With attention a token stands in the initial position, where it sees itself alone (the *initial path*). With the
    outputs of attention zeroed in every block it goes the way of a token at a later position whose attention writes
    nothing (the *non-initial path*). Runs end at the block.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not; no tokenizer is needed.
        layer: 0-based, such as one of `forecast(model).explosion_layers`.
        threshold: a norm; `"auto"` looks for a gap above the norms of the non-initial path (`norm_gaps` has the rule).
        token_ids: scan these tokens only; the whole vocabulary by default.
        n_random: how many random embeddings to run on the initial path.
        batch_tokens: one-token texts run at a time: bounds memory.
        seed: of the random embeddings.
        progress: show a progress bar.

    Raises:
        InputError: for a block that does not exist, a number that cannot be used, or if no norm explodes.
        NumericalError: if a norm is not finite.

    Source: Wang et al. 2025, section 4 (initial and non-initial paths, untrained tokens, random embeddings).
    """
    check_layer(model, layer)
    if threshold != "auto" and not (isinstance(threshold, int | float) and 0 < threshold < math.inf):
        raise InputError(f"threshold={threshold!r}: expected 'auto' or a positive number")
    if n_random < 1 or batch_tokens < 1:
        raise InputError(f"n_random={n_random}, batch_tokens={batch_tokens}: expected at least 1")
    ids = chosen_tokens(model, token_ids)
    lengths = embedding_norms(model)
    untrained = is_untrained(lengths)
    probes = random_embeddings(
        n_random, model.cfg.d_model, float(lengths[~untrained].mean()), model.cfg.dtype, seed=seed
    )
    switched_off = {f"blocks.{before}.hook_attn_out": torch.zeros_like for before in range(layer + 1)}
    with tqdm(
        total=2 * len(ids) + n_random, desc="explosion path", unit="token", disable=not progress, leave=False
    ) as bar:
        initial = _norms(model, layer, ids, {}, batch_tokens, bar)
        non_initial = _norms(model, layer, ids, switched_off, batch_tokens, bar)
        random = torch.cat(
            [
                _norms(
                    model, layer, ids[:1].expand(len(part)), {"blocks.0.hook_resid_pre": partial(_put, part)}, 0, bar
                )
                for part in probes.split(batch_tokens)
            ]
        )
    cut = _gap(initial, non_initial, layer) if threshold == "auto" else float(threshold)
    table = pd.DataFrame(
        {
            "token_id": ids.numpy(),
            "token": pd.Series(token_strings(model, ids), dtype="str"),
            "embedding_norm": lengths[ids].numpy(),
            "initial": initial.numpy(),
            "non_initial": non_initial.numpy(),
            "explodes": (non_initial > cut).numpy(),
        }
    ).sort_values("non_initial", ascending=False, kind="stable")
    is_apart = untrained[ids].numpy()[table.index]
    return ExplosionPath(
        layer=layer,
        threshold=cut,
        table=table[~is_apart].reset_index(drop=True),
        untrained=table[is_apart].reset_index(drop=True),
        random=random,
        model_name=str(getattr(model.cfg, "model_name", "model")),
    )


def _put(streams: Tensor, activation: Tensor) -> Tensor:
    return streams[:, None].to(activation)


def _norms(
    model: Any, layer: int, ids: Tensor, edits: Mapping[str, Callback], batch_tokens: int, bar: tqdm[Any]
) -> Float64[Tensor, " token"]:
    """The norm after a block of one-token texts; `batch_tokens` 0 runs them together."""
    found: list[Tensor] = []

    def read(stream: Tensor) -> None:
        found.append(torch.linalg.vector_norm(stream[:, 0], dim=-1, dtype=torch.float64).cpu())

    for part in ids.split(batch_tokens or len(ids)):
        run_with_hooks(model, part[:, None], {**edits, f"blocks.{layer}.hook_resid_post": read})
        if not torch.isfinite(found[-1]).all():
            raise NumericalError(
                f"the residual stream of one-token texts is not finite after block {layer}, in {model.cfg.dtype}: "
                "load the model in float32 or bfloat16"
            )
        bar.update(len(part))
    return torch.cat(found)


def _gap(initial: Float64[Tensor, " token"], non_initial: Float64[Tensor, " token"], layer: int) -> float:
    ordinary, every = NormHistogram(1), NormHistogram(1)
    ordinary.add(0, non_initial)
    every.add(0, torch.cat([initial, non_initial]))
    cut = float(norm_gaps(ordinary, every)[0])
    if math.isinf(cut):
        raise InputError(
            f"no norm explodes after block {layer}: no gap separates high norms of one-token texts from ordinary ones; "
            "name another block, such as one of forecast(model).explosion_layers, or pass threshold as a number"
        )
    return cut
