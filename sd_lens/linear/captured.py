"""Captured: blocks as linear maps, by least squares on the activations that a corpus really produces.

    A = sum_h W_O[h] W_V[kv(h)] N    N: the fit of attention's norm to the residual stream in front of the block
    F = W_out M                      M: the fit of the neurons to the residual stream that the MLP reads

Unlike the Gaussian closed form, N and M keep the norms' 1/rms, as far as a linear map can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import attention_map
from sd_lens.linear.maps import LinearMap, diagonal, from_matrix
from sd_lens.models.views import Block, Norm, one_mlp

_NO_NORM = Norm("rms", None, None)


@dataclass(frozen=True, eq=False)
class Captured:
    """Linear fits of the norms and neurons of some blocks on a corpus; made by `capture_linear_maps`.

    Attributes:
        layers: the blocks, 0-based; entry i of both tensors belongs to block `layers[i]`.
        norms: N, from the residual stream in front of the block to what attention's norm makes of it.
        neurons: M, from the residual stream that the MLP reads to the activations of its neurons.
        n_tokens: the tokens they were fitted on.
        name: of this linearization.
    """

    layers: tuple[int, ...]
    norms: Float[Tensor, "layer d_model d_model"]
    neurons: Float[Tensor, "layer d_mlp d_model"]
    n_tokens: int
    name: ClassVar[str] = "captured"

    def __str__(self) -> str:
        return f"Captured: linear fits of {len(self.layers)} blocks on {self.n_tokens} tokens"

    __repr__ = __str__

    def maps(self, block: Block) -> tuple[LinearMap, LinearMap]:
        """A and F of a block: `[d_model] -> [d_model]` each, without biases.

        Args:
            block: of the model that was captured.

        Raises:
            InputError: if the block was not captured, or is of another size.
            NotSupportedError: for a mixture of experts.
        """
        block = one_mlp(block)
        if block.layer not in self.layers:
            raise InputError(f"block {block.layer} was not captured, only {', '.join(map(str, self.layers))}")
        N, M = (fits[self.layers.index(block.layer)] for fits in (self.norms, self.neurons))
        if tuple(M.shape) != tuple(block.W_out.shape):
            raise InputError(
                f"captured were blocks of {M.shape[0]} neurons and width {M.shape[1]}, "
                f"not of {block.W_out.shape[0]} and {block.d_model}: capture this model"
            )
        attention = attention_map(replace(block, attention_norm=_NO_NORM))
        output = from_matrix(block.W_out.mT)
        if block.mlp_post_gain is not None:
            output = diagonal(block.mlp_post_gain.to(output.dtype)) @ output
        return attention @ _map_like(attention, N), output @ _map_like(output, M)


class LeastSquares:
    """The linear map, without intercept, that is nearest to pairs of inputs and outputs; its normal equations.

    It keeps `sum x x^T` and `sum x y^T` in float64, not the pairs.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device | str = "cpu"):
        self.n = 0
        self._XX = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self._XY = torch.zeros(d_in, d_out, dtype=torch.float64, device=device)

    def add(self, X: Float[Tensor, "n d_in"], Y: Float[Tensor, "n d_out"]) -> None:
        """Add pairs, one a row."""
        X = X.double()
        self._XX.addmm_(X.mT, X)
        self._XY.addmm_(X.mT, Y.double())
        self.n += len(X)

    def solve(self, ridge: float) -> Float64[Tensor, "d_out d_in"]:
        """The map that minimizes `sum |y - map x|^2 + r |map|^2`, r being `ridge` times the mean of `sum x_i^2`.

        Args:
            ridge: relative to the mean of the diagonal of `sum x x^T`.

        Raises:
            InputError: for fewer pairs than inputs have dimensions.
            NumericalError: if the pairs are not finite, or do not determine the map.
        """
        d_in = len(self._XX)
        if self.n < d_in:
            raise InputError(f"{self.n} tokens are too few to fit {d_in} dimensions: pass texts of at least {d_in}")
        XX = self._XX + ridge * self._XX.diagonal().mean() * torch.eye(
            d_in, dtype=torch.float64, device=self._XX.device
        )
        factor, failed_at = torch.linalg.cholesky_ex(XX)
        if int(failed_at) != 0:
            raise NumericalError(f"the inputs do not determine a linear fit with ridge={ridge}: take a larger one")
        return torch.cholesky_solve(self._XY, factor).mT


def _map_like(M: LinearMap, matrix: Float[Tensor, "d_out d_in"]) -> LinearMap:
    """The map of a matrix that `M` can be combined with."""
    return from_matrix(matrix.to(M.device, M.dtype))
