"""What a block of a running model answers to chosen streams: the oracle of its linear maps."""

from dataclasses import dataclass

import torch

from sd_lens.models.hooks import run_with_hooks


@dataclass(frozen=True)
class Responses:
    """Rows are one-token texts with a stream of our choice in front of a block.

    `attention` and `mlp` are its outputs before any norm behind them; `*_input` the streams that they read.
    """

    attention_input: torch.Tensor
    attention: torch.Tensor
    mlp_input: torch.Tensor
    mlp: torch.Tensor


def responses(model, layer, streams):
    """Put each stream `[n, d_model]` in front of the block and run it alone."""
    prefix = f"blocks.{layer}"
    seen = {}
    names = [f"{prefix}.hook_attn_out", f"{prefix}.hook_mlp_out"]
    names += [f"{prefix}.{norm}.hook_scale" for norm in ("ln1_post", "ln2_post") if hasattr(model.blocks[layer], norm)]
    callbacks = {name: lambda x, n=name: seen.__setitem__(n, x[:, 0].double()) for name in names}
    tokens = torch.full((len(streams), 1), 5)
    run_with_hooks(model, tokens, {f"{prefix}.hook_resid_pre": lambda x: streams[:, None].to(x.dtype)} | callbacks)
    attention, mlp = seen[f"{prefix}.hook_attn_out"], seen[f"{prefix}.hook_mlp_out"]
    is_parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    return Responses(
        attention_input=streams,
        attention=attention * seen.get(f"{prefix}.ln1_post.hook_scale", 1),
        mlp_input=streams.double() if is_parallel else streams.double() + attention,
        mlp=mlp * seen.get(f"{prefix}.ln2_post.hook_scale", 1),
    )


def normalized(model, streams):
    """Streams over the scale that the model's norms divide by, LayerNorm's mean taken away; and that scale."""
    wide = streams.double()
    centred = wide - wide.mean(dim=1, keepdim=True) if "LN" in model.cfg.normalization_type else wide
    scale = (centred.square().mean(dim=1, keepdim=True) + model.cfg.eps).sqrt()
    return centred / scale, scale
