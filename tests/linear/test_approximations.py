import math

import pytest
import torch

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import (
    attention_map,
    block_map,
    ffn_map,
    gaussian_fit,
    norm_map,
    sampled_fit,
)
from sd_lens.linear.maps import from_matrix, identity_like
from sd_lens.models.blocks import block_weights
from sd_lens.models.views import BlockWeights, Norm
from tests import tiny
from tests.oracles.jacobians import attention_jacobian


def random_block(*, gated, act_fn, kind="layer", d=12, d_mlp=10, gain=True, biases=True, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator)

    norm = Norm(kind, 1 + draw(d) if gain else None, draw(d) if gain and biases else None)
    return BlockWeights(
        layer=0, attention_norm=norm, mlp_norm=norm, W_V=draw(2, d, 3), W_O=draw(4, 3, d), W_in=draw(d, d_mlp),
        W_gate=draw(d, d_mlp) if gated else None, W_out=draw(d_mlp, d), b_in=draw(d_mlp) if biases else None,
        b_gate=draw(d_mlp) if biases and gated else None, act_fn=act_fn,
    )  # fmt: skip


def test_attention_equals_the_autograd_jacobian(tiny_model):
    """A is the derivative of the attention output of a lone token, once the norm's scale is frozen."""
    for layer in range(tiny_model.cfg.n_layers):
        A = attention_map(block_weights(tiny_model, layer))
        expected = attention_jacobian(tiny_model, layer, token=5)
        torch.testing.assert_close(A.dense(), expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_the_sum_over_heads():
    block = random_block(gated=True, act_fn="silu")
    N = norm_map(block.attention_norm, block.W_in).dense()
    by_head = sum(block.W_O[h].T @ block.W_V[h // 2].T for h in range(4)) @ N
    torch.testing.assert_close(attention_map(block).dense(), by_head)


def test_paper_variant_drops_the_centring():
    block = random_block(gated=False, act_fn="gelu")
    centred, plain = (norm_map(block.mlp_norm, block.W_in, centered=c).dense() for c in (True, False))
    torch.testing.assert_close(plain, torch.diag(block.mlp_norm.gain))
    torch.testing.assert_close(centred, plain @ (torch.eye(12) - 1 / 12))
    rms = Norm("rms", block.mlp_norm.gain, None)
    torch.testing.assert_close(norm_map(rms, block.W_in).dense(), plain)


@pytest.mark.parametrize("act_fn", ["silu", "gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("convention", ["post-gain", "pre-gain"])
def test_closed_form_equals_sampled_least_squares_within_its_noise(act_fn, gated, convention):
    block = random_block(gated=gated, act_fn=act_fn)
    closed = ffn_map(block, convention=convention).dense()
    n = 100_000
    errors = torch.stack(
        [ffn_map(block, "sampled", convention=convention, n_samples=n, seed=seed).dense() - closed for seed in range(4)]
    )
    # Each entry of the sampled map scatters around the closed form: no bias beyond 5 standard errors of four runs
    spread = errors.std()
    assert errors.norm() / closed.norm() / 2 < 0.1
    assert errors.mean(dim=0).abs().max() < 5 * spread / math.sqrt(4)


def test_gated_fit_without_biases_is_the_formula_of_the_paper_limit():
    """(c / s^2) E[s z act'(s z)] g + E[act(s z)] u, by a plain fine sum over z."""
    block = random_block(gated=True, act_fn="silu", biases=False)
    M = gaussian_fit(block, identity_like(norm_map(block.mlp_norm, block.W_in)), "post-gain").dense()
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    p = torch.exp(-z * z / 2) / torch.exp(-z * z / 2).sum()
    for j in range(10):
        g, u = block.W_gate[:, j].double(), block.W_in[:, j].double()
        s = g.norm()
        sigmoid = torch.sigmoid(s * z)
        slope = sigmoid * (1 + s * z * (1 - sigmoid))
        expected = (g @ u) / s**2 * (s * z * slope * p).sum() * g + (s * z * sigmoid * p).sum() * u
        torch.testing.assert_close(M[j].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_pre_gain_is_what_folding_the_norm_does(gated):
    block = random_block(gated=gated, act_fn="silu")
    g, b = block.mlp_norm.gain, block.mlp_norm.bias

    def folded(W, bias):
        scaled = g[:, None] * W
        return scaled - scaled.mean(dim=0), b @ W + bias

    W_in, b_in = folded(block.W_in, block.b_in)
    W_gate, b_gate = folded(block.W_gate, block.b_gate) if gated else (None, None)
    after = BlockWeights(
        layer=0, attention_norm=block.attention_norm, mlp_norm=Norm("layer", None, None), W_V=block.W_V,
        W_O=block.W_O, W_in=W_in, W_gate=W_gate, W_out=block.W_out, b_in=b_in, b_gate=b_gate, act_fn="silu",
    )  # fmt: skip
    expected = ffn_map(block, convention="pre-gain").dense()
    for convention in ("pre-gain", "post-gain"):
        torch.testing.assert_close(ffn_map(after, convention=convention).dense(), expected, rtol=1e-4, atol=1e-5)


def test_direction_of_relu_mlp_does_not_depend_on_input_scale():
    """relu is homogeneous: scaling all input weights scales F, without biases."""
    block = random_block(gated=False, act_fn="relu", biases=False)
    wide = BlockWeights(**{**block.__dict__, "W_in": 3 * block.W_in})
    torch.testing.assert_close(ffn_map(wide).dense(), 3 * ffn_map(block).dense(), rtol=1e-5, atol=1e-6)


def test_block_is_the_product_of_its_residual_steps():
    block = random_block(gated=True, act_fn="gelu")
    A, F = attention_map(block), ffn_map(block)
    eye = torch.eye(12)
    torch.testing.assert_close(block_map(A, F).dense(), (eye + F.dense()) @ (eye + A.dense()))


def test_sampled_fit_equals_lstsq():
    block = random_block(gated=True, act_fn="silu")
    identity = identity_like(from_matrix(block.W_in @ block.W_in.T))
    n = 5000
    found = sampled_fit(block, identity, None, n_samples=n, seed=3)
    generator = torch.Generator().manual_seed(3)
    X = torch.cat([torch.randn(12, min(4096, n - start), generator=generator) for start in range(0, n, 4096)], dim=1).T
    gate = X @ block.W_gate + block.b_gate
    H = torch.nn.functional.silu(gate) * (X @ block.W_in + block.b_in)
    torch.testing.assert_close(found, torch.linalg.lstsq(X, H).solution.T, rtol=1e-4, atol=1e-5)


def test_half_precision_weights_stay_and_the_algebra_is_float32():
    block = random_block(gated=True, act_fn="silu")
    half = BlockWeights(
        **{k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in block.__dict__.items()}
        | {"mlp_norm": Norm("rms", None, None), "attention_norm": Norm("rms", None, None)}
    )
    full = BlockWeights(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in half.__dict__.items()})
    L_half, L_full = (block_map(attention_map(b), ffn_map(b)) for b in (half, full))
    assert L_half.dtype == torch.float32
    torch.testing.assert_close(L_half.dense(), L_full.dense(), rtol=1e-4, atol=1e-5)


def test_wrong_arguments_say_what_is_expected():
    block = random_block(gated=True, act_fn="silu")
    with pytest.raises(InputError, match="unknown linearization 'taylor'; expected one of"):
        tiny.unchecked(ffn_map)(block, "taylor")
    with pytest.raises(InputError, match="unknown convention 'mid-gain'; expected one of"):
        tiny.unchecked(ffn_map)(block, convention="mid-gain")
    with pytest.raises(InputError, match="n_samples=20 is too few to fit 12 inputs; take at least 24"):
        ffn_map(block, "sampled", n_samples=20)
    broken = BlockWeights(**{**block.__dict__, "W_gate": block.W_gate * torch.nan})
    with pytest.raises(NumericalError):
        ffn_map(broken)
    with pytest.raises(NumericalError, match="sampled fit of block 0"):
        ffn_map(broken, "sampled", n_samples=100)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_model_ffn_equals_the_wrapped_mlp_in_expectation(family, backend):
    """The view's MLP is the model's: F x-correlates with the module's own outputs as least squares says."""
    model = tiny.wrap(tiny.family(family), backend)
    block = block_weights(model, 1)
    N = norm_map(block.mlp_norm, block.W_in)
    M = gaussian_fit(block, N, "post-gain").dense()
    X = torch.randn(200_000, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.blocks[1].mlp(X[None])[0]
    out = out - out.mean(dim=0)
    fitted = torch.linalg.lstsq(X, out).solution.T
    assert (fitted - block.W_out.T @ M).norm() / fitted.norm() < 0.05
