"""A, F and L: attention, MLP and block as linear maps (Wang et al. 2025, section 3).

    A = sum_h W_O[h] W_V[kv(h)] N_attn        one token alone: the softmax weight is 1
    F = W_out M N_mlp                          M: the linear fit of the neurons under Gaussian input
    L = (I + F)(I + A)                         or I + A + F where the two are in parallel

N is what is linear in a norm: its gain, and LayerNorm's centring. The factor 1/rms is dropped; it scales
a direction's length and does not turn it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Float64
from torch import Tensor

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.gaussian import activation_function, gaussian_expectations
from sd_lens.linear.maps import (
    LinearMap,
    centering,
    computing_dtype,
    diagonal,
    from_matrix,
    identity,
    identity_like,
)
from sd_lens.models.views import Block, BlockWeights, Norm, one_mlp

Linearization = Literal["gaussian", "sampled"]
Convention = Literal["post-gain", "pre-gain"]


@runtime_checkable
class MapsOfBlocks(Protocol):
    """A linearisation that brings its own maps, such as `Jacobian`, `Captured` and `RouterWeighted`."""

    @property
    def name(self) -> str:
        """What results call it."""

    def maps(self, block: Block) -> tuple[LinearMap, LinearMap]:
        """A and F of a block."""


_SAMPLES_AT_ONCE = 4096


def block_parts(
    block: Block,
    linearization: Linearization | MapsOfBlocks = "gaussian",
    *,
    convention: Convention = "post-gain",
    centered: bool = True,
    n_samples: int = 100_000,
    seed: int = 0,
) -> tuple[LinearMap, LinearMap]:
    """A and F of a block in any linearisation: a name, or an object that has maps of its own.

    The options belong to the names, see `ffn_map`; an object does not read them.

    Raises:
        InputError: as `ffn_map`, or as the object's `maps`.
        NotSupportedError: as `ffn_map`; for a mixture of experts, which has maps by `RouterWeighted` alone.
        NumericalError: as `ffn_map`.
    """
    if isinstance(linearization, MapsOfBlocks):
        return linearization.maps(block)
    block = one_mlp(block)
    F = ffn_map(block, linearization, convention=convention, centered=centered, n_samples=n_samples, seed=seed)
    return attention_map(block, centered=centered), F


def name_of(linearization: Linearization | MapsOfBlocks) -> str:
    """What results call a linearisation."""
    return linearization.name if isinstance(linearization, MapsOfBlocks) else linearization


def norm_map(norm: Norm, weight: Tensor, *, centered: bool = True) -> LinearMap:
    """N, the linear part of a norm: its gain, after LayerNorm's centring unless `centered` is False.

    Args:
        norm: the norm.
        weight: a weight that reads it; gives width (`shape[0]`), dtype and device.
        centered: False is the paper's variant, which drops LayerNorm's centring.
    """
    d_model, dtype, device = weight.shape[0], computing_dtype(weight.dtype), weight.device
    N = identity(d_model, dtype=dtype, device=device)
    if norm.kind == "layer" and centered:
        N = centering(d_model, dtype=dtype, device=device)
    return N if norm.gain is None else diagonal(norm.gain.to(dtype)) @ N


def attention_map(block: BlockWeights, *, centered: bool = True) -> LinearMap:
    """A, the attention of a token that sees only itself: `[d_model] -> [d_model]`, without biases."""
    n_kv, _, d_head = block.W_V.shape
    groups = block.W_O.shape[0] // n_kv
    heads = [from_matrix(W.mT) for W in block.W_V]
    dtype, device = heads[0].dtype, heads[0].device
    values = LinearMap(
        (n_kv * d_head, block.d_model),
        lambda x: torch.cat([V @ x for V in heads]),
        lambda v: sum(
            (V.T @ part for V, part in zip(heads, v.split(d_head), strict=True)),
            start=torch.zeros((), dtype=dtype, device=device),
        ),
        dtype,
        device,
    )
    shared = LinearMap(
        (n_kv * groups * d_head, n_kv * d_head),
        lambda v: repeat(v, "(kv d_head) k -> (kv group d_head) k", kv=n_kv, group=groups),
        lambda z: reduce(z, "(kv group d_head) k -> (kv d_head) k", "sum", kv=n_kv, group=groups),
        dtype,
        device,
    )
    output = from_matrix(rearrange(block.W_O, "head d_head d_model -> d_model (head d_head)"))
    A = output @ shared @ values @ norm_map(block.attention_norm, block.W_in, centered=centered)
    return _behind(block.attention_post_gain, A)


def ffn_map(
    block: BlockWeights,
    linearization: Linearization = "gaussian",
    *,
    convention: Convention = "post-gain",
    centered: bool = True,
    n_samples: int = 100_000,
    seed: int = 0,
) -> LinearMap:
    """F, the MLP as a linear map: `[d_model] -> [d_model]`, without biases.

    Args:
        block: the block's weights.
        linearization: `"gaussian"`, the closed form; or `"sampled"`, the paper's least-squares fit on
            random inputs, which the closed form is the limit of.
        convention: where `x ~ N(0, I)` is drawn: `"post-gain"` at the MLP's input (the paper's), or
            `"pre-gain"` before the norm's gain. Under a norm that TransformerLens has folded the two are the
            same.
        centered: whether LayerNorm's centring is kept.
        n_samples: of `"sampled"`.
        seed: of `"sampled"`.

    Raises:
        InputError: for an unknown linearization or convention.
        NotSupportedError: for an activation without closed form.
        NumericalError: for weights that are not finite.
    """
    if linearization not in get_args(Linearization):
        raise InputError(f"unknown linearization {linearization!r}; expected one of {get_args(Linearization)}")
    if convention not in get_args(Convention):
        raise InputError(f"unknown convention {convention!r}; expected one of {get_args(Convention)}")
    output = _behind(block.mlp_post_gain, from_matrix(block.W_out.mT))
    N = norm_map(block.mlp_norm, block.W_in, centered=centered)
    if linearization == "gaussian":
        return output @ gaussian_fit(block, N, convention) @ N
    return output @ (
        from_matrix(sampled_fit(block, identity_like(N), None, n_samples=n_samples, seed=seed)) @ N
        if convention == "post-gain"
        else from_matrix(sampled_fit(block, N, block.mlp_norm.bias, n_samples=n_samples, seed=seed))
    )


def neuron_map(block: BlockWeights) -> LinearMap:
    """The Gaussian linear map of the MLP from its input, behind the norm: F without N."""
    N = identity_like(norm_map(block.mlp_norm, block.W_in))
    return _behind(block.mlp_post_gain, from_matrix(block.W_out.mT)) @ gaussian_fit(block, N, "post-gain")


def block_map(A: LinearMap, F: LinearMap, *, parallel: bool = False) -> LinearMap:
    """L, one block: `(I + F)(I + A)`, or `I + A + F` if attention and MLP are `parallel`: `[d_model] -> [d_model]`."""
    I = identity_like(A)  # noqa: E741
    return I + A + F if parallel else (I + F) @ (I + A)


def _behind(gain: Float[Tensor, " d_model"] | None, M: LinearMap) -> LinearMap:
    """M and the gain of the norm behind it, whose scale is dropped like that of every norm."""
    return M if gain is None else diagonal(gain.to(M.dtype)) @ M


def gaussian_fit(block: BlockWeights, N: LinearMap, convention: Convention) -> LinearMap:
    """M, the infinite-sample least-squares fit of the neurons: `[d_model] -> [d_mlp]`.

    `M = diag(a) W_gate + diag(b) W_in` (gated) or `diag(b) W_in`, with coefficients from
    `gaussian_expectations`; see docs/closed_form.md. The convention changes the coefficients alone:
    under `"pre-gain"` a neuron's weights are seen through `N`.
    """
    gate = block.W_in if block.W_gate is None else block.W_gate
    seen_through = N if convention == "pre-gain" else None
    shift = block.mlp_norm.bias if convention == "pre-gain" else None
    scale = _column_products(gate, gate, seen_through).sqrt()
    E = gaussian_expectations(
        block.act_fn, scale, _mean_input(gate, block.b_in if block.W_gate is None else block.b_gate, shift)
    )
    if block.W_gate is None:
        return diagonal(E.slope.to(N.dtype)) @ from_matrix(gate.mT)
    overlap = _column_products(gate, block.W_in, seen_through)
    # A gate column of zeros has no direction to fit: its coefficient is irrelevant.
    along_gate = torch.where(scale > 0, overlap / scale.clamp_min(1e-300) * E.tilted_slope, 0.0)
    along_gate = along_gate + _mean_input(block.W_in, block.b_in, shift) * E.slope
    from_gate, from_in = from_matrix(gate.mT), from_matrix(block.W_in.mT)
    return diagonal(along_gate.to(N.dtype)) @ from_gate + diagonal(E.value.to(N.dtype)) @ from_in


def _mean_input(
    W: Float[Tensor, "d_model d_mlp"],
    bias: Float[Tensor, " d_mlp"] | None,
    shift: Float[Tensor, " d_model"] | None,
) -> Float64[Tensor, " d_mlp"]:
    """The mean of `W^T (x + shift) + bias` over centred x."""
    mean = torch.zeros(W.shape[1], dtype=torch.float64, device=W.device)
    if bias is not None:
        mean = mean + bias.double()
    if shift is not None:
        mean = mean + (from_matrix(W.mT) @ shift.to(computing_dtype(W.dtype))).double()
    return mean


def _column_products(
    W: Float[Tensor, "d_model d_mlp"], U: Float[Tensor, "d_model d_mlp"], N: LinearMap | None
) -> Float64[Tensor, " d_mlp"]:
    """`<N^T w_j, N^T u_j>` for every neuron j, accumulated in float64, a slice of neurons at a time."""
    dtype = computing_dtype(W.dtype)
    result = torch.empty(W.shape[1], dtype=torch.float64, device=W.device)
    through: Callable[[Tensor], Tensor] = (lambda x: x) if N is None else (lambda x: N.T @ x)
    for w, u, products in zip(W.split(256, dim=1), U.split(256, dim=1), result.split(256), strict=True):
        torch.sum(through(w.to(dtype)) * through(u.to(dtype)), dim=0, dtype=torch.float64, out=products)
    return result


def sampled_fit(
    block: BlockWeights, inputs: LinearMap, shift: Tensor | None, *, n_samples: int, seed: int
) -> Float[Tensor, "d_mlp d_model"]:
    """M by least squares on `n_samples` Gaussian inputs: the estimator of the paper's code.

    The normal equations stand in for `lstsq`: for Gaussian inputs their condition number is
    `((1 + r) / (1 - r))^2`, `r = sqrt(d_model / n_samples)`: 1.4 for SmolLM2 and 2.3 for width 4096 at the
    paper's 100,000 samples. They need no memory for the samples.

    Args:
        block: the block's weights.
        inputs: applied to each sample before the MLP.
        shift: `[d_model]`, added behind it.
        n_samples: how many inputs.
        seed: of the inputs.
    """
    d_model, d_mlp = block.W_in.shape
    if n_samples < 2 * d_model:
        raise InputError(f"n_samples={n_samples} is too few to fit {d_model} inputs; take at least {2 * d_model}")
    act, dtype, device = activation_function(block.act_fn), inputs.dtype, inputs.device
    generator = torch.Generator(device).manual_seed(seed)
    XX = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)
    XH = torch.zeros(d_model, d_mlp, dtype=torch.float64, device=device)
    for start in range(0, n_samples, _SAMPLES_AT_ONCE):
        n = min(_SAMPLES_AT_ONCE, n_samples - start)
        X = torch.randn(d_model, n, generator=generator, dtype=dtype, device=device)
        Y = inputs @ X if shift is None else inputs @ X + shift.to(dtype)[:, None]
        H = from_matrix(block.W_in.mT) @ Y
        if block.b_in is not None:
            H = H + block.b_in.to(dtype)[:, None]
        if block.W_gate is None:
            H = act(H)
        else:
            gate = from_matrix(block.W_gate.mT) @ Y
            H = H * act(gate if block.b_gate is None else gate + block.b_gate.to(dtype)[:, None])
        XX += (X @ X.mT).double()
        XH += (X @ H.mT).double()
    M = torch.cholesky_solve(XH, torch.linalg.cholesky(XX)).mT.to(dtype).contiguous()
    if not torch.isfinite(M).all():
        raise NumericalError(f"the sampled fit of block {block.layer} is not finite: its weights hold NaN or inf")
    return M
