import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear import spectra
from sd_lens.linear.maps import from_matrix
from sd_lens.linear.spectra import leading_triples


def with_spectrum(values, d_out, d_in, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(d_out, len(values), generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d_in, len(values), generator=generator, dtype=torch.float64)).Q
    return (U * torch.tensor(values, dtype=torch.float64) @ V.T).to(dtype)


def residual(W, triples, i=0):
    s = triples.values[i]
    return float((W.double().T @ triples.left[:, i].double() - s * triples.right[:, i].double()).norm() / s)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_any_matrix_agrees_with_its_dense_svd(d_out, d_in, seed):
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    triples = leading_triples(from_matrix(W), tol=1e-8)
    s = torch.linalg.svdvals(W)
    assert triples.values[0].item() == pytest.approx(s[0].item(), rel=1e-10)
    assert residual(W, triples) < 1e-7
    expected_gap = s[0] / s[1] if len(s) > 1 and s[1] > 0 else math.inf
    assert triples.gap == pytest.approx(float(expected_gap), rel=1e-2)


@pytest.mark.parametrize("gap", [1.003, 1.05, 1.5, 10.0, 1000.0])
def test_directions_agree_with_the_dense_svd_within_the_stated_bound(gap):
    values = [gap, *torch.linspace(1, 0.01, 199).tolist()]
    W = with_spectrum(values, 300, 250)
    triples = leading_triples(from_matrix(W), tol=1e-5)
    U, s, Vh = torch.linalg.svd(W.double())
    assert triples.values[0].item() == pytest.approx(s[0].item(), rel=1e-6)
    assert triples.gap == pytest.approx(gap, rel=1e-2 if gap < 300 else 0.3)
    bound = 1.5 * 1e-5 / (1 - 1 / gap**2) + 1e-6
    for found, true in ((triples.right[:, 0], Vh[0]), (triples.left[:, 0], U[:, 0])):
        sine = (found.double() - true * (true @ found.double())).norm()
        assert sine < bound


def test_several_triples_come_largest_first_and_orthonormal():
    W = with_spectrum([9, 7, 5, 2, *[1] * 60], 80, 90)
    triples = leading_triples(from_matrix(W), k=3, tol=1e-5)
    torch.testing.assert_close(triples.values, torch.tensor([9.0, 7, 5], dtype=torch.float64), rtol=1e-5, atol=0)
    assert triples.gap == pytest.approx(2.5, rel=1e-3)
    for vectors in (triples.left, triples.right):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), atol=1e-5, rtol=0)
    assert max(residual(W, triples, i) for i in range(3)) < 2e-5


def test_a_long_iteration_restarts_and_still_converges(monkeypatch):
    monkeypatch.setattr(spectra, "_MAX_BLOCKS", 6)
    W = with_spectrum([1.002, *torch.linspace(1, 0.9, 399).tolist()], 400, 400)
    triples = leading_triples(from_matrix(W), tol=1e-5)
    assert triples.products > 2 * 6
    assert triples.values[0].item() == pytest.approx(1.002, rel=1e-4)
    assert residual(W, triples) < 1.5e-5


def test_signs_are_fixed_and_runs_repeat():
    W = with_spectrum([3, 2, 1], 30, 20)
    first, negated = leading_triples(from_matrix(W), seed=1), leading_triples(from_matrix(-W), seed=2)
    assert first.left[first.left.abs().argmax(), 0] > 0
    torch.testing.assert_close(first.left, negated.left, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.right, -negated.right, atol=1e-5, rtol=0)
    again = leading_triples(from_matrix(W), seed=1)
    assert torch.equal(first.left, again.left)


def test_rank_one_has_infinite_gap_and_zero_has_none():
    rank_one = leading_triples(from_matrix(torch.outer(torch.tensor([0.0, 2, 0]), torch.tensor([3.0, 4]))))
    assert rank_one.values.item() == pytest.approx(10)
    assert rank_one.gap > 1e5
    zero = leading_triples(from_matrix(torch.zeros(4, 3)))
    assert zero.values.item() == 0
    assert zero.gap == 1
    assert zero.left.norm().item() == pytest.approx(1)


def test_nan_and_failure_to_converge_are_errors():
    W = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NumericalError, match="residual .* after 2 products"):
        leading_triples(from_matrix(W), max_products=2)
    W[3, 4] = torch.nan
    with pytest.raises(NumericalError, match="50 x 50 map is not finite"):
        leading_triples(from_matrix(W))


@pytest.mark.parametrize("k", [0, 4])
def test_a_map_has_no_more_triples_than_rows_or_columns(k):
    with pytest.raises(InputError, match=f"k={k}: a 3 x 5 map has 1 to 3 singular triples"):
        leading_triples(from_matrix(torch.ones(3, 5)), k=k)
