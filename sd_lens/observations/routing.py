"""Where a router sends the tokens of a corpus: the mean weight of every expert."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.maps import computing_dtype
from sd_lens.linear.mixtures import RouterWeighted, router_weights
from sd_lens.models.blocks import wanted_mixtures
from sd_lens.models.hooks import run_with_hooks
from sd_lens.models.views import MixtureWeights
from sd_lens.observations.norms import not_finite
from sd_lens.observations.selection import Where, check_where, selected
from sd_lens.observations.texts import Batch, Texts, batches


def capture_router_weights(
    model: Any,
    texts: Texts,
    layers: Iterable[int] | None = None,
    *,
    where: Where = None,
    batch_tokens: int = 4096,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> RouterWeighted:
    """The mean weight that each expert of a mixture has over the tokens of a corpus, 0 where it is not run.

    The result is a linearization for `singular_defects`, `singular_spectra` and `defect_eigenvalues`. Routers are
    evaluated in float32 (float64 for float64 weights) on the streams of the running model, so that in half precision a
    near tie may go to another expert than in the run itself. Means are sums in float64; no stream is kept.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors (`[pos]` or `[n, pos]`), read once.
        layers: 0-based blocks that are mixtures of experts; all of them by default.
        where: which tokens: a position, tokens by their text, a table such as `found.table`, or None for all.
        batch_tokens: tokens run at a time.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        progress: show a progress bar.

    Raises:
        InputError: for blocks that do not exist or have a single MLP, texts that cannot be used, or if no token is
            meant.
        NotSupportedError: for an architecture that is not covered.
        NumericalError: if streams are not finite.
    """
    check_where(where)
    mixtures = wanted_mixtures(model, layers)
    sums = {block.layer: torch.zeros(len(block.experts), dtype=torch.float64) for block in mixtures}
    n_tokens = 0

    def observe(block: MixtureWeights, batch: Batch, mask: Tensor, stream: Tensor) -> None:
        rows = stream[mask.to(stream.device)]
        if not torch.isfinite(rows).all():
            raise NumericalError(not_finite(f"blocks.{block.layer}.hook_resid_mid", batch, stream.dtype))
        found = router_weights(block, rows.to(computing_dtype(rows.dtype)))
        sums[block.layer] += found.sum(dim=0, dtype=torch.float64).cpu()

    for batch in batches(
        model, texts, prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress, description="routers"
    ):
        mask = selected(model, batch, where)
        n_tokens += int(mask.sum())
        run_with_hooks(
            model,
            batch.tokens,
            {f"blocks.{block.layer}.hook_resid_mid": partial(observe, block, batch, mask) for block in mixtures},
        )
    if n_tokens == 0:
        raise InputError(f"where={where!r} means no token of these texts")
    return RouterWeighted(tuple(sums), torch.stack([*sums.values()]) / n_tokens, n_tokens)
