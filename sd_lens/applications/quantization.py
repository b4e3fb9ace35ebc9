"""Simulated quantization: the model runs with rounded weights and activations, and is the same as before afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.applications.schemes import W8A8, QuantizationScheme, absmax, rounded
from sd_lens.applications.smoothing import SmoothingFactors, scaled_rows
from sd_lens.applications.sparing import Spare, layers_to_spare
from sd_lens.errors import NotSupportedError, NumericalError
from sd_lens.models.hooks import run_with_hooks
from sd_lens.models.linear_layers import InputPoint, LinearGroup, LinearLayer, linear_groups


@contextmanager
def quantize(
    model: Any,
    spare: Spare = (),
    *,
    scheme: QuantizationScheme = W8A8,
    smoothing: SmoothingFactors | None = None,
) -> Iterator[tuple[int, ...]]:
    """While the context is open, the linear layers of all blocks are quantized; afterwards the model is as before.

    Weights are rounded once, activations at the input of every linear layer in every forward pass; sums, norms,
    attention and the unembedding stay in the model's precision. What observes the model can run inside (`perplexity`,
    `observe_behaviour`). The weights are restored bit by bit, however the context ends. Needs memory for a second copy
    of the blocks' weights.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not; the bridge without compatibility mode.
        spare: blocks whose `W_out` and its input stay in full precision: 0-based indices; a `Forecast` or
            `HighNormTokens`, for its explosion and decay blocks; `"auto"`, for those of a forecast from the weights.
        scheme: bits, and which numbers share a step.
        smoothing: SmoothQuant's factors, of `smoothing_factors`.

    Yields:
        The blocks that are spared.

    Raises:
        InputError: for blocks that do not exist, nothing to spare automatically, or factors of another model.
        NotSupportedError: for an architecture that is not covered, mixtures of experts among them, or a wrapper whose
            forward pass goes around its own linear layers.
        NumericalError: if a weight that is to be rounded is not finite.

    Example:
        >>> with quantize(model, spare="auto"):  # doctest: +SKIP
        ...     print(perplexity(model, texts))
    """
    groups = linear_groups(model)
    spared = layers_to_spare(model, spare)
    if smoothing is not None:
        smoothing.check(groups)
    rounding = [
        RoundedGroup(group, scheme, None if smoothing is None else smoothing.factors.get((group.layer, group.reads)))
        for group in groups
        if not (group.reads == "neurons" and group.layer in spared)
    ]
    with entered(rounding):
        check_bites(model, rounding)
        yield spared


class RoundedGroup:
    """A context, that can be entered again and again, in which some linear layers with one input are quantized.

    Their rounded weights are kept, so that entering it again costs nothing.
    """

    def __init__(self, group: LinearGroup, scheme: QuantizationScheme, s: Float[Tensor, " d_in"] | None = None):
        self.group = group
        self.fired: set[InputPoint] = set()
        self._scheme = scheme
        self._s = s
        self._swaps = [
            (weight.parameter, value)
            for linear in group.linears
            for weight, value in zip(linear.weights, _rounded_weights(linear, s, scheme), strict=True)
        ]
        self._undo = ExitStack()

    def __enter__(self) -> RoundedGroup:
        with ExitStack() as undo:  # undone here if it is interrupted before the end
            for point in self.group.points:
                undo.callback(point.edited(partial(self._rounded_input, point)).remove)
            for parameter, value in self._swaps:
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = value
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _rounded_input(self, point: InputPoint, x: Tensor) -> Tensor:
        self.fired.add(point)
        axes, bits = point.axes, self._scheme.activation_bits
        if self._s is not None:
            x = (x / self._s.reshape(x.shape[-len(axes) :])).to(x.dtype)
        return x if bits is None else rounded(x, bits, absmax(x, axes if self._scheme.activations == "token" else None))


@contextmanager
def entered(groups: Iterable[RoundedGroup]) -> Iterator[None]:
    """All of the groups are quantized while the block runs."""
    with ExitStack() as stack:
        for rounded_group in groups:
            stack.enter_context(rounded_group)
        yield


def check_bites(model: Any, groups: Iterable[RoundedGroup]) -> None:
    """Whether a forward pass, of one token, really goes through the layers of groups that are entered.

    Raises:
        NotSupportedError: if not.
    """
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    run_with_hooks(model, torch.zeros((1, 1), dtype=torch.long), {last: lambda _: None})
    for rounded_group in groups:
        if not rounded_group.fired.issuperset(rounded_group.group.points):
            raise NotSupportedError(
                f"not supported yet: the forward pass goes around {rounded_group.group.linears[0].name}, as the "
                "bridge does in compatibility mode; load the model with load_model"
            )


def _rounded_weights(linear: LinearLayer, s: Float[Tensor, " d_in"] | None, scheme: QuantizationScheme) -> list[Tensor]:
    """What stands in the place of a layer's weights."""
    values = [weight.parameter.detach() if s is None else scaled_rows(weight, s) for weight in linear.weights]
    if scheme.weight_bits is None:
        return values
    if scheme.weights == "channel":
        largest = [absmax(v, weight.input_axes) for v, weight in zip(values, linear.weights, strict=True)]
    else:  # one step for a joint matrix, also where a wrapper runs it in parts
        largest = [torch.stack([absmax(v) for v in values]).max()] * len(values)
    if not all(bool(torch.isfinite(size).all()) for size in largest):
        raise NumericalError(f"the weights of {linear.name} are not finite")
    return [rounded(v, scheme.weight_bits, size) for v, size in zip(values, largest, strict=True)]
