"""Drilling down: an MLP's contribution into neurons, a head's into source tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from jaxtyping import Float64
from torch import Tensor

from sd_lens.errors import InputError, NotSupportedError
from sd_lens.explanations.attribution import Attribution
from sd_lens.explanations.components import Component, parsed
from sd_lens.explanations.contributions import behind_norm, largest_error, seen_through, shares
from sd_lens.explanations.reading import at_last_token, of_text
from sd_lens.models.blocks import block_writes
from sd_lens.models.views import BlockWrites


@dataclass(frozen=True, eq=False)
class NeuronAttribution:
    """One MLP's contribution as a sum over its neurons.

    Attributes:
        layer: the MLP's block, 0-based.
        total: what the neurons write along the attribution's direction, the output bias apart.
        residual_error: `|sum over neurons - total|` relative to the norm of the stream that was attributed.
        table: neuron, activation (`hook_post`), contribution, share (of the attributed stream's length); in the
            order of the neurons.
    """

    layer: int
    total: float
    residual_error: float
    table: pd.DataFrame = field(repr=False)

    def __str__(self) -> str:
        largest = self.table.loc[self.table.contribution.abs().nlargest(3).index]
        named = ", ".join(
            f"L{self.layer}N{n} ({100 * s:.1f} %)" for n, s in zip(largest.neuron, largest.share, strict=True)
        )
        return (
            f"NeuronAttribution of L{self.layer}MLP: {self.total:,.5g} from {len(self.table)} neurons, mostly {named}"
        )

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class SourceAttribution:
    """One head's contribution as a sum over the tokens that it attended to.

    Attributes:
        layer: the head's block, 0-based.
        head: which head.
        total: what the head writes along the attribution's direction.
        residual_error: `|sum over sources - total|` relative to the norm of the stream that was attributed.
        table: position, token, attention (the pattern), contribution, share (of the attributed stream's length).
    """

    layer: int
    head: int
    total: float
    residual_error: float
    table: pd.DataFrame = field(repr=False)

    def __str__(self) -> str:
        top = self.table.iloc[int(self.table.contribution.abs().argmax())]
        return (
            f"SourceAttribution of L{self.layer}H{self.head}: {self.total:,.5g} from {len(self.table)} tokens, mostly "
            f"{top.token!r} at position {top.position} (attention {top.attention:.2f})"
        )

    __repr__ = __str__


def attribute_neurons(
    model: Any, attribution: Attribution, layer: int, *, cache: Any | None = None
) -> NeuronAttribution:
    """An MLP's contribution, neuron by neuron: `hook_post` times the length of each row of `W_out`.

    Args:
        model: the model of the attribution.
        attribution: of `attribute`; its token and direction are taken.
        layer: whose MLP, up to the attribution's block.
        cache: an `ActivationCache` of the text, to save the run.

    Raises:
        InputError: for a block behind the attribution's, or a model or cache that is not the attribution's.
        NotSupportedError: for an MLP that has no neurons with one `W_out`, or whose neurons do not sum to it.
    """
    block = _block(model, attribution, Component("mlp", layer))
    if block.W_out is None:
        raise NotSupportedError(f"not supported yet: the MLP of block {layer} has no single matrix W_out")
    prefix = f"blocks.{layer}"
    names = [f"{prefix}.mlp.hook_post", f"{prefix}.hook_mlp_out"]
    names += [f"{prefix}.ln2_post.hook_scale"] if block.mlp_post_gain is not None else []
    read = at_last_token(model, attribution.token_ids, names, cache)
    u = attribution.direction[None].to(block.W_out.device)
    post, out, *scale = (read[name] for name in names)
    through = behind_norm(u, block.mlp_post_gain, scale[0][:, 0] if scale else None)
    contribution = (post.double() * seen_through(block.W_out, through))[0].cpu()
    bias = 0.0 if block.b_out is None else float((block.b_out.double() * u[0]).sum())
    total = float((out[0].double() * u[0]).sum()) - bias
    table = pd.DataFrame(
        {
            "neuron": range(len(contribution)),
            "activation": post[0].double().cpu().numpy(),
            "contribution": contribution.numpy(),
            "share": shares(contribution, attribution.total, attribution.norm).numpy(),
        }
    )
    return NeuronAttribution(layer, total, _checked(contribution, total, attribution, f"L{layer}MLP", post), table)


def attribute_sources(
    model: Any, attribution: Attribution, layer: int, head: int, *, cache: Any | None = None
) -> SourceAttribution:
    """A head's contribution, source token by source token: `pattern[q, k] v_k W_O`.

    Args:
        model: the model of the attribution.
        attribution: of `attribute`; its token, which is the query, and its direction are taken.
        layer: the head's block, up to the attribution's.
        head: which head.
        cache: an `ActivationCache` of the text, to save the run.

    Raises:
        InputError: for a head that does not exist or lies behind the attribution's block, or a model or cache that is
            not the attribution's.
        NotSupportedError: if the sources do not sum to what the head writes.
    """
    block = _block(model, attribution, Component("head", layer, head))
    prefix = f"blocks.{layer}"
    names = [f"{prefix}.attn.{point}" for point in ("hook_v", "hook_pattern", "hook_z")]
    names += [f"{prefix}.ln1_post.hook_scale"] if block.attention_post_gain is not None else []
    read = of_text(model, attribution.token_ids, names, cache)
    v, pattern, z, *scale = (read[name] for name in names)
    n_kv, at = v.shape[2], attribution.position
    attention = pattern[0, head, at, : at + 1].double()
    u = attribution.direction[None].to(block.W_O.device)
    through = behind_norm(u, block.attention_post_gain, scale[0][0, at] if scale else None)
    way = seen_through(block.W_O[head], through)[0]
    values = v[0, : at + 1, head // (len(block.W_O) // n_kv)].double()
    contribution = (attention * (values @ way)).cpu()
    total = float(z[0, at, head].double() @ way)
    table = pd.DataFrame(
        {
            "position": range(len(contribution)),
            "token": pd.Series(attribution.tokens, dtype="str"),
            "attention": attention.cpu().numpy(),
            "contribution": contribution.numpy(),
            "share": shares(contribution, attribution.total, attribution.norm).numpy(),
        }
    )
    error = _checked(contribution, total, attribution, f"L{layer}H{head}", z)
    return SourceAttribution(layer, head, total, error, table)


def _block(model: Any, attribution: Attribution, component: Component) -> BlockWrites:
    parsed(model, component)
    assert component.layer is not None
    if component.layer > attribution.layer:
        raise InputError(f"{component} writes behind block {attribution.layer}, whose stream was attributed")
    return block_writes(model, component.layer)


def _checked(
    contribution: Float64[Tensor, " n"], total: float, attribution: Attribution, name: str, activation: Tensor
) -> float:
    """The miss of the parts' sum; they must be parts of what the attribution says of the whole."""
    limit = largest_error(activation.dtype)
    attributed = float(attribution.table.set_index("component").contribution.get(name, math.nan))
    if not abs(attributed - total) <= limit * attribution.norm:
        raise InputError(
            f"{name} writes {total:.5g} here and {attributed:.5g} in the attribution: model, hooks or cache are others"
        )
    error = abs(float(contribution.sum()) - total) / attribution.norm
    if not error <= limit:
        raise NotSupportedError(
            f"the parts of {name} miss what it writes by {error:.1e} of the norm: this architecture does something else"
        )
    return error
