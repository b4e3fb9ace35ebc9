"""Tokens whose norm explodes, the layers where it explodes and decays, and their common direction."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.observations.accumulators import Candidates, DirectionSums
from sd_lens.observations.histograms import CUTS, norm_gaps
from sd_lens.observations.norms import NormScan, NormScanner
from sd_lens.observations.texts import Texts, batches, resolved_prepend_bos, token_strings

EXPLOSION_GROWTH = 2.0
"""A token explodes in a block if its norm at least doubles there, itself and relative to ordinary norms."""

DECAY_GROWTH = 2 / 3
"""It decays in a block if it loses at least a third of its norm."""

MAJORITY = 0.5
"""A block is an explosion (decay) layer if so large a share of the high-norm tokens explode (decay) there."""

# Norms from so many running medians on are remembered; the lowest threshold is 2 medians.
_CANDIDATE_RATIO = 1.5


@dataclass(frozen=True, eq=False)
class TokenGroup:
    """The high-norm tokens at initial, or at non-initial, positions.

    Attributes:
        n_tokens: how many tokens exceed the threshold after some block.
        maximum: their largest norm after each block; 0 without tokens.
        median: their median norm after each block; 0 without tokens.
        growth: their median growth factor in each block; 1 without tokens.
        explosion_layers: blocks in which at least half of them explode, ascending.
        decay_layers: blocks in which at least half of them decay, ascending.
    """

    n_tokens: int
    maximum: Float64[Tensor, " layer"]
    median: Float64[Tensor, " layer"]
    growth: Float64[Tensor, " layer"]
    explosion_layers: tuple[int, ...]
    decay_layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class HighNormTokens:
    """What `find_high_norm_tokens` found; layer l is the residual stream after block l, 0-based.

    Attributes:
        table: text, position, token, layer, norm; a row for each layer at which a token has high norm.
        scan: norms of all tokens, for comparison.
        threshold: per layer; inf where no gap separates high norms from ordinary ones.
        n_states: how many (token, layer) states are above it.
        direction: `[d_model]`, unit: the empirical direction, the mean of those states over all layers
            (before the final norm), normalized. None if there are none.
        layer_directions: the same of each layer that has any.
        pairwise_angle: degrees; the angle whose cosine is the mean over all pairs of states. None for
            fewer than two.
        initial: the tokens at position 0.
        non_initial: all others.
    """

    table: pd.DataFrame = field(repr=False)
    scan: NormScan
    threshold: Float64[Tensor, " layer"]
    n_states: int
    direction: Float64[Tensor, " d_model"] | None
    layer_directions: dict[int, Float64[Tensor, " d_model"]]
    pairwise_angle: float | None
    initial: TokenGroup
    non_initial: TokenGroup

    @property
    def explosion_layers(self) -> tuple[int, ...]:
        """Blocks in which the norm of initial or of non-initial high-norm tokens explodes."""
        return tuple(sorted({*self.initial.explosion_layers, *self.non_initial.explosion_layers}))

    @property
    def decay_layers(self) -> tuple[int, ...]:
        """Blocks in which it decays."""
        return tuple(sorted({*self.initial.decay_layers, *self.non_initial.decay_layers}))

    def __str__(self) -> str:
        if self.direction is None:
            return f"HighNormTokens: none found in {self.scan.n_tokens} tokens of {self.scan.n_texts} texts"
        return (
            f"HighNormTokens: {self.initial.n_tokens} initial and {self.non_initial.n_tokens} other tokens of "
            f"{self.scan.n_tokens}; explosion blocks {self.explosion_layers}, decay blocks {self.decay_layers}"
        )

    __repr__ = __str__


def find_high_norm_tokens(
    model: Any,
    texts: Texts,
    threshold: float | Literal["auto"] = "auto",
    *,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    keep_texts: int = 4,
    max_tokens: int = 100_000,
    progress: bool = True,
) -> HighNormTokens:
    """Find the tokens with exploding norms in a corpus, their layers and their direction, in one pass.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors, read once.
        threshold: `"auto"` looks for a gap above the ordinary norms of each layer (`norm_gaps` has the
            rule) and needs texts of two tokens or more; a number is taken as it is, for every layer.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens; `cfg.n_ctx` by default.
        batch_tokens: tokens run at a time: what bounds memory.
        keep_texts: how many of the first texts the scan keeps in full.
        max_tokens: the table, and what is computed from it (`initial`, `non_initial`, the layers), cover the
            first so many tokens that stand out from those read before; direction, angle and `n_states`
            cover all. A warning tells if that makes a difference.
        progress: show a progress bar.

    Raises:
        InputError: for texts or a threshold that cannot be used.
        NumericalError: if the residual stream is not finite.

    Source: Wang et al. 2025, section 2 (high-norm tokens) and 3 (empirical direction).
    """
    if threshold != "auto" and not (isinstance(threshold, int | float) and 0 < threshold < math.inf):
        raise InputError(f"threshold={threshold!r}: expected 'auto' or a positive number")
    scanner = NormScanner(model, keep_texts=keep_texts)
    fixed = None if threshold == "auto" else float(threshold)
    cut = torch.full((len(scanner.points),), fixed or math.inf, dtype=torch.float64)
    sums = DirectionSums(CUTS if fixed is None else torch.tensor([fixed], dtype=torch.float64))
    candidates = Candidates(max_tokens)
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="high-norm tokens",
    ):  # fmt: skip
        norms = scanner.scan(batch, sums.add)
        candidates.add(batch, norms, scanner.ordinary.median() * _CANDIDATE_RATIO if fixed is None else cut)
    if fixed is None:
        if scanner.ordinary.total == 0:
            raise InputError(
                "every text has a single token, so there are no ordinary norms to compare with: "
                "pass longer texts, or a number as threshold"
            )
        cut = norm_gaps(scanner.ordinary, scanner.everything())
    found = _result(model, scanner, resolved_prepend_bos(model, prepend_bos), cut, sums, candidates)
    if len(found.table) < found.n_states:
        warnings.warn(
            f"the table holds {len(found.table)} of {found.n_states} high-norm states: more than "
            f"max_tokens={max_tokens} tokens stand out, or the first texts are unlike the others (shuffle them)",
            stacklevel=2,
        )
    return found


def _result(
    model: Any,
    scanner: NormScanner,
    prepend_bos: bool,
    cut: Float64[Tensor, " point"],
    sums: DirectionSums,
    candidates: Candidates,
) -> HighNormTokens:
    text, position, token, norms = candidates.gathered()
    is_high = norms > cut[:, None]
    keep = is_high[1:].any(dim=0)
    text, position, token = text[keep], position[keep], token[keep]
    norms, is_high = norms[:, keep], is_high[:, keep]
    ordinary_growth = growth_of(scanner.ordinary.median()[:, None])[:, 0]
    initial = position == 0
    per_layer = {layer: sums.above(layer + 1, float(cut[layer + 1])) for layer in range(len(cut) - 1)}
    found = {layer: (n, total) for layer, (n, total) in per_layer.items() if total is not None}
    n_states = sum(n for n, _ in found.values())
    everything = sum((total for _, total in found.values()), start=torch.zeros(2, 1, dtype=torch.float64))
    return HighNormTokens(
        table=_table(model, text, position, token, norms[1:], is_high[1:]),
        scan=scanner.result(prepend_bos),
        threshold=cut[1:],
        n_states=n_states,
        direction=_unit(everything[0]) if found else None,
        layer_directions={layer: _unit(total[0]) for layer, (_, total) in found.items()},
        pairwise_angle=_mean_pairwise_angle(everything[1], n_states),
        initial=token_group(norms[:, initial], is_high[:, initial], ordinary_growth),
        non_initial=token_group(norms[:, ~initial], is_high[:, ~initial], ordinary_growth),
    )


def _unit(v: Float64[Tensor, " d_model"]) -> Float64[Tensor, " d_model"]:
    return torch.nn.functional.normalize(v, dim=0, eps=torch.finfo(v.dtype).tiny)


def _mean_pairwise_angle(unit_sum: Float64[Tensor, " d_model"], n: int) -> float | None:
    if n < 2:
        return None
    # |sum of units|^2 = n + sum over ordered pairs of their cosines
    cosine = (float(unit_sum.square().sum()) - n) / (n * (n - 1))
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def growth_of(norms: Float64[Tensor, "point n"]) -> Float64[Tensor, "layer n"]:
    """By what factor each block multiplies each token's norm."""
    return norms[1:] / norms[:-1].clamp_min(torch.finfo(norms.dtype).tiny)


def token_group(
    norms: Float64[Tensor, "point n"],
    is_high: Bool[Tensor, "point n"],
    ordinary_growth: Float64[Tensor, " layer"],
) -> TokenGroup:
    """Some high-norm tokens, their norms before block 0 and after each block, and the blocks that make them."""
    n_layers, n = norms.shape[0] - 1, norms.shape[1]
    if n == 0:
        zeros = torch.zeros(n_layers, dtype=torch.float64)
        return TokenGroup(0, zeros, zeros, zeros + 1, (), ())
    growth = growth_of(norms)
    least_growth = EXPLOSION_GROWTH * ordinary_growth.clamp_min(1.0)[:, None]
    explodes = is_high[1:] & (growth >= least_growth)
    decays = is_high[:-1] & (growth <= DECAY_GROWTH)
    explosion_layers, decay_layers = (
        tuple((event.double().mean(dim=1) >= MAJORITY).nonzero()[:, 0].tolist()) for event in (explodes, decays)
    )
    return TokenGroup(
        n_tokens=n,
        maximum=norms[1:].max(dim=1).values,
        median=norms[1:].quantile(0.5, dim=1),
        growth=growth.quantile(0.5, dim=1),
        explosion_layers=explosion_layers,
        decay_layers=decay_layers,
    )


def _table(
    model: Any,
    text: Int64[Tensor, " n"],
    position: Int64[Tensor, " n"],
    token: Int64[Tensor, " n"],
    norms: Float64[Tensor, "layer n"],
    is_high: Bool[Tensor, "layer n"],
) -> pd.DataFrame:
    which, layer = is_high.T.nonzero().unbind(dim=1)
    names = token_strings(model, token)
    return pd.DataFrame(
        {
            "text": text[which].numpy(),
            "position": position[which].numpy(),
            "token": pd.Series([names[i] for i in which.tolist()], dtype="str"),
            "layer": layer.numpy(),
            "norm": norms[layer, which].numpy(),
        }
    )
