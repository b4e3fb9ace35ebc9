"""Activation patching: which activations of a clean run bring a corrupted run's norm, or any metric, back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError, NumericalError
from sd_lens.explanations.contributions import unit_direction
from sd_lens.explanations.metrics import LogitMetric, Metric, logit_metric, stream_metric
from sd_lens.explanations.reading import at_last_token, peak_block
from sd_lens.models.blocks import check_layer
from sd_lens.models.hooks import check_fired, hooked, residual_stream_points
from sd_lens.observations.texts import Text, one_row, token_strings

Site = Literal["resid_pre", "attn_out", "mlp_out", "z"]
"""Activations by TransformerLens's names; `z` is each head's output before `W_O`."""


@dataclass(frozen=True, eq=False)
class Patching:
    """What a metric of the corrupted run becomes when one activation of the clean run is put in.

    Attributes:
        metric: what was measured, in words.
        clean_tokens: the clean text.
        corrupted_tokens: the corrupted text.
        clean_value: the metric of the clean run.
        corrupted_value: the metric of the corrupted run.
        table: site, layer, position, head (missing where there is none), value (the metric with the patch),
            restored (0: as corrupted, 1: as clean), estimate (of restored, by attribution patching: the gradient's
            first order).
    """

    metric: str
    clean_tokens: tuple[str, ...]
    corrupted_tokens: tuple[str, ...]
    clean_value: float
    corrupted_value: float
    table: pd.DataFrame = field(repr=False)

    @property
    def approximation(self) -> pd.DataFrame:
        """Attribution patching against true patching, per site.

        Columns: site, rank_correlation, median_error and largest_error of `restored`.
        """
        by_site = {}
        for site, rows in self.table.groupby("site", sort=False):
            error = (rows.estimate - rows.restored).abs()
            by_site[site] = {
                "rank_correlation": rows.estimate.rank().corr(rows.restored.rank()),
                "median_error": error.median(),
                "largest_error": error.max(),
            }
        return pd.DataFrame.from_dict(by_site, orient="index").rename_axis("site").reset_index()

    def __str__(self) -> str:
        best = self.table.iloc[int(self.table.restored.argmax())]
        head = "" if pd.isna(best["head"]) else f", head {best['head']}"
        error = float(self.approximation.largest_error.max())
        return (
            f"Patching of the {self.metric}: clean {self.clean_value:,.5g}, corrupted {self.corrupted_value:,.5g}; "
            f"{best.site} of block {best.layer} at position {best.position}{head} restores "
            f"{100 * best.restored:.1f} %; attribution patching is off by up to {100 * error:,.0f} % of the difference"
        )

    __repr__ = __str__


def patch(
    model: Any,
    clean: Text,
    corrupted: Text,
    metric: Literal["norm", "projection"] | LogitMetric = "norm",
    sites: Sequence[Site] = ("resid_pre", "attn_out", "mlp_out"),
    *,
    layer: int | None = None,
    position: int = -1,
    direction: Float[Tensor, " d_model"] | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Patching:
    """Activation patching per layer and position, with attribution patching beside it.

    True patching gives the values of `transformer_lens.patching.generic_activation_patch`. That runs one place at a
    time and always to the logits; here the places are rows of a batch that ends where the metric is known.
    Attribution patching is one forward and one backward pass for all places: the difference of the activations times
    the gradient.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        clean: a text, or token ids.
        corrupted: another of as many tokens.
        metric: `"norm"` of the residual stream after block `layer` at `position`; `"projection"`, its length along
            `direction`; or a differentiable function of the logits `[1, pos, d_vocab]` that returns a scalar.
        sites: what to patch: the residual stream in front of a block, the output of attention or MLP, or single heads
            (`"z"`, per layer, position and head). Only places that can reach the metric are patched.
        layer: of the metric; by default the block after which the clean norm at `position` is largest.
        position: of the norm or projection; negative ones count from the end.
        direction: of `"projection"`; normalized before use.
        prepend_bos: put a beginning-of-sequence token in front; None for the model's habit.
        batch_tokens: tokens run at a time: bounds memory.
        progress: show a progress bar.

    Raises:
        InputError: for texts of different lengths, unknown sites or metrics, a place outside the model, or a metric
            that is the same for both texts.
        NumericalError: if the metric is not finite.

    Source: Nanda 2023 for attribution patching.
    """
    clean_row, corrupted_row = (one_row(model, text, prepend_bos=prepend_bos) for text in (clean, corrupted))
    n = len(clean_row)
    if len(corrupted_row) != n:
        raise InputError(f"the clean text has {n} tokens and the corrupted one {len(corrupted_row)}: they must match")
    unknown = [site for site in sites if site not in get_args(Site)]
    if unknown or not sites:
        raise InputError(f"unknown site {next(iter(unknown), '')!r}; expected some of {get_args(Site)}")
    if not -n <= position < n:
        raise InputError(f"position {position} does not exist: the texts have {n} tokens")
    if callable(metric):
        if layer is not None or direction is not None:
            raise InputError("a metric of the logits has neither layer nor direction: leave them out")
        measured = logit_metric(model, metric)
    elif metric in ("norm", "projection"):
        if (direction is None) == (metric == "projection"):
            raise InputError("metric='projection' needs a direction, and only that")
        position %= n
        if layer is None:
            streams = residual_stream_points(model.cfg.n_layers)[1:]
            layer = peak_block(at_last_token(model, clean_row[: position + 1], streams))
        check_layer(model, layer)
        measured = stream_metric(layer, position, unit_direction(direction, model.cfg.d_model))
        clean_row, corrupted_row = clean_row[: position + 1], corrupted_row[: position + 1]
    else:
        raise InputError(f"unknown metric {metric!r}; expected 'norm', 'projection' or a function of the logits")
    return _patched(model, clean_row, corrupted_row, measured, list(dict.fromkeys(sites)), batch_tokens, progress)


def _patched(
    model: Any,
    clean: Int64[Tensor, " pos"],
    corrupted: Int64[Tensor, " pos"],
    metric: Metric,
    sites: list[Site],
    batch_tokens: int,
    progress: bool,
) -> Patching:
    names = [_point(site, layer) for site in sites for layer in range(metric.last_layer + 1)]
    clean_activations, clean_value = metric.run(model, clean, names, gradients=False)
    corrupted_activations, corrupted_value = metric.run(model, corrupted, names, gradients=True)
    change = float(clean_value.detach()) - float(corrupted_value.detach())
    if not math.isfinite(change):
        raise NumericalError(f"the {metric.name} is not finite: its change from clean to corrupted is {change}")
    if change == 0:
        raise InputError(
            f"the {metric.name} is {float(clean_value):.5g} for both texts: there is nothing to restore; take another "
            "pair of texts, layer or position"
        )
    if not corrupted_value.requires_grad:
        raise InputError(f"the {metric.name} is not differentiable: compute it from the logits with torch alone")
    gradients = torch.autograd.grad(corrupted_value, [corrupted_activations[name] for name in names])
    places = _places(model, sites, metric.last_layer, len(clean))
    values = _activation_patch(model, corrupted, clean_activations, metric, places, batch_tokens, progress)
    # In the order of the places: sites, layers, then positions and heads.
    estimate = torch.cat(
        [
            ((clean_activations[name] - corrupted_activations[name]).detach().double() * gradient.double())
            .sum(dim=-1)
            .flatten()
            for name, gradient in zip(names, gradients, strict=True)
        ]
    ).cpu()
    table = places.assign(
        value=values.numpy(),
        restored=((values - float(corrupted_value.detach())) / change).numpy(),
        estimate=(estimate / change).numpy(),
    )
    return Patching(
        metric=metric.name,
        clean_tokens=tuple(token_strings(model, clean)),
        corrupted_tokens=tuple(token_strings(model, corrupted)),
        clean_value=float(clean_value.detach()),
        corrupted_value=float(corrupted_value.detach()),
        table=table,
    )


def _activation_patch(
    model: Any,
    corrupted: Int64[Tensor, " pos"],
    clean: dict[str, Tensor],
    metric: Metric,
    places: pd.DataFrame,
    batch_tokens: int,
    progress: bool,
) -> Float64[Tensor, " place"]:
    """The metric with a patch at each place: many rows of the corrupted text, each patched at a place of its own."""
    found = []
    n_rows = max(1, batch_tokens // len(corrupted))
    with tqdm(total=len(places), desc="patching", unit="place", disable=not progress, leave=False) as bar:
        for start in range(0, len(places), n_rows):
            part = places.iloc[start : start + n_rows].reset_index(drop=True)
            part["point"] = [_point(site, layer) for site, layer in zip(part.site, part.layer, strict=True)]
            callbacks = {
                str(point): partial(_put, clean[str(point)], rows) for point, rows in part.groupby("point", sort=False)
            }
            with torch.no_grad(), hooked(model, callbacks) as fired:
                found.append(metric.of_rows(model, corrupted.expand(len(part), -1)))
            check_fired(callbacks, fired)
            bar.update(len(part))
    values = torch.cat(found).double().cpu()
    if not torch.isfinite(values).all():
        raise NumericalError(f"the {metric.name} is not finite with some of the patches")
    return values


def _put(clean: Float[Tensor, "1 pos ..."], places: pd.DataFrame, activation: Tensor) -> Tensor:
    """The activation with the clean one in some rows, each at its position (and head)."""
    patched = activation.clone()
    where = [torch.tensor(places.position.to_numpy())]
    if not places["head"].isna().any():
        where.append(torch.tensor(places["head"].to_numpy(dtype="int64")))
    patched[(torch.tensor(places.index.to_numpy()), *where)] = clean.detach()[0][tuple(where)]
    return patched


def _places(model: Any, sites: Sequence[Site], last_layer: int, n_positions: int) -> pd.DataFrame:
    """Every site, layer, position and head, in the order of `[layer, pos, head]` tensors."""
    tables = []
    for site in sites:
        axes = [range(last_layer + 1), range(n_positions), range(model.cfg.n_heads) if site == "z" else [pd.NA]]
        frame = pd.MultiIndex.from_product(axes, names=["layer", "position", "head"]).to_frame(index=False)
        tables.append(frame.assign(site=site).astype({"head": "Int64"}))
    return pd.concat(tables, ignore_index=True)[["site", "layer", "position", "head"]]


def _point(site: Site, layer: int) -> str:
    return f"blocks.{layer}.{'attn.' if site == 'z' else ''}hook_{site}"
