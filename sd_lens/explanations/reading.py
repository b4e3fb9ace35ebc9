"""Activations of one text, from a run of the model or from a cache that the user has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.models.hooks import run_with_hooks


def at_last_token(
    model: Any, row: Int[Tensor, " pos"], names: list[str], cache: Any | None = None
) -> dict[str, Float[Tensor, "1 ..."]]:
    """Activations of the text's last token. A cache may go on behind it: a causal model does not see that.

    Raises:
        InputError: if the cache lacks a point, holds several texts, or a shorter one.
    """
    return _read(model, row, names, cache, lambda x: x[:, len(row) - 1])


def of_text(
    model: Any, row: Int[Tensor, " pos"], names: list[str], cache: Any | None = None
) -> dict[str, Float[Tensor, "1 ..."]]:
    """Activations of the whole text, `[1, pos, ...]`; a longer cache is not cut.

    Raises:
        InputError: as `at_last_token`.
    """
    return _read(model, row, names, cache, lambda x: x)


def _read(
    model: Any, row: Tensor, names: list[str], cache: Any | None, part: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str, activation: Tensor) -> None:
        whole = activation if activation.ndim >= 3 else activation[None]  # positional embeddings may lack the batch
        found[name] = part(whole).detach()

    if cache is None:
        run_with_hooks(model, row[None], {name: partial(keep, name) for name in names})
        return found
    for name in names:
        if name not in cache:
            raise InputError(f"the cache lacks {name!r}: make it with model.run_with_cache(tokens) without a filter")
        whole = cache[name] if getattr(cache, "has_batch_dim", True) else cache[name][None]
        n_texts, n_tokens = whole.shape[0], whole.shape[2 if name.endswith("hook_pattern") else 1]
        if n_texts != 1 or n_tokens < len(row):
            raise InputError(
                f"the cache holds {n_texts} texts of {n_tokens} tokens: expected one of {len(row)} or more"
            )
        keep(name, whole)
    return found
