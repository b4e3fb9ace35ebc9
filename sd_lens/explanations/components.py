"""Names of what writes to the residual stream: `embed`, `L11H3`, `L11MLP`, `L11N456`, `L11N456C78`, `L11`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sd_lens.errors import InputError

Kind = Literal[
    "embedding",
    "positional embedding",
    "head",
    "attention bias",
    "attention",
    "mlp",
    "mlp bias",
    "neuron",
    "weight",
    "block",
]

_SUFFIX: dict[Kind, str] = {
    "head": "H", "attention bias": "b_O", "attention": "ATTN", "mlp": "MLP", "mlp bias": "b_out", "neuron": "N",
    "weight": "N", "block": "",
}  # fmt: skip
_LABEL = re.compile(r"L(?P<layer>\d+)(?P<suffix>H|N|ATTN|MLP|b_O|b_out|)(?P<index>\d*)(?:C(?P<channel>\d+))?")
_INDEXED: tuple[Kind, ...] = ("head", "neuron", "weight")


@dataclass(frozen=True)
class Component:
    """One writer to the residual stream.

    Attributes:
        kind: what it is.
        layer: its block, 0-based; None for embeddings.
        index: which head or neuron; for a weight, the neuron whose row of `W_out` it stands in; None for the others.
        channel: where in that row a weight stands; None for the others.
    """

    kind: Kind
    layer: int | None = None
    index: int | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        needs_layer, needs_index = self.kind in _SUFFIX, self.kind in _INDEXED
        for name, value, needed in (
            ("layer", self.layer, needs_layer),
            ("index", self.index, needs_index),
            ("channel", self.channel, self.kind == "weight"),
        ):
            if (value is None) == needed or (value is not None and value < 0):
                raise InputError(f"a component of kind {self.kind!r} has {'a' if needed else 'no'} {name}, not {value}")

    def __str__(self) -> str:
        """Its label, as TransformerLens writes it where it has a word: `embed`, `pos_embed`, `L0H1`, `L0N5`."""
        if self.layer is None:
            return "embed" if self.kind == "embedding" else "pos_embed"
        channel = "" if self.channel is None else f"C{self.channel}"
        return f"L{self.layer}{_SUFFIX[self.kind]}{'' if self.index is None else self.index}{channel}"

    @classmethod
    def parse(cls, label: str) -> Component:
        """The component that a label names.

        Raises:
            InputError: if no component is written so.
        """
        if label in ("embed", "pos_embed"):
            return cls("embedding" if label == "embed" else "positional embedding")
        match = _LABEL.fullmatch(label)
        wanted = None if match is None else (match["suffix"], bool(match["channel"]))
        kind = next((k for k, suffix in _SUFFIX.items() if (suffix, k == "weight") == wanted), None)
        if match is None or kind is None or (kind in _INDEXED) != bool(match["index"]):
            raise InputError(
                f"no component is called {label!r}: expected L11H3 (head), L11ATTN, L11MLP, L11N45 (neuron), "
                "L11N45C6 (weight), L11 (block) or embed"
            )
        index, channel = (int(match[name]) if match[name] else None for name in ("index", "channel"))
        return cls(kind, int(match["layer"]), index, channel)


Components = str | Component | Iterable[str | Component]


def parsed(model: Any, components: Components) -> tuple[Component, ...]:
    """One or several components or labels as components that the model has.

    Raises:
        InputError: if there are none, a label is wrong, or the model has no such layer, head or neuron.
    """
    several = [components] if isinstance(components, str | Component) else components
    found = tuple(dict.fromkeys(c if isinstance(c, Component) else Component.parse(c) for c in several))
    if not found:
        raise InputError("no component was named: pass at least one, such as 'L0MLP'")
    for component in found:
        _check_exists(model, component)
    return found


def heads_and_mlps(model: Any) -> list[Component]:
    """Every head and every MLP, in the order in which they write."""
    cfg = model.cfg
    return [
        component
        for layer in range(cfg.n_layers)
        for component in [*(Component("head", layer, head) for head in range(cfg.n_heads)), Component("mlp", layer)]
    ]


def _check_exists(model: Any, component: Component) -> None:
    cfg = model.cfg
    if component.layer is None:
        if component.kind == "positional embedding" and cfg.positional_embedding_type != "standard":
            raise InputError("pos_embed does not exist: the model adds no positional embedding to the stream")
        return
    if component.layer >= cfg.n_layers:
        raise InputError(f"{component} does not exist: the model has blocks 0 to {cfg.n_layers - 1}")
    if component.index is None:
        return
    if component.kind == "head" and component.index >= cfg.n_heads:
        raise InputError(f"{component} does not exist: block {component.layer} has heads 0 to {cfg.n_heads - 1}")
    if component.kind in ("neuron", "weight"):
        W_out = getattr(model.blocks[component.layer].mlp, "W_out", None)
        if W_out is None or W_out.ndim != 2:
            raise InputError(f"{component} does not exist: block {component.layer} has no single matrix W_out")
        if component.index >= W_out.shape[0]:
            raise InputError(
                f"{component} does not exist: block {component.layer} has neurons 0 to {W_out.shape[0] - 1}"
            )
        if component.channel is not None and component.channel >= W_out.shape[1]:
            raise InputError(f"{component} does not exist: the stream has channels 0 to {W_out.shape[1] - 1}")
