import math
from dataclasses import replace

import pytest
import torch

from sd_lens import load_model
from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.captured import Captured, LeastSquares
from sd_lens.models.blocks import block_weights
from tests import tiny


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(X, Y, size=None):
    fit = LeastSquares(X.shape[1], Y.shape[1])
    for x, y in zip(X.split(size or len(X)), Y.split(size or len(Y)), strict=True):
        fit.add(x, y)
    return fit


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
def test_solves_least_squares_with_ridge(ridge):
    """lstsq on rows to which the ridge's own are appended."""
    X, Y = drawn(50, 6), drawn(50, 4, seed=1)
    weight = math.sqrt(ridge * float(X.square().sum()) / 6)
    oracle = torch.linalg.lstsq(
        torch.cat([X, weight * torch.eye(6, dtype=X.dtype)]), torch.cat([Y, torch.zeros(6, 4, dtype=X.dtype)])
    ).solution
    torch.testing.assert_close(sums(X, Y).solve(ridge), oracle.T)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_does_not_depend_on_how_pairs_are_split(size):
    X, Y = drawn(50, 6), drawn(50, 4, seed=1)
    split = sums(X, Y, size)
    assert split.n == 50
    torch.testing.assert_close(split.solve(1e-6), sums(X, Y).solve(1e-6))


def test_a_token_a_thousand_times_longer_does_not_cost_the_others_their_precision():
    """Inputs in single precision, as models have them; the outputs are linear but for the long token."""
    M = drawn(4, 6, seed=1)
    X = drawn(60, 6).float()
    X[0] *= 1e3
    Y = X.double() @ M.T
    torch.testing.assert_close(sums(X, Y).solve(1e-12), M, rtol=1e-6, atol=1e-6)


def test_too_few_pairs_are_an_error():
    with pytest.raises(InputError, match="5 tokens are too few to fit 6 dimensions: pass texts of at least 6"):
        sums(drawn(5, 6), drawn(5, 4)).solve(1e-6)


@pytest.mark.parametrize("X", [torch.zeros(9, 6), torch.full((9, 6), torch.nan)], ids=["zero", "nan"])
def test_inputs_that_determine_no_map_are_an_error(X):
    with pytest.raises(NumericalError, match="do not determine a linear fit with ridge=1e-06"):
        sums(X, drawn(9, 4)).solve(1e-6)


def captured(layers=(0, 2), d=32, d_mlp=48):
    n = len(layers)
    return Captured(layers, drawn(n, d, d).float(), drawn(n, d_mlp, d, seed=1).float(), 100)


def test_maps_are_the_weights_behind_the_fits(backend):
    """Grouped queries: each value head serves two heads."""
    fits = captured()
    block = block_weights(tiny.wrap(tiny.llama(), backend), 2)
    A, F = fits.maps(block)
    by_head = sum(block.W_O[h].T @ block.W_V[h // 2].T for h in range(4))
    torch.testing.assert_close(A.dense(), by_head @ fits.norms[1])
    torch.testing.assert_close(F.dense(), block.W_out.T @ fits.neurons[1])


def test_gains_behind_attention_and_mlp_multiply():
    block = block_weights(tiny.wrap(tiny.llama(), "bridge"), 0)
    gain = drawn(32, seed=3).float()
    plain = captured().maps(block)
    behind = captured().maps(replace(block, attention_post_gain=gain, mlp_post_gain=gain))
    for M, expected in zip(behind, plain, strict=True):
        torch.testing.assert_close(M.dense(), gain[:, None] * expected.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_compute_in_the_blocks_type(dtype):
    model = load_model(tiny.llama(), backend="bridge", dtype=dtype)
    A, F = captured().maps(block_weights(model, 0))
    assert {A.dtype, F.dtype} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert (A + F).dense().isfinite().all()


def test_another_block_or_model_is_an_error(tiny_llama):
    with pytest.raises(InputError, match="block 1 was not captured, only 0, 2"):
        captured().maps(block_weights(tiny_llama, 1))
    with pytest.raises(InputError, match="blocks of 48 neurons and width 16, not of 48 and 32"):
        captured(d=16).maps(block_weights(tiny_llama, 0))
    with pytest.raises(InputError, match="blocks of 64 neurons and width 32"):
        captured(d_mlp=64).maps(block_weights(tiny_llama, 0))


def test_says_what_it_is():
    assert str(captured()) == "Captured: linear fits of 2 blocks on 100 tokens"
    assert Captured.name == "captured"
