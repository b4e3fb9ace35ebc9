"""Which tokens of a corpus are meant: a position, tokens by their text, or rows of a table."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool

from sd_lens.errors import InputError
from sd_lens.observations.texts import Batch, token_strings

Where = int | Collection[str] | pd.DataFrame | None
"""A position (negative ones from the end of each text), tokens' texts, a table with columns `text` and
`position` such as `HighNormTokens.table`, or None for every token."""


def selected(model: Any, batch: Batch, where: Where) -> Bool[torch.Tensor, "batch pos"]:
    """Which tokens of a batch `where` means; padding never.

    Raises:
        InputError: for a selection of another kind, or a table without the columns.
    """
    check_where(where)
    n_rows, n_positions = batch.tokens.shape
    if where is None:
        return batch.real
    if isinstance(where, int):
        lengths = batch.real.sum(dim=1, keepdim=True)
        return batch.real & (torch.arange(n_positions) == (where if where >= 0 else lengths + where))
    if isinstance(where, pd.DataFrame):
        mask = torch.zeros_like(batch.real)
        here = where[(where.text >= batch.first_text) & (where.text < batch.first_text + n_rows)]
        here = here[(here.position >= 0) & (here.position < n_positions)]
        mask[torch.tensor(here.text.to_numpy() - batch.first_text), torch.tensor(here.position.to_numpy())] = True
        return mask & batch.real
    wanted = {where} if isinstance(where, str) else set(where)
    ids = batch.tokens.unique()
    names = token_strings(model, ids)
    chosen = torch.tensor([int(i) for i, name in zip(ids, names, strict=True) if name in wanted], dtype=torch.long)
    return torch.isin(batch.tokens, chosen) & batch.real


def check_where(where: Where) -> None:
    """Whether this is a way to select tokens.

    Raises:
        InputError: for another kind of thing, a collection of others than strings, or a table without integer columns
            text and position.
    """
    if isinstance(where, bool) or not (where is None or isinstance(where, int | Collection | pd.DataFrame)):
        raise InputError(f"where={where!r}: expected a position, tokens, a table with text and position, or None")
    if isinstance(where, pd.DataFrame):
        for column in ("text", "position"):
            if column not in where.columns:
                raise InputError(f"the table of tokens has no column {column!r}; it needs text and position")
            if not pd.api.types.is_integer_dtype(where[column]) or bool(where[column].isna().any()):
                raise InputError(f"column {column!r} of the table of tokens holds others than integers")
    elif isinstance(where, Collection) and not all(isinstance(token, str) for token in where):
        raise InputError("where: a collection must hold tokens as text, such as [' the']")
