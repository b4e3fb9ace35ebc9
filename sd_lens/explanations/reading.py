"""Activations at tokens: of a batch that is run, or of one text that is run or that the user has cached."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.models.hooks import run_with_hooks

Tokens = tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]
"""Rows and positions of n tokens in a batch."""


def at_tokens(
    model: Any, tokens: Int[Tensor, "batch pos"], names: list[str], which: Tokens
) -> dict[str, Float[Tensor, "n ..."]]:
    """The activations at n tokens of a batch; no others are kept."""
    found: dict[str, Tensor] = {}

    def keep(name: str, activation: Tensor) -> None:
        found[name] = _taken(activation, tokens, which)

    run_with_hooks(model, tokens, {name: partial(keep, name) for name in names})
    return found


def at_last_token(
    model: Any, row: Int[Tensor, " pos"], names: list[str], cache: Any | None = None
) -> dict[str, Float[Tensor, "1 ..."]]:
    """Activations of a text's last token. A cache may go on behind it: a causal model does not see that.

    Raises:
        InputError: if the cache lacks a point, holds several texts, or a shorter one.
    """
    last = (torch.tensor([0]), torch.tensor([len(row) - 1]))
    if cache is None:
        return at_tokens(model, row[None], names, last)
    return {name: _taken(_cached(cache, name, row)[:, : len(row)], row[None], last) for name in names}


def of_text(
    model: Any, row: Int[Tensor, " pos"], names: list[str], cache: Any | None = None
) -> dict[str, Float[Tensor, "1 ..."]]:
    """Activations of the whole text, `[1, pos, ...]`; a longer cache is not cut.

    Raises:
        InputError: as `at_last_token`.
    """
    if cache is not None:
        return {name: _cached(cache, name, row).detach() for name in names}
    found: dict[str, Tensor] = {}

    def keep(name: str, activation: Tensor) -> None:
        found[name] = activation.detach()

    run_with_hooks(model, row[None], {name: partial(keep, name) for name in names})
    return found


def peak_block(streams: dict[str, Float[Tensor, "1 d_model"]]) -> int:
    """The block after which a token's norm is largest, of its streams after every block in order."""
    return int(torch.stack([stream[0].double().norm() for stream in streams.values()]).argmax())


def _taken(activation: Tensor, tokens: Int[Tensor, "batch pos"], which: Tokens) -> Tensor:
    """The chosen tokens' part of a `[batch, pos, ...]` activation; positional embeddings may lack the batch."""
    whole = activation if activation.ndim >= 3 else activation[None]
    rows, positions = (index.to(activation.device) for index in which)
    return whole.expand(*tokens.shape, *whole.shape[2:])[rows, positions].detach()


def _cached(cache: Any, name: str, row: Int[Tensor, " pos"]) -> Tensor:
    if name not in cache:
        raise InputError(f"the cache lacks {name!r}: make it with model.run_with_cache(tokens) without a filter")
    whole: Tensor = cache[name]
    if not getattr(cache, "has_batch_dim", True) or whole.ndim < 3:
        whole = whole[None]
    n_texts, n_tokens = whole.shape[0], whole.shape[2 if name.endswith("hook_pattern") else 1]
    if n_texts != 1 or n_tokens < len(row):
        raise InputError(f"the cache holds {n_texts} texts of {n_tokens} tokens: expected one of {len(row)} or more")
    return whole
