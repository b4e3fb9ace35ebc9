import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sd_lens import QuantizationScheme
from sd_lens.applications.schemes import absmax, rounded
from sd_lens.errors import InputError

# No numbers so small that a step is not a normal float32.
NUMBERS = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)
TENSORS = arrays("float32", array_shapes(min_dims=1, max_dims=3, max_side=6), elements=NUMBERS).map(torch.from_numpy)
BITS = st.integers(2, 16)
AXES = st.sampled_from([None, (-1,)])


def quantized(x, bits, axes=None):
    return rounded(x, bits, absmax(x, axes))


@given(TENSORS, BITS, AXES)
def test_the_error_is_at_most_half_a_step(x, bits, axes):
    step = absmax(x, axes).double() / (2 ** (bits - 1) - 1)
    error = (quantized(x, bits, axes).double() - x.double()).abs()
    assert (error <= 0.5 * step * (1 + 1e-2)).all()


@given(TENSORS, BITS, AXES)
def test_what_is_rounded_stays_where_it_is(x, bits, axes):
    once = quantized(x, bits, axes)
    torch.testing.assert_close(quantized(once, bits, axes), once, rtol=1e-5, atol=0)


@given(TENSORS, BITS, AXES)
def test_signs_do_not_matter(x, bits, axes):
    assert torch.equal(quantized(-x, bits, axes), -quantized(x, bits, axes))


@given(TENSORS, BITS, AXES, st.integers(-8, 8))
def test_scales_do_not_matter(x, bits, axes, octaves):
    torch.testing.assert_close(
        quantized(x * 2.0**octaves, bits, axes), quantized(x, bits, axes) * 2.0**octaves, rtol=1e-6, atol=0
    )


@given(TENSORS, st.integers(2, 8))
def test_there_are_no_more_levels_than_the_bits_allow(x, bits):
    assert len(quantized(x, bits).unique()) <= 2**bits - 1


@given(TENSORS, BITS)
def test_a_step_of_its_own_rounds_a_row_no_differently_than_the_row_alone(x, bits):
    together = quantized(x, bits, (-1,)).reshape(-1, x.shape[-1])
    for row, alone in zip(together, x.reshape(-1, x.shape[-1]), strict=True):
        assert torch.equal(row, quantized(alone, bits))


def test_zeros_stay_zeros():
    x = torch.zeros(3, 4)
    assert torch.equal(quantized(x, 8), x)
    assert torch.equal(quantized(x, 8, (-1,)), x)


def test_the_largest_number_is_kept_and_an_outlier_silences_the_others():
    x = torch.tensor([1000.0, 3.9, -3.0, 4.1])
    torch.testing.assert_close(quantized(x, 8), torch.tensor([1000.0, 0.0, 0.0, 1000 / 127]))


def test_half_precision_is_rounded_in_float32():
    x = torch.tensor([3.0, 1.01, -2.5], dtype=torch.bfloat16)
    assert quantized(x, 8).dtype == torch.bfloat16
    torch.testing.assert_close(quantized(x, 8), quantized(x.float(), 8).bfloat16(), rtol=0, atol=0)


def test_schemes_say_what_they_are():
    assert str(QuantizationScheme()) == "W8A8, weights per tensor, activations per tensor"
    assert str(QuantizationScheme(4, None, "channel", "token")) == "W4Afull, weights per channel, activations per token"


def unchecked(**options):
    """The suite's type checks would be faster."""
    scheme = object.__new__(QuantizationScheme)
    for name, value in vars(QuantizationScheme()).items():
        object.__setattr__(scheme, name, options.get(name, value))
    scheme.__post_init__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "weight_bits=1: expected an integer from 2 to 16, or None"),
        ({"activation_bits": 17}, "activation_bits=17: expected an integer from 2 to 16, or None"),
        ({"weight_bits": True}, "weight_bits=True: expected an integer"),
        ({"weights": "row"}, r"weights='row': expected one of \('tensor', 'channel'\)"),
        ({"activations": "head"}, r"activations='head': expected one of \('tensor', 'token'\)"),
    ],
)
def test_bad_schemes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        unchecked(**options)
