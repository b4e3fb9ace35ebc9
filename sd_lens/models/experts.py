"""How HookedTransformer and TransformerBridge store mixtures of experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from sd_lens.models.views import Router


def is_mixture(block: Any) -> bool:
    """Whether a block's MLP is a mixture of experts."""
    return hasattr(block.mlp, "experts")


def _lists_experts(mlp: Any) -> bool:
    """Whether experts are modules of their own (HookedTransformer), not slices of two tensors (transformers)."""
    return isinstance(mlp.experts, nn.ModuleList)


def expert_mlps(mlp: Any) -> list[Any]:
    """MLPs with the tensors of each expert; one that all tokens share is the last."""
    if _lists_experts(mlp):
        stored = [(expert.W_gate.weight, expert.W_in.weight, expert.W_out.weight) for expert in mlp.experts]
    else:  # the gate is the first half
        pairs = zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)
        stored = [(*gate_and_in.chunk(2), W_out) for gate_and_in, W_out in pairs]
    experts = [SimpleNamespace(W_gate=gate.mT, W_in=linear.mT, W_out=out.mT) for gate, linear, out in stored]
    shared = getattr(mlp, "shared_expert", None)
    return experts if shared is None else [*experts, shared]


def router(cfg: Any, mlp: Any) -> Router:
    """What chooses and weighs the experts."""
    shared = getattr(mlp, "shared_expert_gate", None)
    W_shared = None if shared is None else shared.weight.detach()[0]
    if _lists_experts(mlp):
        return Router(mlp.W_gate.weight.detach().mT, cfg.experts_per_token, cfg.norm_topk_prob, W_shared)
    # Mixtral's router has no such switch: it always divides.
    renormalized = bool(getattr(mlp.gate, "norm_topk_prob", True))
    return Router(mlp.gate.weight.detach().mT, mlp.gate.top_k, renormalized, W_shared)
