"""The explosion subspace: which inputs an MLP turns into large writes, and what carries tokens there."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import neuron_map
from sd_lens.linear.coefficients import CoefficientParts, coefficient_parts
from sd_lens.linear.lone_token import mlp_input, mlp_output
from sd_lens.linear.maps import computing_dtype
from sd_lens.models.blocks import block_weights
from sd_lens.models.hooks import run_with_hooks
from sd_lens.models.views import BlockWeights
from sd_lens.observations.texts import token_strings
from sd_lens.observations.vocabulary import TOKENS_AT_ONCE, chosen_tokens, embedding_norms, is_untrained

ENOUGH = 0.9
"""So many dimensions matter as give this share of the norm that the whole input gives."""

_N_SAMPLES = 128
"""Tokens whose inputs are cut down to a few dimensions: medians need no more."""


@dataclass(frozen=True, eq=False)
class ExplosionSubspace:
    """The right singular vectors `v_i` of an MLP's linear map, what it makes of them, and how tokens lie to `v_1`.

    Attributes:
        layer: the MLP's block, 0-based.
        scale: the length of the inputs `scale * v_i`: the median length of tokens' inputs, in the initial position.
        values: singular values of the linear map from the MLP's input, largest first.
        outputs: norm of what the MLP itself writes for `scale * v_i`, with the sign of `v_i` that writes more.
        opposite: the same for `-scale * v_i`.
        v1: the leading right singular vector, with that sign.
        n_dimensions: how many leading `v_i` the tokens' inputs were cut down to for `kept` and `removed`.
        kept: median norm of what the MLP writes for tokens in the initial position, with nothing else of their input.
        removed: the same with everything but these dimensions of their input.
        table: token_id, token, untrained, then for position `initial` (the only token of a text) and `second` (behind a
            random token) the coefficient of the MLP's input on `v1`, and its parts `_token`, `_attention` and
            `_norm` (see `CoefficientParts`), which sum to it.
        model_name: as TransformerLens calls the model.
    """

    layer: int
    scale: float
    values: Float64[Tensor, " k"]
    outputs: Float64[Tensor, " k"]
    opposite: Float64[Tensor, " k"]
    v1: Float[Tensor, " d_model"]
    n_dimensions: tuple[int, ...]
    kept: Float64[Tensor, " n"]
    removed: Float64[Tensor, " n"]
    table: pd.DataFrame = field(repr=False)
    model_name: str

    @property
    def n_sufficient(self) -> int:
        """The fewest leading dimensions that give nine tenths of the norm that tokens' whole input gives."""
        return next(n for n, norm in zip(self.n_dimensions, self.kept, strict=True) if norm >= ENOUGH * self.kept[-1])

    @property
    def n_necessary(self) -> int:
        """The fewest leading dimensions without which less than a tenth of that norm is left."""
        left = (1 - ENOUGH) * float(self.kept[-1])
        return next(n for n, norm in zip(self.n_dimensions, self.removed, strict=True) if norm < left)

    @property
    def sources(self) -> pd.DataFrame:
        """Median coefficient of the trained tokens and its median parts, in either position."""
        trained = self.table[~self.table.untrained]
        rows = {
            place: [trained[name].median() for name in (place, *(f"{place}_{part}" for part in _PARTS))]
            for place in ("initial", "second")
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["coefficient", *_PARTS])

    def __str__(self) -> str:
        medians = self.sources.coefficient
        return (
            f"ExplosionSubspace of {self.model_name}, block {self.layer}: inputs of length {self.scale:.3g} along v1 "
            f"make the MLP write {float(self.outputs[0]):,.4g}, turned round {float(self.opposite[0]):,.4g}; tokens' "
            f"own inputs {float(self.kept[-1]):,.4g}, with v1 alone {float(self.kept[0]):,.4g}, without it "
            f"{float(self.removed[0]):,.4g}; median coefficient {medians['initial']:.3g} in the initial position, "
            f"{medians['second']:.3g} in the second"
        )

    __repr__ = __str__


_PARTS = ("token", "attention", "norm")


@torch.no_grad()
def explosion_subspace(
    model: Any,
    layer: int,
    *,
    token_ids: Int[Tensor, " token"] | None = None,
    batch_tokens: int = TOKENS_AT_ONCE,
    seed: int = 0,
    progress: bool = True,
) -> ExplosionSubspace:
    """What the MLP of block `layer` makes of its right singular directions, and how every token lies to the first.

    The linear map is the Gaussian fit from the MLP's input (behind the norm) to its write; what it *really* writes for
    `+v_i` and `-v_i` is then computed with the MLP itself, for inputs as long as those of tokens. All right singular
    vectors are wanted, so this is the one place that takes a dense d_model x d_model decomposition.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not; no tokenizer is needed.
        layer: 0-based, such as one of `forecast(model).explosion_layers`.
        token_ids: look at these tokens only; the whole vocabulary by default.
        batch_tokens: texts of one or two tokens run at a time: bounds memory.
        seed: of the tokens that stand in front of those in the second position, and of the sample that is cut down.
        progress: show a progress bar.

    Raises:
        InputError: for a block or tokens that do not exist.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: if a stream is not finite.

    Source: Wang et al. 2025, section 4 (explosion subspace, subspace coefficient).
    """
    block = block_weights(model, layer)
    if batch_tokens < 1:
        raise InputError(f"batch_tokens={batch_tokens}: expected at least 1")
    ids = chosen_tokens(model, token_ids)
    untrained = is_untrained(embedding_norms(model))
    generator = np.random.default_rng(seed)
    trained = (~untrained).nonzero()[:, 0]
    sample = torch.from_numpy(generator.choice(trained.numpy(), min(_N_SAMPLES, len(trained)), replace=False))
    inputs = _initial_inputs(model, block, sample)
    scale = float(inputs.double().norm(dim=1).median())
    _, values, Vh = torch.linalg.svd(neuron_map(block).dense())
    written = torch.stack([_norms(mlp_output(block, sign * scale * Vh)) for sign in (1, -1)])
    turned = written[1] > written[0]
    outputs, opposite = written.amax(dim=0), written.amin(dim=0)
    v1 = -Vh[0] if bool(turned[0]) else Vh[0]
    n_dimensions = _grid(len(Vh))
    kept, removed = _cut_down(block, inputs, Vh, n_dimensions)
    front = trained[torch.from_numpy(generator.integers(len(trained), size=len(ids)))]
    with tqdm(total=2 * len(ids), desc="explosion subspace", unit="text", disable=not progress, leave=False) as bar:
        initial = _coefficients(model, block, ids[:, None], v1, batch_tokens, bar)
        second = _coefficients(model, block, torch.stack([front, ids], dim=1), v1, batch_tokens, bar)
    return ExplosionSubspace(
        layer=layer,
        scale=scale,
        values=values.double().cpu(),
        outputs=outputs,
        opposite=opposite,
        v1=v1.cpu(),
        n_dimensions=n_dimensions,
        kept=kept,
        removed=removed,
        table=pd.DataFrame(
            {
                "token_id": ids.numpy(),
                "token": pd.Series(token_strings(model, ids), dtype="str"),
                "untrained": untrained[ids].numpy(),
                **_columns("initial", initial),
                **_columns("second", second),
            }
        ),
        model_name=str(getattr(model.cfg, "model_name", "model")),
    )


def _norms(written: Float[Tensor, "n d_model"]) -> Float64[Tensor, " n"]:
    norms: Tensor = torch.linalg.vector_norm(written, dim=-1, dtype=torch.float64).cpu()
    return norms


def _grid(d: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, ... and d: even steps on a logarithm."""
    powers = [n for k in range(d.bit_length()) for n in (2**k, 3 * 2 ** (k - 1) if k else 2**k)]
    return tuple(sorted({n for n in powers if n < d} | {d}))


def _cut_down(
    block: BlockWeights, inputs: Float[Tensor, "token d_model"], Vh: Float[Tensor, "k d_model"], ns: tuple[int, ...]
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Median norms of the MLP's writes with, and without, the leading dimensions of its inputs."""
    along = inputs @ Vh.mT
    parts = [along[:, :n] @ Vh[:n] for n in ns]
    kept = torch.stack([_norms(mlp_output(block, part)).quantile(0.5) for part in parts])
    removed = torch.stack([_norms(mlp_output(block, inputs - part)).quantile(0.5) for part in parts])
    return kept, removed


def _streams(model: Any, block: BlockWeights, tokens: Int64[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
    """The last token's stream in front of the block, and what attention adds to it before the MLP reads it."""
    found: dict[str, Tensor] = {}
    names = [f"blocks.{block.layer}.hook_{point}" for point in ("resid_pre", "attn_out")]

    def keep(name: str, activation: Tensor) -> None:
        found[name] = activation[:, -1].detach().clone()

    run_with_hooks(model, tokens, {name: partial(keep, name) for name in names})
    if not all(bool(torch.isfinite(x).all()) for x in found.values()):
        raise NumericalError(f"the residual stream in block {block.layer} is not finite in {model.cfg.dtype}")
    x, attention_out = (found[name].to(computing_dtype(block.W_in.dtype)) for name in names)
    return x, 0 * attention_out if block.parallel else attention_out


def _initial_inputs(model: Any, block: BlockWeights, ids: Int64[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    x, attention_out = _streams(model, block, ids[:, None])
    return mlp_input(block, x + attention_out)


def _coefficients(
    model: Any,
    block: BlockWeights,
    texts: Int64[Tensor, "text pos"],
    v1: Float[Tensor, " d_model"],
    batch_tokens: int,
    bar: tqdm[Any],
) -> CoefficientParts:
    """The parts of the coefficient of the last token of each text."""
    found = []
    for tokens in texts.split(max(1, batch_tokens // texts.shape[1])):
        found.append(coefficient_parts(block.mlp_norm, *_streams(model, block, tokens), v1))
        bar.update(len(tokens))
    return CoefficientParts(*(torch.cat([getattr(parts, name) for parts in found]).cpu() for name in _PARTS))


def _columns(place: str, parts: CoefficientParts) -> dict[str, np.ndarray]:
    return {place: parts.total.numpy()} | {f"{place}_{name}": getattr(parts, name).numpy() for name in _PARTS}
