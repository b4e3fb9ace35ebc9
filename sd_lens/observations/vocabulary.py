"""The vocabulary as the streams that its tokens begin with: lengths, untrained tokens, random ones like them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.models.hooks import run_with_hooks

UNTRAINED = 0.1
"""Tokens whose embedding is shorter than this share of the mean are left out of means and ranks (Wang et al. 2025)."""

TOKENS_AT_ONCE = 2048
"""One-token texts run at a time in scans of the vocabulary: bounds memory."""


def embeddings(model: Any, ids: Int[Tensor, " token"], dtype: torch.dtype) -> Float[Tensor, "token d_model"]:
    """The streams in front of block 0 of one-token texts: embeddings as they are added to, scaled, and positioned."""
    seen: list[Tensor] = []
    run_with_hooks(model, ids[:, None], {"blocks.0.hook_resid_pre": lambda x: seen.append(x[:, 0].to(dtype))})
    return seen[0]


def embedding_norms(model: Any) -> Float64[Tensor, " token"]:
    """The norm of every vocabulary token's stream in front of block 0."""
    ids = torch.arange(model.cfg.d_vocab)
    parts = [embeddings(model, part, torch.float64).norm(dim=1).cpu() for part in ids.split(TOKENS_AT_ONCE)]
    return torch.cat(parts)


def is_untrained(norms: Float64[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """Which tokens of the vocabulary have an embedding shorter than a tenth of the mean."""
    short: Tensor = norms < UNTRAINED * norms.mean()
    return short


def random_embeddings(
    n: int, d_model: int, norm: float, dtype: torch.dtype, *, seed: int
) -> Float[Tensor, "n d_model"]:
    """Random streams of one length, in directions that are uniform on the sphere."""
    drawn = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    streams: Tensor = drawn / drawn.norm(dim=1, keepdim=True) * norm
    return streams


def chosen_tokens(model: Any, token_ids: Int[Tensor, " token"] | None) -> Int64[Tensor, " chosen"]:
    """Some tokens of the vocabulary, ascending and each once; all of them if None.

    Raises:
        InputError: if none is named, or one is not in the vocabulary.
    """
    d_vocab = model.cfg.d_vocab
    if token_ids is None:
        return torch.arange(d_vocab)
    ids: Tensor = torch.as_tensor(token_ids).cpu().long().unique()
    if len(ids) == 0 or int(ids[0]) < 0 or int(ids[-1]) >= d_vocab:
        raise InputError(f"token_ids: expected at least one token id from 0 to {d_vocab - 1}")
    return ids
