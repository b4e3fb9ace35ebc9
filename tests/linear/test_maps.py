import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_lens.errors import InputError
from sd_lens.linear import maps

SIZES = st.integers(1, 7)
SEEDS = st.integers(0, 2**31)


def matrix(rows, columns, seed, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(SIZES, SIZES, SIZES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_compositions_equal_their_dense_matrices(a, b, c, seed):
    P, Q, R = matrix(a, b, seed), matrix(b, c, seed + 1), matrix(a, c, seed + 2)
    M = maps.from_matrix(P) @ maps.from_matrix(Q) + maps.from_matrix(R)
    torch.testing.assert_close(M.dense(), P @ Q + R)
    torch.testing.assert_close(M.T.dense(), (P @ Q + R).T)
    torch.testing.assert_close(M.T.T.dense(), M.dense())


@given(SIZES, SIZES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_products_are_linear_and_transposes_consistent(a, b, seed):
    d = matrix(1, b, seed)[0]
    M = maps.from_matrix(matrix(a, b, seed + 1)) @ (
        maps.diagonal(d) + maps.centering(b, dtype=torch.float64) + maps.identity(b, dtype=torch.float64)
    )
    x, z, y = matrix(b, 1, seed + 2)[:, 0], matrix(b, 1, seed + 3)[:, 0], matrix(a, 1, seed + 4)[:, 0]
    torch.testing.assert_close(M @ (2 * x - z), 2 * (M @ x) - M @ z)
    torch.testing.assert_close(y @ (M @ x), (M.T @ y) @ x)


@pytest.mark.parametrize("transposed_storage", [False, True])
def test_weights_below_float32_are_promoted_slice_by_slice(monkeypatch, transposed_storage):
    monkeypatch.setattr(maps, "_PROMOTED_ENTRIES", 20)  # several slices, the last one short
    W = matrix(13, 9, 0, torch.float32).bfloat16()
    if transposed_storage:
        W = W.mT.contiguous().mT
    M, x, y = maps.from_matrix(W), matrix(9, 3, 1, torch.float32), matrix(13, 3, 2, torch.float32)
    assert M.dtype == torch.float32
    torch.testing.assert_close(M @ x, W.float() @ x)
    torch.testing.assert_close(M.T @ y, W.float().T @ y)


def test_mismatched_shapes_are_named():
    M = maps.from_matrix(torch.ones(2, 3))
    with pytest.raises(InputError, match=r"shape \(2, 3\) with shape \(2, 1\)"):
        M @ torch.ones(2, 1)
    with pytest.raises(InputError, match=r"shapes \(2, 3\) and \(3, 2\)"):
        M + M.T


def test_maps_of_different_types_do_not_mix_silently():
    narrow, wide = maps.identity(3), maps.from_matrix(torch.eye(3, dtype=torch.float64))
    for combine in (lambda: narrow + wide, lambda: narrow @ wide):
        with pytest.raises(InputError, match=r"in torch\.float32 on cpu and in torch\.float64 on cpu"):
            combine()
