"""What components do on reference texts: the means and samples that take their place under ablation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.components import Component
from sd_lens.models.hooks import run_with_hooks
from sd_lens.observations.selection import Where, selected
from sd_lens.observations.texts import Texts, batches

N_SAMPLES = 256
"""How many tokens of the reference are kept to draw from."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Activations of reference tokens at some hook points.

    Attributes:
        means: hook point to the mean over all of them.
        samples: hook point to those of up to `N_SAMPLES` tokens drawn from them, the same tokens everywhere.
    """

    means: dict[str, Float64[Tensor, ...]]
    samples: dict[str, Float[Tensor, "n ..."]]


def slots_of(component: Component) -> list[tuple[str, int | None]]:
    """Where a component's activation is: hook point, and index on its third axis (None: all of it).

    Raises:
        InputError: for biases and single weights, which no hook point shows.
    """
    block = f"blocks.{component.layer}"
    if component.kind in ("attention bias", "mlp bias"):
        raise InputError(f"{component} is a constant that no hook point shows: ablate the attention or MLP instead")
    if component.kind == "weight":
        raise InputError(f"{component} is a single weight, which can only be zeroed: pass mode='zero'")
    slots: dict[str, list[tuple[str, int | None]]] = {
        "embedding": [("hook_embed", None)],
        "positional embedding": [("hook_pos_embed", None)],
        "head": [(f"{block}.attn.hook_z", component.index)],
        "attention": [(f"{block}.hook_attn_out", None)],
        "mlp": [(f"{block}.hook_mlp_out", None)],
        "neuron": [(f"{block}.mlp.hook_post", component.index)],
        "block": [(f"{block}.hook_attn_out", None), (f"{block}.hook_mlp_out", None)],
    }
    return slots[component.kind]


def collect_reference(
    model: Any,
    texts: Texts,
    components: Iterable[Component],
    *,
    where: Where = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> Reference:
    """Run the texts once and keep what `ablated` needs of these components, at the tokens that `where` means.

    Raises:
        InputError: for texts that cannot be used, or if `where` means none of their tokens.
    """
    collector = _Collector(seed)
    points = list(dict.fromkeys(point for component in components for point, _ in slots_of(component)))
    for batch in batches(
        model, texts, prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, description="reference",
    ):  # fmt: skip
        mask = selected(model, batch, where)
        if bool(mask.any()):
            collector.draw(int(mask.sum()))
            run_with_hooks(model, batch.tokens, {point: partial(collector.add, point, mask) for point in points})
    return collector.result()


class _Collector:
    """Sums, and a uniform sample: the tokens with the largest of random keys, in the order of their keys."""

    def __init__(self, seed: int):
        # NumPy's numbers do not depend on how many are drawn at a time, torch's do.
        self._generator = np.random.default_rng(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._chosen = torch.empty(0, dtype=torch.long)
        self._n = 0
        self._sums: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}

    def draw(self, n: int) -> None:
        """Decide which of the kept tokens and of n new ones behind them to keep."""
        keys = torch.cat([self._keys, torch.from_numpy(self._generator.random(n))])
        self._keys, self._chosen = keys.topk(min(N_SAMPLES, len(keys)))
        self._n += n

    def add(self, point: str, mask: Tensor, activation: Tensor) -> None:
        """Count the new tokens' activations at a point."""
        rows = activation.detach()[mask.to(activation.device)]
        total = rows.double().sum(dim=0)
        self._sums[point] = self._sums[point] + total if point in self._sums else total
        kept = self._samples.get(point, rows[:0])
        self._samples[point] = torch.cat([kept, rows])[self._chosen.to(rows.device)]

    def result(self) -> Reference:
        if self._n == 0:
            raise InputError("the reference has none of the tokens that were asked for")
        return Reference({point: total / self._n for point, total in self._sums.items()}, self._samples)
