import math

import pytest
import torch
from scipy import integrate

from sd_lens.errors import NotSupportedError, NumericalError
from sd_lens.linear.gaussian import activation_function, gaussian_expectations

ACTIVATIONS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
POINTS = [(0.05, 0.3), (0.7, -0.4), (1.0, 0.0), (3.0, 1.5), (12.0, -5.0), (24.0, 2.0), (150.0, 1.0)]


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


def integrated(name, s, b):
    """The three expectations by adaptive quadrature, split at the kink."""
    act = activation_function(name)

    def derivative(t):
        t = t64(t).requires_grad_()
        return torch.autograd.grad(act(t).sum(), t)[0].item()

    def expectation(f):
        density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
        breaks = sorted({min(max(x, -9.0), 9.0) for x in (-b / s, -b / s - 4 / s, -b / s + 4 / s)})
        return integrate.quad(lambda z: f(z) * density(z), -10, 10, points=breaks, limit=500)[0]

    return (
        expectation(lambda z: act(t64(s * z + b)).item()),
        expectation(lambda z: derivative(s * z + b)),
        expectation(lambda z: z * derivative(s * z + b)),
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("s", "b"), POINTS)
def test_expectations_equal_numerical_integrals(name, s, b):
    found = gaussian_expectations(name, t64(s), t64(b))
    value, slope, tilted = integrated(name, s, b)
    assert found.value.item() == pytest.approx(value, rel=1e-8, abs=1e-9)
    assert found.slope.item() == pytest.approx(slope, rel=1e-8, abs=1e-8)
    assert found.tilted_slope.item() == pytest.approx(tilted, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_neuron_without_weights_gives_the_activation_of_its_bias(name):
    bias = t64(-1.3, 0.0, 2.1)
    found = gaussian_expectations(name, 0 * bias, bias)
    torch.testing.assert_close(found.value, activation_function(name)(bias))


@pytest.mark.parametrize("name", ["gelu", "relu", "silu"])
def test_moments_are_derivatives_of_the_mean(name):
    # d E[act(s z + b)] / ds = E[z act'(s z + b)], and d/db = E[act'(s z + b)]
    s, b = t64(0.4, 2.0, 9.0), t64(-1.0, 0.5, 3.0)
    h = 1e-5
    E = gaussian_expectations(name, s, b)
    by_scale = (gaussian_expectations(name, s + h, b).value - gaussian_expectations(name, s - h, b).value) / (2 * h)
    by_bias = (gaussian_expectations(name, s, b + h).value - gaussian_expectations(name, s, b - h).value) / (2 * h)
    torch.testing.assert_close(by_scale, E.tilted_slope, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(by_bias, E.slope, atol=1e-7, rtol=1e-6)


def test_unknown_activations_are_named():
    with pytest.raises(NotSupportedError, match="not supported yet: activation 'solu_ln'; known are gelu"):
        gaussian_expectations("solu_ln", t64(1.0), t64(0.0))


@pytest.mark.parametrize("name", ["silu", "relu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_an_error(name, bad):
    with pytest.raises(NumericalError, match="NaN or inf"):
        gaussian_expectations(name, t64(1.0, bad), t64(0.0, 0.0))
