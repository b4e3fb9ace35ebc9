"""Ablating components while the model runs: what is replaced, by what, at which tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.components import Component, Components, parsed
from sd_lens.explanations.contributions import behind_norm, seen_through, unit_direction
from sd_lens.explanations.references import Reference, collect_reference, slots_of
from sd_lens.models.blocks import block_writes
from sd_lens.models.hooks import Callback, hooked
from sd_lens.observations.texts import Texts

Mode = Literal["zero", "mean", "resample", "direction"]

At = Bool[Tensor, "batch pos"] | Sequence[int] | None
"""The tokens at which to ablate: a mask of the batch that runs, positions of every row, or None for all."""


@contextmanager
def ablated(
    model: Any,
    components: Components,
    mode: Mode = "zero",
    *,
    reference: Texts | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    positions: int | Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[None]:
    """While the block runs, components are ablated in every forward pass; afterwards the model is as before.

    Contexts nest, and what observes the model can run inside (`scan_norms`, `find_high_norm_tokens`, TransformerLens's
    own). Attribution cannot, where the ablation edits a whole output: the stream is no longer the sum of the writes.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        components: labels or `Component`s: `"L11H3"` (head), `"L11ATTN"`, `"L11MLP"`, `"L11N45"` (neuron),
            `"L11N45C6"` (single weight: that neuron's entry of `W_out` for channel 6), `"L11"` (block), `"embed"`; one
            or several.
        mode: what takes the place of the component's activation: `"zero"`; `"mean"` of the reference;
            `"resample"`, the activation of a token drawn from the reference, anew for every token; or `"direction"`:
            the activation stays, and only what it writes along `direction` is taken away. Single weights can only be
            zeroed.
        reference: texts for mean and resample.
        direction: for `"direction"`; normalized before use.
        positions: ablate at these positions of every row that runs; everywhere by default. (With a key-value cache, as
            in `generate`, every new token runs at position 0.)
        seed: of `"resample"`.
        progress: show a progress bar while the reference is read.

    Raises:
        InputError: for a component, mode, or reference that cannot be used.
        NotSupportedError: for `"direction"` on attention without output weights per head.

    Example:
        >>> with ablated(model, "L11MLP"):  # doctest: +SKIP
        ...     scan_norms(model, texts)
    """
    wanted = parsed(model, components)
    check_mode(mode, direction, reference)
    at = _positions(positions)
    found = None
    if mode in ("mean", "resample"):
        if reference is None:
            raise InputError(f"mode={mode!r} needs reference: texts to take the activations from")
        found = collect_reference(model, reference, wanted, seed=seed, progress=progress)
    ablator = Ablator(model, mode, reference=found, direction=direction, seed=seed)
    with hooked(model, ablator.callbacks((component, at) for component in wanted)):
        yield


def _positions(positions: int | Sequence[int] | None) -> list[int] | None:
    if positions is None:
        return None
    several = torch.as_tensor(positions)
    if several.numel() == 0 or several.dtype == torch.bool or several.is_floating_point() or int(several.min()) < 0:
        raise InputError(f"positions={positions!r}: expected positions from 0 on")
    return several.reshape(-1).tolist()


def check_mode(mode: str, direction: Tensor | None, reference: Texts | None) -> None:
    """Whether there is such a mode, and direction and reference where it has a use for them, nowhere else.

    Raises:
        InputError: if not.
    """
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}; expected one of {get_args(Mode)}")
    if mode == "direction" and direction is None:
        raise InputError("mode='direction' needs a direction, such as found.direction")
    if mode != "direction" and direction is not None:
        raise InputError(f"a direction was given, but mode={mode!r} has no use for it: pass mode='direction'")
    if mode not in ("mean", "resample") and reference is not None:
        raise InputError(f"a reference was given, but mode={mode!r} has no use for it: pass mode='mean' or 'resample'")


class Ablator:
    """Makes the callbacks that ablate components in one way."""

    def __init__(
        self,
        model: Any,
        mode: Mode,
        *,
        reference: Reference | None = None,
        direction: Float[Tensor, " d_model"] | None = None,
        seed: int = 0,
    ):
        self.model = model
        self.mode = mode
        self.reference = reference
        self._unit = unit_direction(direction, model.cfg.d_model)
        self._seed = seed
        self._generators: dict[tuple[str, int | None], torch.Generator] = {}

    def restart(self) -> None:
        """Draw from the beginning again: what a component is replaced by must not depend on those before it."""
        self._generators.clear()

    def callbacks(self, targets: Iterable[tuple[Component, At]]) -> dict[str, Callback]:
        """One callback per hook point, that makes all edits there one after the other."""
        edits: dict[str, list[Callback]] = {}
        seen: dict[int | None, dict[str, Tensor]] = {}
        # Heads and neurons first, then weights: a whole output that was replaced, or freed of the direction, has no
        # parts left to take away, and a neuron that was replaced writes something else through its weights.
        for component, at in sorted(targets, key=lambda target: _order(target[0])):
            if component.kind == "weight" and self.mode == "zero":
                found = self._unweighting(component, at, seen.setdefault(component.layer, {}))
            else:
                found = self._unwriting(component, at) if self.mode == "direction" else self._replacing(component, at)
            for point, edit in found:
                edits.setdefault(point, []).append(edit)
        return {point: partial(_in_turn, several) for point, several in edits.items()}

    def _replacing(self, component: Component, at: At) -> list[tuple[str, Callback]]:
        return [(point, partial(self._replaced, point, index, at)) for point, index in slots_of(component)]

    def _replaced(self, point: str, index: int | None, at: At, activation: Tensor) -> Tensor:
        here: tuple[Any, ...] = (slice(None), slice(None), *(() if index is None else (index,)))
        new = self._replacement(activation, point, index)[here]
        edited = activation.clone()
        edited[here] = torch.where(_mask(at, new), new, edited[here])
        return edited

    def _replacement(self, activation: Tensor, point: str, index: int | None) -> Tensor:
        if self.mode == "zero":
            return torch.zeros_like(activation)
        assert self.reference is not None
        if self.mode == "mean":
            return self.reference.means[point].to(activation).expand_as(activation)
        samples = self.reference.samples[point]
        drawn = self._drawn(len(samples), activation.shape[0], activation.shape[1], (point, index))
        return samples[drawn.to(samples.device)].to(activation)

    def _drawn(self, n: int, n_rows: int, n_positions: int, slot: tuple[str, int | None]) -> Int64[Tensor, "batch pos"]:
        """Which samples take the tokens' places: a sequence for each text, so that batching does not matter."""
        if slot not in self._generators:
            self._generators[slot] = torch.Generator().manual_seed(self._seed + zlib.crc32(repr(slot).encode()))
        longest = max(self.model.cfg.n_ctx, n_positions)
        rows = [torch.randint(n, (longest,), generator=self._generators[slot]) for _ in range(n_rows)]
        return torch.stack(rows)[:, :n_positions]

    def _unwriting(self, component: Component, at: At) -> list[tuple[str, Callback]]:
        """Edits that take away what a component writes along the direction, and nothing else."""
        if component.kind in ("head", "neuron"):
            return self._unwriting_part(component, at)

        def unwrite(write: Tensor) -> Tensor:
            return self._without(write, write.double() @ self._u(write), at)

        return [(point, unwrite) for point, _ in slots_of(component)]

    def _unwriting_part(self, component: Component, at: At) -> list[tuple[str, Callback]]:
        """The same for a head or neuron, whose write is a summand of its block's attention or MLP output."""
        assert component.layer is not None
        assert component.index is not None
        block = block_writes(self.model, component.layer)
        is_head = component.kind == "head"
        W = block.W_O if is_head else block.W_out
        gain = block.attention_post_gain if is_head else block.mlp_post_gain
        assert W is not None  # the neuron was found to exist
        row = W[component.index]
        ((source, index),) = slots_of(component)
        seen: dict[str, Tensor] = {}

        def unwrite(write: Tensor) -> Tensor:
            scale = seen["scale"].reshape(-1) if gain is not None else None
            ways = seen_through(row, behind_norm(self._u(write)[None], gain, scale))
            part = seen["part"][:, :, index].double().flatten(0, 1)
            length = (part * ways).sum(dim=-1) if is_head else part * ways
            return self._without(write, length.reshape(write.shape[:2]), at)

        prefix = f"blocks.{component.layer}"
        edits: list[tuple[str, Callback]] = [(source, partial(_remember, seen, "part"))]
        if gain is not None:
            edits.append((f"{prefix}.ln{1 if is_head else 2}_post.hook_scale", partial(_remember, seen, "scale")))
        return [*edits, (f"{prefix}.hook_{'attn' if is_head else 'mlp'}_out", unwrite)]

    def _unweighting(self, component: Component, at: At, seen: dict[str, Tensor]) -> list[tuple[str, Callback]]:
        """Edits of an MLP's output that make it what it would be with one entry of `W_out` zero.

        `seen` is shared by the weights of a block: behind a norm, each finds what those before it have left.
        """
        assert component.layer is not None
        block = block_writes(self.model, component.layer)
        assert block.W_out is not None  # the weight was found to exist
        weight, gain = float(block.W_out[component.index, component.channel]), block.mlp_post_gain

        def remove(write: Tensor) -> Tensor:
            part = seen["post"][:, :, component.index].double() * weight
            part = part.where(_mask(at, part), 0.0)
            if gain is None:
                less = write.clone()
                less[..., component.channel] = (write[..., component.channel].double() - part).to(write.dtype)
                return less
            if "normalized" in seen:
                scale = seen.pop("scale").double().reshape(*write.shape[:2], 1)
                seen["raw"] = seen.pop("normalized").double() * scale
            raw = seen["raw"]
            raw[..., component.channel] -= part
            normed = raw / (raw.square().mean(dim=-1, keepdim=True) + self.model.cfg.eps).sqrt() * gain.double()
            return torch.where(_mask(at, write), normed.to(write.dtype), write)

        prefix = f"blocks.{component.layer}"
        points = {"post": "mlp.hook_post"}
        points |= {} if gain is None else {"scale": "ln2_post.hook_scale", "normalized": "ln2_post.hook_normalized"}
        edits: list[tuple[str, Callback]] = [
            (f"{prefix}.{point}", partial(_remember, seen, name)) for name, point in points.items()
        ]
        return [*edits, (f"{prefix}.hook_mlp_out", remove)]

    def _u(self, like: Tensor) -> Tensor:
        assert self._unit is not None
        return self._unit.to(like.device)

    def _without(self, write: Tensor, length: Tensor, at: At) -> Tensor:
        less = (write.double() - length[..., None] * self._u(write)).to(write.dtype)
        return torch.where(_mask(at, write), less, write)


def _in_turn(edits: list[Callback], activation: Tensor) -> Tensor | None:
    result = activation
    for edit in edits:
        edited = edit(result)
        result = result if edited is None else edited
    return None if result is activation else result


def _order(component: Component) -> int:
    return {"head": 0, "neuron": 0, "weight": 1}.get(component.kind, 2)


def _remember(seen: dict[str, Tensor], name: str, activation: Tensor) -> None:
    seen[name] = activation


def _mask(at: At, like: Tensor) -> Bool[Tensor, ...]:
    """Which entries of a `[batch, pos, ...]` activation `at` means, with trailing axes of size 1."""
    if at is None:
        mask = torch.ones(1, 1, dtype=torch.bool)
    elif isinstance(at, Tensor):
        mask = at
    else:
        mask = torch.zeros(1, like.shape[1], dtype=torch.bool)
        mask[0, [position for position in at if position < like.shape[1]]] = True
    return mask.to(like.device)[(..., *[None] * (like.ndim - 2))]
