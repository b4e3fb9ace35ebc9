"""Is an attribution true? Ablate every head and MLP at the token, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError
from sd_lens.explanations.attribution import Attribution, Faithfulness
from sd_lens.explanations.components import Component, heads_and_mlps
from sd_lens.explanations.contributions import largest_error
from sd_lens.explanations.interventions import Ablator
from sd_lens.explanations.references import collect_reference
from sd_lens.models.hooks import check_fired, hooked, run_with_hooks
from sd_lens.observations.texts import Texts

AGREEMENT = 0.5
"""Below this rank correlation an attribution and its ablations are said to disagree."""


def verify(
    model: Any,
    attribution: Attribution,
    *,
    reference: Texts | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Attribution:
    """The attribution with its `faithfulness`: every head and MLP up to its block, ablated at its token.

    A contribution is what a component writes itself. Its effect is what the stream loses along the same
    direction when the component is ablated there and all later ones respond. The two differ where a component
    matters for what others read, and `Faithfulness.disagreement` then says so.

    Args:
        model: the model of the attribution.
        attribution: of `attribute`.
        reference: texts whose mean activations take the components' place; zeros if None.
        batch_tokens: tokens run at a time; a row of the batch for each component.
        progress: show a progress bar.

    Raises:
        InputError: if the attribution is of another model, or of this one with other hooks or weights.
    """
    components = attributable(model, attribution.layer)
    contributions = dict(zip(attribution.table.component, attribution.table.contribution, strict=True))
    labels = [str(c) for c in components]
    if (
        attribution.layer >= model.cfg.n_layers
        or len(attribution.direction) != model.cfg.d_model
        or not set(labels) <= set(contributions)
    ):
        raise InputError("the attribution is of another model: it has other components")
    whole = float(_length(model, attribution.token_ids[None], attribution.layer, attribution.direction)[0])
    if not abs(whole - attribution.total) <= largest_error(model.cfg.dtype) * attribution.norm:
        raise InputError(
            f"the attribution is of another model, or of this one in another state: its length is {whole:.5g} here, "
            f"not {attribution.total:.5g}"
        )
    found = effects(
        model, attribution.token_ids, attribution.layer, attribution.direction, components,
        reference=reference, batch_tokens=batch_tokens, progress=progress,
    )  # fmt: skip
    return replace(
        attribution,
        faithfulness=compared(
            labels, as_ablated(components, contributions), found, attribution.total, _mode(reference)
        ),
    )


def attributable(model: Any, layer: int) -> list[Component]:
    """The heads and MLPs that can have written to the stream after a block."""
    return [c for c in heads_and_mlps(model) if c.layer is not None and c.layer <= layer]


def as_ablated(components: Sequence[Component], contributions: Mapping[str, float]) -> Float64[Tensor, " component"]:
    """What each component's ablation takes away of the sum itself: its contribution, and an MLP's with its bias."""
    return torch.tensor(
        [
            contributions[str(c)] + (contributions.get(f"L{c.layer}b_out", 0.0) if c.kind == "mlp" else 0.0)
            for c in components
        ],
        dtype=torch.float64,
    )


def effects(
    model: Any,
    row: Int64[Tensor, " pos"],
    layer: int,
    direction: Float64[Tensor, " d_model"],
    components: Sequence[Component],
    *,
    reference: Texts | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Float64[Tensor, " component"]:
    """What the last token's stream after a block loses along a direction, with each component ablated there."""
    means = None if reference is None else collect_reference(model, reference, components, progress=progress)
    ablator = Ablator(model, _mode(reference), reference=means)
    tokens = row[None]
    n_rows = max(1, batch_tokens // len(row))
    whole = _length(model, tokens, layer, direction)
    found = []
    with tqdm(total=len(components), desc="verify", unit="component", disable=not progress, leave=False) as bar:
        for start in range(0, len(components), n_rows):
            part = components[start : start + n_rows]
            edits = ablator.callbacks(_one_per_row(part, len(row)))
            with torch.no_grad(), hooked(model, edits) as fired:
                found.append(whole - _length(model, tokens.expand(len(part), -1), layer, direction))
            check_fired(edits, fired)
            bar.update(len(part))
    return torch.cat(found)


def compared(
    labels: Sequence[str],
    contributions: Float64[Tensor, " component"],
    found: Float64[Tensor, " component"],
    total: float,
    mode: str,
) -> Faithfulness:
    """Contributions beside effects, with their rank correlation and what they disagree on."""
    table = pd.DataFrame({"component": labels, "contribution": contributions.numpy(), "effect": found.numpy()})
    correlation = float(table.contribution.rank().corr(table.effect.rank()))
    return Faithfulness(correlation, table, mode, _disagreement(table, correlation, total))


def _mode(reference: Texts | None) -> Literal["zero", "mean"]:
    return "zero" if reference is None else "mean"


def _one_per_row(components: Sequence[Component], n_positions: int) -> list[tuple[Component, Tensor]]:
    """Each component ablated at the last token of its own row of the batch."""
    masks = torch.zeros(len(components), len(components), n_positions, dtype=torch.bool)
    masks[range(len(components)), range(len(components)), -1] = True
    return list(zip(components, masks, strict=True))


def _length(
    model: Any, tokens: Int64[Tensor, "batch pos"], layer: int, direction: Float64[Tensor, " d_model"]
) -> Float64[Tensor, " batch"]:
    """The last token's length along the direction, in each row."""
    found: list[Tensor] = []
    run_with_hooks(
        model, tokens, {f"blocks.{layer}.hook_resid_post": lambda x: found.append(x[:, -1].detach().double().cpu())}
    )
    return found[0] @ direction


def _disagreement(table: pd.DataFrame, correlation: float, total: float) -> str:
    """A plain sentence where contributions and effects do not agree; empty where they do."""
    largest = table.iloc[int(table.contribution.abs().argmax())]
    strongest = table.iloc[int(table.effect.abs().argmax())]
    sentences = []
    if largest.component != strongest.component:
        sentences.append(
            f"{largest.component} writes most ({100 * largest.contribution / total:.1f} %), but ablating "
            f"{strongest.component}, which writes {100 * strongest.contribution / total:.1f} %, changes most "
            f"({100 * strongest.effect / total:.1f} %)"
        )
    if not correlation >= AGREEMENT:
        sentences.append("contributions and effects are in different order: components act through what others read")
    return "attribution and ablation disagree: " + "; ".join(sentences) if sentences else ""
