"""SmoothQuant: factors that move outliers from activations to weights, where they are easier to round."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.applications.schemes import absmax
from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import run_with_hooks
from sd_lens.models.linear_layers import LinearGroup, Reads, Weight, linear_groups
from sd_lens.observations.linear_fits import real_rows
from sd_lens.observations.norms import not_finite
from sd_lens.observations.texts import Batch, Texts, batches

BEHIND_NORMS: tuple[Reads, ...] = ("attention", "mlp")
"""The inputs that the authors' program smooths: the norm in front takes the factors up."""


@dataclass(frozen=True, eq=False)
class SmoothingFactors:
    """By what the inputs of linear layers are divided, and the rows of their weights multiplied.

    Attributes:
        alpha: how much of the difficulty goes to the weights, 0 to 1.
        factors: by block and what is read there, one factor per input.
        n_tokens: of the calibration.
    """

    alpha: float
    factors: dict[tuple[int, Reads], Float[Tensor, " d_in"]] = field(repr=False)
    n_tokens: int

    def __str__(self) -> str:
        inputs = ", ".join(sorted({reads for _, reads in self.factors}))
        return f"SmoothingFactors (alpha {self.alpha:g}) of {inputs}, calibrated on {self.n_tokens} tokens"

    __repr__ = __str__

    def check(self, groups: Iterable[LinearGroup]) -> None:
        """Whether the factors are those of a model of this shape.

        Raises:
            InputError: if not.
        """
        sizes = {(group.layer, group.reads): len(_weight_sizes(group)) for group in groups}
        for key, factor in self.factors.items():
            if sizes.get(key) != len(factor):
                raise InputError("the smoothing factors are of another model: make them with this one")


def smoothing_factors(
    model: Any,
    texts: Texts,
    alpha: float = 0.5,
    *,
    reads: Collection[str] = BEHIND_NORMS,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> SmoothingFactors:
    """SmoothQuant's factors, `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` for every input j of the linear layers.

    The layers compute `(x / s) (s W)`, which is `x W` until it is rounded. Layers that read one activation share its
    factors.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, as for `quantize`.
        texts: the calibration: a text; or any iterable of texts and token tensors, read once.
        alpha: 0 (weights alone are smoothed) to 1 (activations alone).
        reads: which inputs: `"attention"` and `"mlp"` (behind a norm, as in the authors' program), `"heads"` (of
            `W_O`), `"neurons"` (of `W_out`).
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens.
        batch_tokens: tokens run at a time.
        progress: show a progress bar.

    Raises:
        InputError: for alpha, inputs or texts that cannot be used.
        NotSupportedError: as `quantize`.
        NumericalError: if an activation is not finite.

    Source: Xiao et al. 2023, SmoothQuant, equation 4.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha}: expected 0 to 1")
    unknown = set(reads) - set(get_args(Reads))
    if unknown or not reads:
        raise InputError(f"reads={reads!r}: expected some of {get_args(Reads)}")
    groups = [group for group in linear_groups(model) if group.reads in reads]
    largest = [torch.zeros_like(_weight_sizes(group)) for group in groups]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    n_tokens = 0
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="calibration",
    ):  # fmt: skip
        handles = [
            group.points[0].edited(_Calibrating(f"block {group.layer}, {group.reads}", sizes, batch))
            for group, sizes in zip(groups, largest, strict=True)
        ]
        try:
            run_with_hooks(model, batch.tokens, {last: lambda _: None})
        finally:
            for handle in handles:
                handle.remove()
        n_tokens += int(batch.real.sum())
    factors = {
        (group.layer, group.reads): _factor(sizes, _weight_sizes(group), alpha)
        for group, sizes in zip(groups, largest, strict=True)
    }
    return SmoothingFactors(alpha, factors, n_tokens)


def scaled_rows(weight: Weight, s: Float[Tensor, " d_in"]) -> Tensor:
    """A weight's values with the row of each input multiplied by its factor."""
    values = weight.parameter.detach()
    shape = [n if axis in weight.input_axes else 1 for axis, n in enumerate(values.shape)]
    return (values.to(s.dtype) * s.reshape(shape)).to(values.dtype)


class _Calibrating:
    """Keeps the largest absolute value of each input of a group's linear layers; changes nothing."""

    def __init__(self, name: str, largest: Float[Tensor, " d_in"], batch: Batch):
        self._name = name
        self._largest = largest
        self._batch = batch

    def __call__(self, x: Tensor) -> Tensor:
        sizes = absmax(real_rows(x, self._batch.real), (0,))[0]
        if not torch.isfinite(sizes).all():
            raise NumericalError(not_finite(self._name, self._batch, x.dtype))
        # HookedTransformer may give each head an input of its own (use_split_qkv_input).
        torch.maximum(self._largest, sizes.reshape(-1, len(self._largest)).amax(dim=0), out=self._largest)
        return x


def _weight_sizes(group: LinearGroup) -> Float[Tensor, " d_in"]:
    """The largest absolute weight of each input, over all outputs of the layers that read it."""
    sizes = []
    for weight in (weight for linear in group.linears for weight in linear.weights):
        outputs = tuple(axis for axis in range(weight.parameter.ndim) if axis not in weight.input_axes)
        sizes.append(absmax(weight.parameter, outputs).flatten())
    return torch.stack(sizes).amax(dim=0)


def _factor(x: Tensor, w: Tensor, alpha: float) -> Float[Tensor, " d_in"]:
    """Inputs that are never active, or never read, keep their scale."""
    return torch.where((x > 0) & (w > 0), x**alpha / w ** (1 - alpha), torch.ones_like(x))
