"""The residual stream as a sum of writes, captured at some tokens and projected on directions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sd_lens.errors import InputError, NotSupportedError, NumericalError
from sd_lens.explanations.components import Component
from sd_lens.explanations.reading import Tokens, at_tokens
from sd_lens.models.blocks import block_writes, check_layer
from sd_lens.models.views import BlockWrites

_LARGEST_ERROR = {torch.float64: 1e-9, torch.float32: 1e-4}  # half precision: below
_LARGEST_HALF_ERROR = 0.05


@dataclass(frozen=True, eq=False)
class Writes:
    """What was written to the residual stream at n tokens, from the embedding to block `layer`.

    Heads are kept as `z`, before `W_O`: `[n, head, d_model]` is never formed.

    Attributes:
        blocks: the weights behind the activations.
        embed: the embedding.
        pos_embed: the positional embedding, None where there is none.
        z: per block, what each head hands to `W_O`.
        mlp: per block, what the MLP wrote, bias included.
        attention_scale: per block, what the norm behind attention divides by; None without such a norm.
        residual: the stream after block `layer`.
    """

    blocks: tuple[BlockWrites, ...]
    embed: Float[Tensor, "n d_model"]
    pos_embed: Float[Tensor, "n d_model"] | None
    z: tuple[Float[Tensor, "n head d_head"], ...]
    mlp: tuple[Float[Tensor, "n d_model"], ...]
    attention_scale: tuple[Float[Tensor, " n"] | None, ...]
    residual: Float[Tensor, "n d_model"]

    def components(self) -> list[Component]:
        """The writers, in the order in which they write."""
        found = [Component("embedding")]
        if self.pos_embed is not None:
            found.append(Component("positional embedding"))
        for block in self.blocks:
            layer = block.layer
            found += [Component("head", layer, head) for head in range(len(block.W_O))]
            found += [Component("attention bias", layer)] if block.b_O is not None else []
            found += [Component("mlp", layer)]
            found += [Component("mlp bias", layer)] if block.b_out is not None else []
        return found

    def project(self, directions: Float64[Tensor, "n d_model"]) -> Float64[Tensor, "n component"]:
        """Each write's length along each token's (unit) direction, in the order of `components`."""
        u = directions.to(self.embed.device)
        columns = [_dot(self.embed, u)]
        if self.pos_embed is not None:
            columns.append(_dot(self.pos_embed, u))
        for block, z, mlp, scale in zip(self.blocks, self.z, self.mlp, self.attention_scale, strict=True):
            through = behind_norm(u, block.attention_post_gain, scale)
            columns += list(_dot(z, seen_through(block.W_O, through)).unbind(dim=1))
            columns += [_dot(block.b_O, through)] if block.b_O is not None else []
            # The norm behind the MLP is already in what was captured; its frozen scale is in the bias's share.
            bias = None if block.b_out is None else _dot(block.b_out, u)
            columns += [_dot(mlp, u)] if bias is None else [_dot(mlp, u) - bias, bias]
        return torch.stack(columns, dim=1).cpu()


class WritesCapture:
    """Callbacks that capture `Writes` at chosen tokens of a batch; made once per model, used batch by batch."""

    def __init__(self, model: Any, layer: int):
        check_layer(model, layer)
        self.model = model
        self.blocks = tuple(block_writes(model, block) for block in range(layer + 1))
        for block in self.blocks:
            if block.b_out is not None and block.mlp_post_gain is not None:
                raise NotSupportedError("not supported yet: an MLP with both an output bias and a norm behind it")
        self.has_pos_embed = model.cfg.positional_embedding_type == "standard"

    def points(self) -> list[str]:
        """The hook points that it reads."""
        names = ["hook_embed", *(["hook_pos_embed"] if self.has_pos_embed else [])]
        for block in self.blocks:
            prefix = f"blocks.{block.layer}"
            names.append(f"{prefix}.attn.hook_z")
            names += [f"{prefix}.ln1_post.hook_scale"] if block.attention_post_gain is not None else []
            names.append(f"{prefix}.hook_mlp_out")
        return [*names, f"blocks.{self.blocks[-1].layer}.hook_resid_post"]

    def run(self, tokens: Int[Tensor, "batch pos"], which: Tokens) -> Writes:
        """Run the model up to the last block and capture."""
        return self.assembled(at_tokens(self.model, tokens, self.points(), which))

    def assembled(self, found: dict[str, Tensor]) -> Writes:
        """The writes from activations at n tokens (`[n, ...]` each)."""
        blocks = [f"blocks.{block.layer}" for block in self.blocks]
        return Writes(
            blocks=self.blocks,
            embed=found["hook_embed"],
            pos_embed=found["hook_pos_embed"] if self.has_pos_embed else None,
            z=tuple(found[f"{b}.attn.hook_z"] for b in blocks),
            mlp=tuple(found[f"{b}.hook_mlp_out"] for b in blocks),
            attention_scale=tuple(
                found[f"{b}.ln1_post.hook_scale"][:, 0] if f"{b}.ln1_post.hook_scale" in found else None for b in blocks
            ),
            residual=found[f"{blocks[-1]}.hook_resid_post"],
        )


@dataclass(frozen=True, eq=False)
class Projected:
    """Contributions to the projected residual at n tokens, checked: they sum to it.

    Attributes:
        directions: unit; each token's own where none was given.
        contributions: one per component.
        total: the residual's projection; with its own direction, its norm.
        norm: the residual's norm.
        error: `|sum of contributions - total| / norm`.
    """

    directions: Float64[Tensor, "n d_model"] = field(repr=False)
    contributions: Float64[Tensor, "n component"] = field(repr=False)
    total: Float64[Tensor, " n"]
    norm: Float64[Tensor, " n"]
    error: Float64[Tensor, " n"]


def projected(writes: Writes, direction: Float64[Tensor, " d_model"] | None) -> Projected:
    """Project the writes on a unit direction, or on each token's own.

    Raises:
        NumericalError: if the residual stream is not finite, or zero with its own direction asked for.
        NotSupportedError: if the writes do not sum to the residual: the block does something that they lack.
    """
    residual = writes.residual.double().cpu()
    norm = residual.norm(dim=1)
    if not torch.isfinite(norm).all():
        raise NumericalError(
            f"the residual stream after block {writes.blocks[-1].layer} is not finite in {writes.residual.dtype}"
        )
    if direction is None and not bool((norm > 0).all()):
        raise NumericalError("the residual stream is zero at a token: it has no direction of its own")
    directions = residual / norm[:, None] if direction is None else direction.cpu().expand_as(residual)
    contributions = writes.project(directions)
    total = (residual * directions).sum(dim=1)
    error = (contributions.sum(dim=1) - total).abs() / norm.clamp_min(torch.finfo(torch.float64).tiny)
    if not bool((error <= largest_error(writes.residual.dtype)).all()):
        raise NotSupportedError(
            f"the writes of heads and MLPs miss the residual stream by {float(error.max()):.1e} of its norm: this "
            "architecture adds something else to it or scales what it adds, or hooks that are active edit it"
        )
    return Projected(directions, contributions, total, norm, error)


def largest_error(dtype: torch.dtype) -> float:
    """How far a sum of writes may miss what it should be, relative to the norm, before it is an error."""
    return _LARGEST_ERROR.get(dtype, _LARGEST_HALF_ERROR)


def shares(contributions: Float64[Tensor, " component"], total: float, norm: float) -> Float64[Tensor, " component"]:
    """Contributions over their total; NaN where the total is nothing but rounding."""
    return contributions / total if abs(total) > 1e-6 * norm else torch.full_like(contributions, float("nan"))


def unit_direction(direction: Float[Tensor, " d_model"] | None, d_model: int) -> Float64[Tensor, " d_model"] | None:
    """A given direction as a unit vector in float64.

    Raises:
        InputError: if it has another width, is zero or not finite.
    """
    if direction is None:
        return None
    wide = direction.detach().double().cpu()
    length = float(wide.norm())
    if wide.shape != (d_model,) or not 0 < length < float("inf"):
        raise InputError(f"direction of shape {tuple(direction.shape)}: expected {d_model} finite numbers, not all 0")
    return wide / length


def seen_through(W: Float[Tensor, "*rest d_model"], u: Float64[Tensor, "n d_model"]) -> Float64[Tensor, "n ..."]:
    """`W u` for every u: the length along u of what each row of W writes; products in float32 or better."""
    wide = W if W.dtype == torch.float64 else W.float()
    flat = u.to(wide.dtype) @ wide.reshape(-1, W.shape[-1]).T
    return flat.double().reshape(len(u), *W.shape[:-1])


def behind_norm(
    u: Float64[Tensor, "#n d_model"], gain: Float[Tensor, " d_model"] | None, scale: Float[Tensor, " n"] | None
) -> Float64[Tensor, "#n d_model"]:
    """The direction that a write meets in front of an RMSNorm whose scale is frozen."""
    return u if gain is None or scale is None else u * gain.double() / scale.double()[:, None]


def _dot(x: Float[Tensor, "*_ d"], u: Float64[Tensor, "*n d"]) -> Float64[Tensor, "*n"]:
    return (x.double() * u).sum(dim=-1)
