"""The parts of a coefficient sum to it, on random tensors (the running models: tests/models/test_architectures.py)."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.linear.coefficients import coefficient_parts
from sd_lens.linear.lone_token import normalized
from sd_lens.models.views import Norm


def norm(kind, seed):
    g = torch.Generator().manual_seed(seed)
    gain, bias = 1 + 0.3 * torch.randn(2, 16, generator=g, dtype=torch.float64)
    return Norm(kind, gain, bias if kind == "layer" else None, 1e-5)


@given(st.sampled_from(["rms", "layer"]), st.integers(0, 1000), st.floats(0.01, 100))
def test_parts_sum_to_the_coefficient(kind, seed, scale):
    N = norm(kind, seed)
    x, a = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    v = torch.randn(16, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    parts = coefficient_parts(N, x, scale * a, v)
    torch.testing.assert_close(parts.total, normalized(N, x + scale * a) @ v)
    torch.testing.assert_close(parts.token, normalized(N, x) @ v)


def test_attention_that_writes_nothing_has_no_part():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    parts = coefficient_parts(norm("layer", 0), x, 0 * x, x[0])
    assert parts.attention.abs().max() == parts.norm.abs().max() == 0
    assert parts.token.abs().max() > 0.1


def test_a_write_along_the_stream_goes_into_the_norm():
    """Doubling the stream changes nothing behind a norm: attention's part and the scale's cancel."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = coefficient_parts(norm("rms", 0), x, x, x[0])
    torch.testing.assert_close(parts.attention, -parts.norm, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.attention, parts.token / 2, rtol=1e-4, atol=1e-6)
