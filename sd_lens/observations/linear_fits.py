"""Fitting blocks by linear maps on the activations of a corpus: one pass, which keeps sums alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.captured import Captured, LeastSquares
from sd_lens.linear.lone_token import normalized
from sd_lens.linear.maps import computing_dtype
from sd_lens.models.blocks import wanted_blocks
from sd_lens.models.hooks import Callback, run_with_hooks
from sd_lens.models.views import BlockWeights
from sd_lens.observations.norms import not_finite
from sd_lens.observations.texts import Batch, Texts, batches


def capture_linear_maps(
    model: Any,
    texts: Texts,
    layers: Iterable[int] | None = None,
    *,
    ridge: float = 1e-6,
    batch_tokens: int = 4096,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Captured:
    """Blocks as linear maps: least-squares fits of their norms and neurons on the activations of a corpus.

    The fits have no intercept, like the paper's on random inputs, and are not weighted. A token whose norm is a
    hundred times larger enters the normal equations with ten thousand times the weight: near its direction, the fits
    are those of the high-norm tokens, whatever the others do there. In the block of SmolLM2 that makes the explosion, F
    misses 0.3 % of the squared length of what the MLP writes at high-norm tokens, and at the others many times what it
    writes (docs/linearizations.md measures it).

    Where norms stand behind attention and MLP (Gemma 2, 3), their scale is part of what is fitted: norm and neurons
    are divided by the scale of their write in this run. Attention's is that of a token among the others, although A
    is the attention of a token alone.

    Needs memory for `3 d_model^2 + d_model d_mlp` numbers in float64 per block (15 MB for SmolLM2), however large
    the corpus; name a few `layers` of a large model.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors (`[pos]` or `[n, pos]`), read once.
        layers: 0-based blocks; all by default.
        ridge: penalty on the squared entries of the fits, relative to the mean over dimensions of the inputs' sum of
            squares. Directions in which the stream varies by less are shrunk.
        batch_tokens: tokens run at a time.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        progress: show a progress bar.

    Raises:
        InputError: for texts that cannot be used or have fewer tokens than the model's width, for blocks that do not
            exist, or a negative ridge.
        NotSupportedError: for an architecture that is not covered.
        NumericalError: if activations are not finite, or do not determine the fits.

    Example:
        >>> capture_linear_maps(model, sd_lens.default_texts(), progress=False)  # doctest: +SKIP
        Captured: linear fits of 30 blocks on 4218 tokens
    """
    if not 0 <= ridge < math.inf:
        raise InputError(f"ridge={ridge}: expected 0 or a positive number")
    fits = {block.layer: BlockFits(block) for block in wanted_blocks(model, layers)}
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress, description="linear fits"
    ):
        run_with_hooks(model, batch.tokens, {k: v for fit in fits.values() for k, v in fit.callbacks(batch).items()})
    norms, neurons = zip(*(fit.solve(ridge) for fit in fits.values()), strict=True)
    n_tokens = next(iter(fits.values())).norm.n
    return Captured(tuple(fits), torch.stack(norms), torch.stack(neurons), n_tokens)


class BlockFits:
    """Accumulates the fits of one block, batch by batch.

    Attributes:
        norm: attention's norm on the stream in front of the block.
        neurons: the MLP's neurons on the stream that the MLP reads.
    """

    def __init__(self, block: BlockWeights):
        self.block = block
        self._gain_alone = replace(block.attention_norm, bias=None)
        self.norm = LeastSquares(block.d_model, block.d_model, block.W_in.device)
        self.neurons = LeastSquares(block.d_model, block.W_out.shape[0], block.W_in.device)
        self._resid_pre = f"blocks.{block.layer}.hook_resid_pre"
        self._mlp_input = self._resid_pre if block.parallel else f"blocks.{block.layer}.hook_resid_mid"
        self._hook_post = f"blocks.{block.layer}.mlp.hook_post"
        self._attention_scale = f"blocks.{block.layer}.ln1_post.hook_scale"
        self._mlp_scale = f"blocks.{block.layer}.ln2_post.hook_scale"

    def callbacks(self, batch: Batch) -> dict[str, Callback]:
        """What has to see a run of the batch for its real tokens to be added; they are, once the block has run."""
        names = {self._resid_pre, self._mlp_input, self._hook_post}
        names |= {self._attention_scale} if self.block.attention_post_gain is not None else set()
        names |= {self._mlp_scale} if self.block.mlp_post_gain is not None else set()
        found: dict[str, Tensor] = {}

        def observe(name: str, activation: Tensor) -> None:
            found[name] = real_rows(activation.detach(), batch.real)
            if not torch.isfinite(found[name]).all():
                raise NumericalError(not_finite(name, batch, activation.dtype))
            if len(found) == len(names):
                self._add(found)
                found.clear()

        return {name: partial(observe, name) for name in names}

    def _add(self, found: dict[str, Tensor]) -> None:
        x = found[self._resid_pre].double()
        self.norm.add(x, normalized(self._gain_alone, x) / found.get(self._attention_scale, 1))
        self.neurons.add(found[self._mlp_input], found[self._hook_post].double() / found.get(self._mlp_scale, 1))

    def solve(self, ridge: float) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_mlp d_model"]]:
        """N and M, in the type that computes with the block's weights."""
        dtype = computing_dtype(self.block.W_in.dtype)
        return self.norm.solve(ridge).to(dtype), self.neurons.solve(ridge).to(dtype)


def real_rows(activation: Float[Tensor, "*shape"], real: Bool[Tensor, "batch pos"]) -> Float[Tensor, "n features"]:
    """A copy of the activations of a batch's real tokens; the bridge has the MLP of OPT run on `[batch * pos]`."""
    return activation.reshape(real.numel(), -1)[real.flatten().to(activation.device)]
