import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from sd_lens.applications.clustering import single_linkage


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(0, 10_000))
def test_it_is_scipys_single_linkage(n, seed):
    lengths = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lengths = (lengths + lengths.T).fill_diagonal_(0)
    edges = [(float(lengths[i, j]), i, j) for i in range(n) for j in range(i + 1, n)]
    merges, clusters = single_linkage(n, edges)
    expected = linkage(squareform(lengths.numpy()), "single")
    members = {i: frozenset([i]) for i in range(n)}
    for step, (left, right, height, size) in enumerate(expected):
        members[n + step] = members[int(left)] | members[int(right)]
        assert merges[step].height == pytest.approx(height)
        assert frozenset(merges[step].left + merges[step].right) == members[n + step]
        assert len(members[n + step]) == size
    assert len(clusters) == 1
    assert sorted(clusters[0]) == list(range(n))


def test_what_no_edge_joins_stays_apart():
    merges, clusters = single_linkage(5, [(2.0, 1, 4), (1.0, 0, 3)])
    assert [m.height for m in merges] == [1.0, 2.0]
    assert sorted(clusters) == [(0, 3), (1, 4), (2,)]
