"""The linear layers of a model's blocks: what transformers calls them, and the tensors that a run really reads.

Beside `blocks.py`, the only module that knows how architectures and wrappers differ. A bridge renames modules and runs
joint matrices in parts, and a HookedTransformer keeps neither modules nor names, so names come from one table here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sd_lens.errors import NotSupportedError
from sd_lens.models.blocks import block_weights, wanted_layers
from sd_lens.models.hooks import architecture_of

Reads = Literal["attention", "heads", "mlp", "neurons"]
"""What a linear layer reads: the stream behind the norm of attention, `z`, the stream behind the MLP's, `post`."""

_ROLES: dict[Reads, tuple[str, ...]] = {
    "attention": ("q", "k", "v"), "heads": ("o",), "mlp": ("gate", "in"), "neurons": ("out",),
}  # fmt: skip


class _Names(NamedTuple):
    """Of transformers' modules. Where several roles have one name, they are one matrix, rounded with one scale."""

    blocks: str
    attention: tuple[str, str, str]  # q, k, v
    heads: str
    mlp: tuple[str, ...]  # gate and in, or in alone
    neurons: str

    def of(self, layer: int) -> dict[str, str]:
        """The name of each role's module in a block."""
        by_role = dict(zip(("q", "k", "v"), self.attention, strict=True)) | {"o": self.heads, "out": self.neurons}
        by_role |= dict(zip(("gate", "in")[-len(self.mlp) :], self.mlp, strict=True))
        return {role: f"{self.blocks}.{layer}.{name}" for role, name in by_role.items()}


def _joint(name: str) -> tuple[str, str, str]:
    return (name, name, name)


_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = _Names("model.layers", _SEPARATE, "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_NAMES = {
    **dict.fromkeys(
        ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM",
         "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        _LLAMA,
    ),
    "Phi3ForCausalLM": _LLAMA._replace(attention=_joint("self_attn.qkv_proj"), mlp=("mlp.gate_up_proj",) * 2),
    "PhiForCausalLM": _Names("model.layers", _SEPARATE, "self_attn.dense", ("mlp.fc1",), "mlp.fc2"),
    "OPTForCausalLM": _Names("model.decoder.layers", _SEPARATE, "self_attn.out_proj", ("fc1",), "fc2"),
    "GPT2LMHeadModel": _Names("transformer.h", _joint("attn.c_attn"), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    "GPTJForCausalLM": _Names(
        "transformer.h", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.out_proj", ("mlp.fc_in",), "mlp.fc_out"
    ),
    "GPTNeoXForCausalLM": _Names(
        "gpt_neox.layers", _joint("attention.query_key_value"), "attention.dense", ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
    ),
    "FalconForCausalLM": _Names(
        "transformer.h", _joint("self_attention.query_key_value"), "self_attention.dense", ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
    ),
    "MptForCausalLM": _Names(
        "transformer.blocks", _joint("attn.Wqkv"), "attn.out_proj", ("ffn.up_proj",), "ffn.down_proj"
    ),
}  # fmt: skip
"""Fixed in transformers' code for each architecture; the tests compare them with its modules."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that a forward pass reads, and those of its axes along which the layer sums its input."""

    parameter: nn.Parameter
    input_axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear layer as transformers has it.

    Attributes:
        name: its module's.
        weights: the parameters that run in its place: itself, or the parts into which a wrapper cut a joint matrix.
    """

    name: str
    weights: tuple[Weight, ...]

    @property
    def n_parameters(self) -> int:
        """Its number of weights, biases left out."""
        return sum(weight.parameter.numel() for weight in self.weights)


@dataclass(frozen=True, eq=False)
class InputPoint:
    """A place where the input of linear layers passes: it enters a module, or leaves one.

    Attributes:
        module: that module.
        side: which of the two.
        axes: the last axes of the activation, those that the layers sum over.
    """

    module: nn.Module
    side: Literal["enters", "leaves"]
    axes: tuple[int, ...] = (-1,)

    def edited(self, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """From now until the handle is removed, the layers read what `edit` makes of their input."""
        if self.side == "enters":
            return self.module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
        return self.module.register_forward_hook(lambda _, __, output: edit(output))


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """The linear layers of a block that read one activation.

    Attributes:
        layer: 0-based index of the block.
        reads: which activation.
        linears: the layers.
        points: where it passes; once, or for each of the parts that run.
    """

    layer: int
    reads: Reads
    linears: tuple[LinearLayer, ...]
    points: tuple[InputPoint, ...]


def linear_groups(model: Any, layers: Iterable[int] | None = None) -> list[LinearGroup]:
    """The linear layers of some blocks, or of all, by what they read; all the model's but embedding and unembedding.

    Raises:
        InputError: if a block does not exist.
        NotSupportedError: for an architecture that is not covered, mixtures of experts among them.
    """
    wanted = wanted_layers(model.cfg.n_layers, layers)
    names = _names(model)
    return [group for layer in wanted for group in _groups(model, layer, names.of(layer))]


def _names(model: Any) -> _Names:
    architecture = architecture_of(model)
    if architecture not in _NAMES:
        raise NotSupportedError(
            f"not supported yet: the linear layers of {architecture or 'a model of no known architecture'}; "
            f"supported are {', '.join(sorted(_NAMES))}"
        )
    return _NAMES[architecture]


def _groups(model: Any, layer: int, names: dict[str, str]) -> Iterable[LinearGroup]:
    block_weights(model, layer)  # says what is not supported
    block = model.blocks[layer]
    roles = _bridge_roles(block) if hasattr(model, "original_model") else _hooked_roles(block)
    for reads, members in _ROLES.items():
        present = [role for role in members if role in roles]
        by_name: dict[str, list[Weight]] = {}
        for role in present:
            by_name.setdefault(names[role], []).append(roles[role][0])
        points = {id(roles[role][1].module): roles[role][1] for role in present}
        linears = tuple(LinearLayer(name, tuple(weights)) for name, weights in by_name.items())
        yield LinearGroup(layer, reads, linears, tuple(points.values()))


def _hooked_roles(block: Any) -> dict[str, tuple[Weight, InputPoint]]:
    """Of HookedTransformer: its own parameters, and what norms, `hook_z` and `hook_post` give out.

    Under grouped-query attention `W_K` and `W_V` are repeated copies, which a run does not read.
    """
    attn, mlp = dict(block.attn.named_parameters()), dict(block.mlp.named_parameters())
    grouped = "_" if "_W_K" in attn else ""
    normalized, neurons = InputPoint(block.ln1, "leaves"), InputPoint(block.mlp.hook_post, "leaves")
    heads = InputPoint(block.attn.hook_z, "leaves", (-2, -1))
    mlp_input = InputPoint(block.ln2, "leaves")
    roles = {
        "q": (Weight(attn["W_Q"], (1,)), normalized),
        "k": (Weight(attn[f"{grouped}W_K"], (1,)), normalized),
        "v": (Weight(attn[f"{grouped}W_V"], (1,)), normalized),
        "o": (Weight(attn["W_O"], (0, 1)), heads),
        "in": (Weight(mlp["W_in"], (0,)), mlp_input),
        "out": (Weight(mlp["W_out"], (0,)), neurons),
    }
    return roles | ({"gate": (Weight(mlp["W_gate"], (0,)), mlp_input)} if "W_gate" in mlp else {})


def _bridge_roles(block: Any) -> dict[str, tuple[Weight, InputPoint]]:
    """Of the bridge: the modules that it runs, transformers' own or the parts into which it cut a joint one."""
    components = {role: getattr(block.attn, role) for role in ("q", "k", "v", "o")}
    components |= {role: getattr(block.mlp, role, None) for role in ("gate", "in", "out")}
    return {
        role: (_module_weight(component.original_component), InputPoint(component.original_component, "enters"))
        for role, component in components.items()
        if component is not None
    }


def _module_weight(module: Any) -> Weight:
    """The weight of nn.Linear, stored as `[out, in]`, or of transformers' Conv1D, stored as `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    return Weight(module.weight, (0,) if isinstance(module, Conv1D) else (1,))
