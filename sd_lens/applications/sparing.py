"""What to spare: the blocks whose `W_out` stays in full precision, and what it is compared with."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch

from sd_lens.errors import InputError
from sd_lens.explanations.forecast import Forecast, forecast
from sd_lens.models.blocks import check_layer
from sd_lens.observations.high_norm import HighNormTokens

Spare = str | Iterable[int] | Forecast | HighNormTokens
"""Blocks by their 0-based index; those that explode or decay by an analysis; or "auto", for a forecast."""


def layers_to_spare(model: Any, spare: Spare) -> tuple[int, ...]:
    """The blocks that are meant, ascending.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        spare: as for `quantize`. `"auto"` makes the forecast anew each time: pass a `Forecast` to make it once.

    Raises:
        InputError: for blocks that do not exist, a word other than "auto", or an analysis without explosion and decay.
        NotSupportedError: for an architecture that the forecast does not cover.

    Source: Wang et al. 2025, section 5.1 (quantization).
    """
    if isinstance(spare, str) and spare == "auto":
        spare = forecast(model, progress=False)
    if isinstance(spare, Forecast | HighNormTokens):
        found = {*spare.explosion_layers, *spare.decay_layers}
        if not found:
            raise InputError("there is nothing to spare: no block explodes or decays; name the blocks to spare")
    elif isinstance(spare, str) or not isinstance(spare, Iterable):
        raise InputError(
            f"spare={spare!r}: expected 'auto', blocks, or the result of forecast or find_high_norm_tokens"
        )
    else:
        found = {_block(layer) for layer in spare}
    for layer in found:
        check_layer(model, layer)
    return tuple(sorted(found))


def _block(layer: Any) -> int:
    """A block's number, numpy's integers included."""
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise InputError(f"spare: {layer!r} is not a block; blocks are numbered from 0")
    return operator.index(layer)


def random_controls(n_layers: int, avoid: Iterable[int], n_controls: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Different random sets of blocks, as many as `avoid` has and none of them.

    Args:
        n_layers: blocks of the model.
        avoid: the blocks that are spared.
        n_controls: how many sets; fewer where there are not so many.
        seed: of the choice.
    """
    spared = set(avoid)
    others = [layer for layer in range(n_layers) if layer not in spared]
    generator = torch.Generator().manual_seed(seed)
    wanted = min(n_controls, math.comb(len(others), len(spared)) if spared else 0)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        chosen = torch.randperm(len(others), generator=generator)[: len(spared)]
        found[tuple(sorted(others[i] for i in chosen.tolist()))] = None
    return list(found)
