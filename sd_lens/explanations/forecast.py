"""Which blocks explode and decay, in which direction, and for which tokens: without running any text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import neuron_map
from sd_lens.linear.lone_token import after_block, lone_attention, mlp_input, mlp_output, mlp_write
from sd_lens.linear.maps import computing_dtype
from sd_lens.linear.spectra import leading_triples
from sd_lens.models.blocks import check_layer, wanted_blocks
from sd_lens.models.views import BlockWeights
from sd_lens.observations.high_norm import TokenGroup, growth_of, token_group
from sd_lens.observations.histograms import NormHistogram, norm_gaps
from sd_lens.observations.texts import token_strings
from sd_lens.observations.vocabulary import (
    TOKENS_AT_ONCE,
    embedding_norms,
    embeddings,
    is_untrained,
    random_embeddings,
)


@dataclass(frozen=True, eq=False)
class Forecast:
    """What the weights say about a model's high-norm tokens; blocks are 0-based.

    Attributes:
        explosion_layers: blocks in which the norm of probes on the initial path explodes.
        decay_layers: blocks in which it decays; the rules are those of `find_high_norm_tokens`.
        direction: `[d_model]`, unit, with its sign: the mean of the probes' states that have high norm, over all
            blocks. None without any.
        norms: median norm of the probes after each block, on the initial path.
        ordinary_norms: the same on the non-initial path.
        score_layer: the block whose MLP the tokens' scores are about, None if there are none: without any
            explosion, or if they were not asked for.
        vocabulary: token_id, token, embedding_norm, untrained, initial, non_initial: the last two are the scores, NaN
            if there are none. The score of a token is the coefficient of that MLP's input (behind its norm) on
            the leading right singular vector of the MLP's linear map, positive on the side that writes more.
        n_probes: how many random embeddings were followed.
        model_name: as TransformerLens calls the model.
    """

    explosion_layers: tuple[int, ...]
    decay_layers: tuple[int, ...]
    direction: Float64[Tensor, " d_model"] | None
    norms: Float64[Tensor, " layer"]
    ordinary_norms: Float64[Tensor, " layer"]
    score_layer: int | None
    vocabulary: pd.DataFrame = field(repr=False)
    n_probes: int
    model_name: str

    def __str__(self) -> str:
        if self.direction is None:
            return f"Forecast of {self.model_name}: no explosion"
        return (
            f"Forecast of {self.model_name}: explosion blocks {self.explosion_layers}, decay blocks "
            f"{self.decay_layers}, largest norm {float(self.norms.max()):,.5g}"
        )

    __repr__ = __str__


@torch.no_grad()
def forecast(
    model: Any,
    *,
    score_layer: int | None = None,
    scores: bool = True,
    n_probes: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Forecast:
    """Forecast explosion and decay from the weights alone: no text is run.

    Random embeddings of the vocabulary's mean norm are carried through every block twice: as a token that sees only
    itself (the initial path), and with attention switched off (the non-initial path, which gives ordinary norms).
    Every vocabulary token is then carried along both paths up to the MLP of one block, and scored there.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        score_layer: the 0-based block of the scores; the first explosion block by default.
        scores: False leaves the tokens' scores NaN, and takes a fraction of the time.
        n_probes: how many random embeddings; at least 16.
        seed: of the random embeddings.
        progress: show a progress bar.

    Raises:
        InputError: for a block that does not exist, or too few probes.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: if a stream overflows.

    Source: Wang et al. 2025, section 4 (initial and non-initial paths, subspace coefficient).
    """
    if n_probes < 16:
        raise InputError(f"n_probes={n_probes}: expected at least 16, or medians mean little")
    if score_layer is not None:
        check_layer(model, score_layer)
    blocks = wanted_blocks(model, None)
    dtype = computing_dtype(blocks[0].W_in.dtype)
    ids = torch.arange(model.cfg.d_vocab)
    lengths = embedding_norms(model)
    untrained = is_untrained(lengths)
    probes = random_embeddings(n_probes, model.cfg.d_model, float(lengths[~untrained].mean()), dtype, seed=seed)
    initial, norms, ordinary, direction = _follow(blocks, probes.to(blocks[0].W_in.device), progress)
    if score_layer is None and initial.explosion_layers:
        score_layer = initial.explosion_layers[0]
    score_layer = score_layer if scores else None
    coefficients = torch.full((2, len(ids)), torch.nan, dtype=torch.float64)
    if score_layer is not None:
        coefficients = _scores(model, blocks[: score_layer + 1], ids, probes, progress)
    return Forecast(
        explosion_layers=initial.explosion_layers,
        decay_layers=initial.decay_layers,
        direction=direction,
        norms=norms,
        ordinary_norms=ordinary,
        score_layer=score_layer,
        vocabulary=pd.DataFrame(
            {
                "token_id": ids.numpy(),
                "token": pd.Series(token_strings(model, ids), dtype="str"),
                "embedding_norm": lengths.numpy(),
                "untrained": untrained.numpy(),
                "initial": coefficients[0].numpy(),
                "non_initial": coefficients[1].numpy(),
            }
        ),
        n_probes=n_probes,
        model_name=str(getattr(model.cfg, "model_name", "model")),
    )


def without_attention(block: BlockWeights, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """The streams after a block whose attention writes nothing: the non-initial path."""
    return x + mlp_write(block, x)


def _follow(
    blocks: list[BlockWeights], probes: Tensor, progress: bool
) -> tuple[TokenGroup, Float64[Tensor, " layer"], Float64[Tensor, " layer"], Float64[Tensor, " d_model"] | None]:
    """The exploding probes as a group, medians on both paths, and the direction of the high-norm states."""
    lone, plain = probes, probes
    states, ordinary = [lone], [plain.double().norm(dim=1)]
    for block in tqdm(blocks, desc="forecast", unit="block", disable=not progress, leave=False):
        lone, plain = after_block(block, lone), without_attention(block, plain)
        if not (torch.isfinite(lone).all() and torch.isfinite(plain).all()):
            raise NumericalError(f"a probe's stream is not finite after block {block.layer}")
        states.append(lone)
        ordinary.append(plain.double().norm(dim=1))
    norms = torch.stack([state.double().norm(dim=1) for state in states]).cpu()
    plain_norms = torch.stack(ordinary).cpu()
    is_high = norms > _thresholds(norms, plain_norms)[:, None]
    ever = is_high[1:].any(dim=0)
    medians = plain_norms.quantile(0.5, dim=1)
    group = token_group(norms[:, ever], is_high[:, ever], growth_of(medians[:, None])[:, 0])
    total = sum(
        (state.double().cpu()[high].sum(dim=0) for state, high in zip(states[1:], is_high[1:], strict=True)),
        start=torch.zeros(probes.shape[1], dtype=torch.float64),
    )
    return group, norms[1:].quantile(0.5, dim=1), medians[1:], total / total.norm() if bool(ever.any()) else None


def _thresholds(norms: Float64[Tensor, "point n"], plain: Float64[Tensor, "point n"]) -> Float64[Tensor, " point"]:
    ordinary, every = NormHistogram(len(norms)), NormHistogram(len(norms))
    for point in range(len(norms)):
        ordinary.add(point, plain[point])
        every.add(point, torch.cat([plain[point], norms[point]]))
    return norm_gaps(ordinary, every)


def _scores(
    model: Any, blocks: list[BlockWeights], ids: Tensor, probes: Tensor, progress: bool
) -> Float64[Tensor, "2 token"]:
    """Coefficients on v1 of the last block's MLP, on the initial and on the non-initial path."""
    *before, last = blocks
    v1 = leading_triples(neuron_map(last)).right[:, 0]

    def initial(x: Tensor) -> Tensor:
        for block in before:
            x = after_block(block, x)
        return mlp_input(last, x if last.parallel else x + lone_attention(last, x))

    def non_initial(x: Tensor) -> Tensor:
        for block in before:
            x = without_attention(block, x)
        return mlp_input(last, x)

    # The side of v1 on which inputs as long as those of the probes make the MLP write more.
    length = initial(probes.to(v1.device)).norm(dim=1).median()
    ahead, behind = mlp_output(last, length * torch.stack([v1, -v1])).norm(dim=1)
    v1 = v1 if ahead >= behind else -v1
    paths: tuple[Callable[[Tensor], Tensor], ...] = (initial, non_initial)
    found = [
        torch.stack([path(x) @ v1 for path in paths]).double().cpu()
        for part in tqdm(ids.split(TOKENS_AT_ONCE), desc="vocabulary", unit="part", disable=not progress, leave=False)
        for x in (embeddings(model, part, probes.dtype),)
    ]
    return torch.cat(found, dim=1)
