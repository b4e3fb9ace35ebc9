"""Ablation: what a model loses with some of its components."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.components import Component, Components, parsed
from sd_lens.explanations.interventions import Ablator, Mode, check_mode
from sd_lens.explanations.references import collect_reference
from sd_lens.models.hooks import check_fired, hooked
from sd_lens.observations.behaviour import Behaviour, BehaviourSums
from sd_lens.observations.selection import Where, selected
from sd_lens.observations.texts import Texts, batches, resolved_prepend_bos, token_rows


@dataclass(frozen=True, eq=False)
class Ablation:
    """A model's behaviour with and without some components.

    Attributes:
        components: their labels.
        mode: how they were ablated.
        before: the whole model.
        after: with the components ablated.
    """

    components: tuple[str, ...]
    mode: str
    before: Behaviour = field(repr=False)
    after: Behaviour = field(repr=False)

    @property
    def peak(self) -> int:
        """The block after which the watched tokens' norm is largest in the whole model."""
        return int(self.before.watched_norm.argmax())

    def __str__(self) -> str:
        named = ", ".join(self.components[:4]) + (", ..." if len(self.components) > 4 else "")
        return (
            f"Ablation ({self.mode}) of {named}: norm after block {self.peak} "
            f"{float(self.before.watched_norm[self.peak]):,.5g} -> {float(self.after.watched_norm[self.peak]):,.5g}, "
            f"perplexity {self.before.perplexity:.4g} -> {self.after.perplexity:.4g}, attention on the first token "
            f"{float(self.before.sinks.mean()):.3f} -> {float(self.after.sinks.mean()):.3f}"
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: watched and other norms, maximum and attention on the first token, before and after."""
        return self.before.to_dataframe().merge(self.after.to_dataframe(), on="layer", suffixes=("_before", "_after"))


def ablate(
    model: Any,
    texts: Texts,
    components: Components,
    mode: Mode = "zero",
    *,
    where: Where = None,
    watch: Where = 0,
    reference: Texts | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> Ablation:
    """What ablating components together does to norms, next-token loss and attention sinks.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors. Their token ids are held in memory.
        components: labels or `Component`s, as for `ablated`.
        mode: `"zero"`, `"mean"`, `"resample"` or `"direction"`, as for `ablated`.
        where: ablate at these tokens only: a position, tokens such as `[" the"]`, or a table with text and
            position such as `found.table`; every token by default.
        watch: the tokens whose norm is followed, in the same forms; the initial ones by default.
        reference: texts whose activations mean and resample take, at the tokens that `where` means there (a table
            means tokens of `texts`, so all of another reference's are taken); `texts` by default. Where the tokens
            all have the same activation, as initial tokens of one kind do, replacing it changes nothing: a warning
            says so.
        direction: what `"direction"` takes away.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        max_length: cut texts to so many tokens.
        batch_tokens: tokens run at a time: bounds memory, most of which are logits.
        seed: of `"resample"`.
        progress: show progress bars.

    Raises:
        InputError: for texts, components, tokens, a mode or a direction that cannot be used.
        HookError: if a component's hook point does not fire.
        NumericalError: if the residual stream or the loss is not finite, with or without the components.

    Example:
        >>> ablate(model, default_texts()[:8], "L11MLP")  # doctest: +SKIP
        Ablation (zero) of L11MLP: norm after block 11 23,485 -> 168.24, perplexity 47.4 -> 355.6, ...
    """
    wanted = parsed(model, components)
    check_mode(mode, direction, reference)
    experiment = Experiment(
        model, texts, watch,
        prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens, progress=progress,
    )  # fmt: skip
    ablator = experiment.ablator(mode, wanted, where=where, reference=reference, direction=direction, seed=seed)
    return Ablation(
        components=tuple(map(str, wanted)),
        mode=mode,
        before=experiment.behaviour(),
        after=experiment.behaviour(ablator, wanted, where),
    )


class Experiment:
    """A corpus to be run again and again, as it is and with components ablated."""

    def __init__(
        self,
        model: Any,
        texts: Texts,
        watch: Where,
        *,
        prepend_bos: bool | None,
        max_length: int | None,
        batch_tokens: int,
        progress: bool,
    ):
        self.model = model
        self.rows = list(token_rows(model, texts, prepend_bos=prepend_bos))
        self.watch = watch
        self.prepend_bos = resolved_prepend_bos(model, prepend_bos)
        self._options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens}
        self._progress = progress

    def ablator(
        self,
        mode: Mode,
        components: tuple[Component, ...],
        *,
        where: Where = None,
        reference: Texts | None = None,
        direction: Float[Tensor, " d_model"] | None = None,
        seed: int = 0,
    ) -> Ablator:
        """What ablates the components, its reference read if the mode needs one."""
        found = None
        if mode in ("mean", "resample"):
            elsewhere = reference is not None and isinstance(where, pd.DataFrame)
            found = collect_reference(
                self.model, self.rows if reference is None else reference, components,
                where=None if elsewhere else where, prepend_bos=self.prepend_bos, seed=seed,
                progress=self._progress, **self._options,
            )  # fmt: skip
            same = [point for point, samples in found.samples.items() if _all_alike(samples)]
            if same and reference is None:
                warnings.warn(
                    f"all tokens of the reference have the same activation at {same[0]}: mode={mode!r} replaces it by "
                    "itself; pass another reference, or other texts",
                    stacklevel=3,
                )
        return Ablator(self.model, mode, reference=found, direction=direction, seed=seed)

    def behaviour(
        self, ablator: Ablator | None = None, components: tuple[Component, ...] = (), where: Where = None
    ) -> Behaviour:
        """The behaviour with these components ablated at the tokens that `where` means."""
        sums = BehaviourSums(self.model, self.watch)
        n_ablated = 0
        if ablator is not None:
            ablator.restart()
        for batch in batches(
            self.model, self.rows, progress=self._progress, description="ablated" if components else "whole model",
            **self._options,
        ):  # fmt: skip
            at: Tensor | None = None if where is None else selected(self.model, batch, where)
            n_ablated += int(batch.real.sum() if at is None else at.sum())
            edits = {} if ablator is None else ablator.callbacks((component, at) for component in components)
            with torch.no_grad(), hooked(self.model, edits) as fired:
                sums.run(batch)
            check_fired(edits, fired)
        if n_ablated == 0:
            raise InputError("the texts have none of the tokens that were to be ablated")
        return sums.result()


def _all_alike(samples: Float[Tensor, "n ..."]) -> bool:
    return torch.allclose(samples, samples[:1].expand_as(samples), rtol=1e-4, atol=1e-6)
