"""Which `W_out` suffers from rounding, forecast from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.applications.schemes import W8A8, QuantizationScheme, absmax, rounded
from sd_lens.errors import InputError, NumericalError
from sd_lens.explanations.forecast import without_attention
from sd_lens.linear.lone_token import after_block, lone_attention, mlp_input, mlp_neurons
from sd_lens.linear.maps import computing_dtype
from sd_lens.models.blocks import wanted_blocks
from sd_lens.models.views import BlockWeights
from sd_lens.observations.vocabulary import embedding_norms, embeddings, is_untrained, random_embeddings


@dataclass(frozen=True, eq=False)
class RoundingForecast:
    """What rounding the input of each block's `W_out` will do to ordinary tokens.

    Attributes:
        table: layer; initial_peak, the largest absolute neuron of any token in the initial position; ordinary_peak, of
            an ordinary token (median over tokens); error, the length of what rounding adds to the stream of an ordinary
            token, over that of the stream behind the block (median over tokens).
        scheme: how activations are rounded.
        n_probes: probes that were asked for on each of the two paths.
    """

    table: pd.DataFrame = field(repr=False)
    scheme: QuantizationScheme
    n_probes: int

    @property
    def ranking(self) -> tuple[int, ...]:
        """The blocks, those that suffer most first."""
        return tuple(self.table.sort_values("error", ascending=False, kind="stable").layer.tolist())

    def __str__(self) -> str:
        worst = ", ".join(f"{layer} ({self.table.error[layer]:.2g})" for layer in self.ranking[:5])
        return f"RoundingForecast ({self.scheme}): relative errors are largest in blocks {worst}"

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block."""
        return self.table.copy()


@torch.no_grad()
def forecast_rounding(
    model: Any, scheme: QuantizationScheme = W8A8, *, n_probes: int = 256, seed: int = 0, progress: bool = True
) -> RoundingForecast:
    """Forecast the rounding error of each block's `W_out` from the weights alone: no text is run.

    As in `forecast`, random embeddings are carried through the blocks as tokens that see only themselves (the initial
    path, on which they explode); and tokens of the vocabulary with attention switched off (ordinary tokens). Under
    tensor-wise rounding both share one step, which the exploding ones dictate; the error is that of the ordinary ones.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        scheme: the bits of its activations, and what shares a step; its weights are not rounded here.
        n_probes: how many of each are drawn (untrained tokens left out; all, if there are fewer); at least 16.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        InputError: for too few probes, or a scheme without rounded activations.
        NotSupportedError: for an architecture or activation that is not covered.
        NumericalError: if a stream overflows.

    Source: the paths are those of Wang et al. 2025, section 4.
    """
    bits = scheme.activation_bits
    if bits is None:
        raise InputError("the scheme rounds no activations: there is nothing to forecast")
    if n_probes < 16:
        raise InputError(f"n_probes={n_probes}: expected at least 16, or medians mean little")
    blocks = wanted_blocks(model, None)
    initial, ordinary = _probes(model, n_probes, seed, computing_dtype(blocks[0].W_in.dtype))
    rows = []
    for block in tqdm(blocks, desc="rounding forecast", unit="block", disable=not progress, leave=False):
        read = initial if block.parallel else initial + lone_attention(block, initial)
        peaks = mlp_neurons(block, mlp_input(block, read))
        neurons = mlp_neurons(block, mlp_input(block, ordinary))
        initial, ordinary = after_block(block, initial), without_attention(block, ordinary)
        if not (torch.isfinite(initial).all() and torch.isfinite(ordinary).all()):
            raise NumericalError(f"a probe's stream is not finite after block {block.layer}")
        own = absmax(neurons, (-1,))
        initial_peak, ordinary_peak = absmax(peaks), own.median()
        largest = own if scheme.activations == "token" else torch.maximum(initial_peak, ordinary_peak)
        error = _write(block, rounded(neurons, bits, largest) - neurons).norm(dim=1) / ordinary.norm(dim=1)
        rows.append((block.layer, float(initial_peak), float(ordinary_peak), float(error.median())))
    columns = ["layer", "initial_peak", "ordinary_peak", "error"]
    return RoundingForecast(pd.DataFrame(rows, columns=columns), scheme, n_probes)


def _probes(
    model: Any, n: int, seed: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "probe d_model"], Float[Tensor, "token d_model"]]:
    """Random embeddings of the mean length of the vocabulary's, and random ones of its own; untrained ones left out."""
    lengths = embedding_norms(model)
    trained = (~is_untrained(lengths)).nonzero()[:, 0]
    drawn = torch.randperm(len(trained), generator=torch.Generator().manual_seed(seed))[:n]
    vocabulary = embeddings(model, trained[drawn], dtype)
    random = random_embeddings(n, model.cfg.d_model, float(lengths[trained].mean()), dtype, seed=seed)
    return random.to(vocabulary.device), vocabulary


def _write(block: BlockWeights, neurons: Float[Tensor, "token d_mlp"]) -> Float[Tensor, "token d_model"]:
    """What `W_out` makes of neurons, without bias; behind a post-norm, times its gain (its scale is left out)."""
    written = neurons @ block.W_out.to(neurons.dtype)
    return written if block.mlp_post_gain is None else written * block.mlp_post_gain.to(neurons.dtype)
