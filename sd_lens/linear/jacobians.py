"""Blocks linearised at a stream: exact Jacobians as maps, from forward and reverse products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.linear.lone_token import lone_attention, mlp_write
from sd_lens.linear.maps import LinearMap, computing_dtype
from sd_lens.models.views import Block, BlockWeights, one_mlp


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The linearisation of every block at one stream: what a lone token's small changes become.

    A and F are the derivatives of what attention and MLP write, so that `(I + F)(I + A)` (or `I + A + F`) is that
    of the whole block. They keep the norms' 1/rms and its derivative, which the Gaussian maps drop. A write depends
    on a stream's direction, hardly on its length; along the stream itself the derivative of a write is therefore
    almost zero: these maps say what becomes of a deviation from the stream, not whether its own norm decays.

    Attributes:
        streams: where each block is linearised, in front of it.
        layers: the blocks, 0-based; row i of `streams` belongs to block `layers[i]`.

    Source: docs/linearizations.md.
    """

    name: ClassVar[str] = "jacobian"
    streams: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]

    def maps(self, block: Block) -> tuple[LinearMap, LinearMap]:
        """A and F of a block.

        Raises:
            InputError: if the block is not among `layers`, or its stream has another width or is not finite.
            NotSupportedError: for a mixture of experts.
        """
        if block.layer not in self.layers:
            raise InputError(f"block {block.layer} has no stream to linearise at: there are those of {self.layers}")
        return jacobian_maps(one_mlp(block), self.streams[self.layers.index(block.layer)])


def jacobian_maps(block: BlockWeights, x: Float[Tensor, " d_model"]) -> tuple[LinearMap, LinearMap]:
    """A and F of a block at the stream `x` in front of it, see `Jacobian`.

    Raises:
        InputError: if the stream has another width, or is not finite.
    """
    if x.shape != (block.d_model,) or not bool(torch.isfinite(x).all()):
        raise InputError(f"expected a finite stream of {block.d_model} entries; got shape {tuple(x.shape)}")
    x = x.to(block.W_in.device, computing_dtype(block.W_in.dtype))
    read = x if block.parallel else x + lone_attention(block, x[None])[0]
    return _jacobian(lambda s: lone_attention(block, s), x), _jacobian(lambda s: mlp_write(block, s), read)


def _jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> LinearMap:
    def product(columns: Tensor) -> Tensor:
        pushed: Tensor = torch.func.jvp(function, (x.repeat(columns.shape[1], 1),), (columns.mT.contiguous(),))[1]
        return pushed.mT

    def transposed_product(columns: Tensor) -> Tensor:
        pulled: Tensor = torch.func.vjp(function, x.repeat(columns.shape[1], 1))[1](columns.mT)[0]
        return pulled.mT

    return LinearMap((len(x), len(x)), product, transposed_product, x.dtype, x.device)
