"""A block as a lone token runs through it, with biases and norms: from the weights, without the model.

A token that attends to itself alone, as the initial token of every text does, has softmax weight 1: its path
through a block is a function of its own stream, and the weights are all that is needed to evaluate it.
"""

from __future__ import annotations

from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.gaussian import activation_function
from sd_lens.models.views import BlockWeights, Norm

Streams = Float[Tensor, "token d_model"]


def normalized(norm: Norm, x: Streams) -> Streams:
    """What a norm makes of streams, its gain and bias included."""
    if norm.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return _plus(x if norm.gain is None else x * norm.gain.to(x.dtype), norm.bias)


def lone_attention(block: BlockWeights, x: Streams) -> Streams:
    """What attention writes for tokens that see only themselves, from the streams in front of the block."""
    n_kv, groups = len(block.W_V), len(block.W_O) // len(block.W_V)
    W_V = rearrange(block.W_V.to(x.dtype), "kv d_model d_head -> d_model (kv d_head)")
    W_O = rearrange(block.W_O.to(x.dtype), "head d_head d_model -> (head d_head) d_model")
    values = _plus(normalized(block.attention_norm, x) @ W_V, None if block.b_V is None else block.b_V.flatten())
    z = repeat(values, "token (kv d_head) -> token (kv group d_head)", kv=n_kv, group=groups)
    written = z @ W_O
    return _behind(block.attention_post_gain, block.attention_norm, _plus(written, block.b_O))


def mlp_input(block: BlockWeights, x: Streams) -> Streams:
    """What the MLP's neurons read: the stream behind the norm in front of it."""
    return normalized(block.mlp_norm, x)


def mlp_neurons(block: BlockWeights, x: Streams) -> Float[Tensor, "token d_mlp"]:
    """What the MLP's neurons give to `W_out` (`hook_post`), from their inputs behind the norm in front of the MLP."""
    act = activation_function(block.act_fn)
    linear = _plus(x @ block.W_in.to(x.dtype), block.b_in)
    if block.W_gate is None:
        return act(linear)
    return _plus(linear * act(_plus(x @ block.W_gate.to(x.dtype), block.b_gate)), block.b_neurons)


def mlp_output(block: BlockWeights, x: Streams) -> Streams:
    """What the MLP writes, from the same inputs."""
    written = _plus(mlp_neurons(block, x) @ block.W_out.to(x.dtype), block.b_out)
    return _behind(block.mlp_post_gain, block.mlp_norm, written)


def mlp_write(block: BlockWeights, x: Streams) -> Streams:
    """What the MLP writes, from the streams that it reads."""
    return mlp_output(block, mlp_input(block, x))


def after_block(block: BlockWeights, x: Streams) -> Streams:
    """The streams of lone tokens after the block, from those in front of it."""
    middle = x + lone_attention(block, x)
    return middle + mlp_write(block, x if block.parallel else middle)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _behind(gain: Tensor | None, norm: Norm, written: Streams) -> Streams:
    """A write behind the RMSNorm that follows it, where there is one; it has the eps of the norm in front."""
    return written if gain is None else normalized(Norm("rms", gain, None, norm.eps), written)
