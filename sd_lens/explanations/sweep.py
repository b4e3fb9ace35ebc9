"""The ablation sweep: every head and MLP by itself, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError
from sd_lens.explanations.ablation import Experiment
from sd_lens.explanations.attribution import component_columns
from sd_lens.explanations.components import Component, heads_and_mlps, parsed
from sd_lens.explanations.interventions import Mode, check_mode
from sd_lens.models.blocks import check_layer
from sd_lens.observations.behaviour import Behaviour
from sd_lens.observations.selection import Where, check_where
from sd_lens.observations.texts import Texts, token_rows
from sd_lens.storage import written_whole


@dataclass(frozen=True, eq=False)
class AblationSweep:
    """What a model loses with each of its components, one at a time.

    Attributes:
        mode: how they were ablated.
        layer: norms are those after this block, 0-based.
        before: norm (mean of the watched tokens), loss (nats per token) and sink (mean attention on the first token) of
            the whole model.
        table: component, kind, layer, head, and norm, loss and sink without it.
    """

    mode: str
    layer: int
    before: dict[str, float]
    table: pd.DataFrame = field(repr=False)

    def changes(self) -> pd.DataFrame:
        """The table with norm_change (relative), loss_change (nats) and sink_change beside it."""
        return self.table.assign(
            norm_change=self.table.norm / self.before["norm"] - 1,
            loss_change=self.table.loss - self.before["loss"],
            sink_change=self.table.sink - self.before["sink"],
        )

    def __str__(self) -> str:
        changes = self.changes()
        norm = changes.iloc[int(changes.norm_change.abs().argmax())]
        if changes.loss_change.isna().all():  # texts of one token
            loss_said = "no text has a next token to predict"
        else:
            loss = changes.iloc[int(changes.loss_change.argmax())]
            loss_said = f"{loss.component} the loss ({loss.loss_change:+.3g} nats per token)"
        return (
            f"AblationSweep ({self.mode}) of {len(changes)} components: {norm.component} changes the norm after block "
            f"{self.layer} most ({100 * norm.norm_change:+.1f} %), {loss_said}"
        )

    __repr__ = __str__


def sweep_ablations(
    model: Any,
    texts: Texts,
    mode: Mode = "zero",
    *,
    layer: int | None = None,
    components: Iterable[str | Component] | None = None,
    resume: str | Path | None = None,
    where: Where = None,
    watch: Where = 0,
    reference: Texts | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> AblationSweep:
    """Ablate every head and every MLP, one at a time: norm, next-token loss and attention sink without it.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: a text; or any iterable of texts and token tensors. A few short ones do: they are run once for every
            component.
        mode: as for `ablated`.
        layer: norms are taken after this block; by default the one after which the watched tokens' is largest.
        components: all heads and MLPs by default.
        resume: a JSON file that grows with every component; a sweep of the same settings goes on where it ends.
        where: as for `ablate`.
        watch: as for `ablate`.
        reference: as for `ablate`.
        direction: as for `ablate`.
        prepend_bos: as for `ablate`.
        max_length: as for `ablate`.
        batch_tokens: as for `ablate`.
        seed: as for `ablate`.
        progress: show a progress bar.

    Raises:
        InputError: as `ablate`; or if `resume` is a file of other settings, damaged, or cannot be written.
        NumericalError: if the residual stream or the loss is not finite.
    """
    check_mode(mode, direction, reference)
    check_where(where)
    wanted = parsed(model, heads_and_mlps(model) if components is None else components)
    if layer is not None:
        check_layer(model, layer)
    experiment = Experiment(
        model, texts, watch,
        prepend_bos=prepend_bos, max_length=max_length, batch_tokens=batch_tokens, progress=False,
    )  # fmt: skip
    references = None if reference is None else list(token_rows(model, reference, prepend_bos=prepend_bos))
    whole = experiment.behaviour()
    at = int(whole.watched_norm.argmax()) if layer is None else layer
    before = measures(whole, at)
    journal = _Journal(
        resume,
        {
            "kind": "AblationSweep", "mode": mode, "layer": at, "seed": seed, "max_length": max_length,
            "texts": _digest(experiment.rows), "where": _digest(where), "watch": _digest(watch),
            "reference": _digest(references), "direction": _digest(direction),
            "whole model": {name: f"{value:.6g}" for name, value in before.items()},
        },
    )  # fmt: skip
    ablator = experiment.ablator(mode, wanted, where=where, reference=references, direction=direction, seed=seed)
    for component in tqdm(wanted, desc="ablation sweep", unit="component", disable=not progress, leave=False):
        if str(component) not in journal.rows:
            journal.add(str(component), measures(experiment.behaviour(ablator, (component,), where), at))
    measured = pd.DataFrame([journal.rows[str(component)] for component in wanted])
    return AblationSweep(mode, at, before, component_columns(list(wanted)).join(measured))


_MEASURES = ("norm", "loss", "sink")


def measures(behaviour: Behaviour, layer: int) -> dict[str, float]:
    """Mean norm of the watched tokens after a block, next-token loss, and mean attention on the first token."""
    return {
        "norm": float(behaviour.watched_norm[layer]),
        "loss": behaviour.loss,
        "sink": float(behaviour.sinks.mean()),
    }


class _Journal:
    """What a sweep has measured so far, in a file if there is one."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.settings = settings
        self.rows: dict[str, dict[str, float]] = {}
        if self.path is not None and self.path.exists():
            if not self.path.is_file():
                raise InputError(f"cannot resume from {self.path}: it is not a file")
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                found = dict(content["settings"])
                self.rows = {
                    name: {measure: float(row[measure]) for measure in _MEASURES}
                    for name, row in content["rows"].items()
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{self.path} is not a sweep to resume, or is damaged: delete it") from error
            if found != settings:
                other = next(n for n in {**settings, **found} if found.get(n) != settings.get(n))
                raise InputError(f"{self.path} is a sweep with another {other}: delete it, or name another file")

    def add(self, component: str, measures: dict[str, float]) -> None:
        """Remember a component, also on disk."""
        self.rows[component] = measures
        if self.path is not None:
            with written_whole(self.path) as temporary:
                temporary.write_text(json.dumps({"settings": self.settings, "rows": self.rows}), encoding="utf-8")


def _digest(setting: Any) -> str:
    """A short name for a setting of any size."""
    if isinstance(setting, pd.DataFrame):
        setting = setting[["text", "position"]].to_numpy().tolist()
    elif isinstance(setting, Tensor):
        setting = setting.tolist()
    elif isinstance(setting, list) and not all(isinstance(row, str) for row in setting):
        setting = [row.tolist() if isinstance(row, Tensor) else row for row in setting]
    elif isinstance(setting, Collection) and not isinstance(setting, str):
        setting = sorted(setting)  # tokens: their order does not matter
    return hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]
