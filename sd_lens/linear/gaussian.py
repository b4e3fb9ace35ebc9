"""The closed form: what a nonlinear layer is, on average, under Gaussian input.

For x ~ N(0, I) Stein's lemma turns the least-squares fit of a neuron h into an expected gradient,
E[h(x) x^T] = E[dh/dx], and every expectation into an integral over one standard normal z, because a
neuron sees x only through g.x = s z. The derivation is in docs/closed_form.md.

Which rule integrates what:

* relu and gelu have exact formulas in the normal density and distribution.
* silu and the tanh form of gelu are integrated with the trapezoidal rule on [-9, 9]. For analytic
  integrands it converges exponentially in 1/step, with the nearest pole at distance pi/s (silu) or 2.75/s
  (tanh gelu); the step below keeps the error near 1e-12 for every s up to 200. Gauss-Hermite nodes are too
  sparse near zero for that: at s = 10, well inside what SmolLM2 has (its largest is 24), 64 nodes are off
  by 0.3 % in E[act] and 1 % in E[z act'] (docs/closed_form.md has the table).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from sd_lens.errors import NotSupportedError, NumericalError

_HALF_WIDTH = 9.0  # P(|z| > 9) = 2e-19: below float64's rounding of the integrals
_STEP_TIMES_SCALE = 0.5  # exp(-2 pi * 2.75 / 0.5) = 1e-15
_MIN_NODES, _MAX_NODES = 129, 7201
_NEURONS_AT_ONCE = 256  # times at most 7201 nodes in float64: 15 MB

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclass(frozen=True, eq=False)
class Expectations:
    """Moments of an activation under `t = scale * z + bias`, `z ~ N(0, 1)`; one entry per neuron.

    Attributes:
        value: `E[act(t)]`.
        slope: `E[act'(t)]`.
        tilted_slope: `E[z act'(t)]`.
    """

    value: Float64[Tensor, " d_mlp"]
    slope: Float64[Tensor, " d_mlp"]
    tilted_slope: Float64[Tensor, " d_mlp"]


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that a model calls `name`.

    Raises:
        NotSupportedError: if there is no closed form for it here.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "relu": torch.nn.functional.relu,
        **dict.fromkeys(_TANH_GELU, partial(torch.nn.functional.gelu, approximate="tanh")),
    }
    if name not in functions:
        raise NotSupportedError(f"not supported yet: activation {name!r}; known are {', '.join(sorted(functions))}")
    return functions[name]


def gaussian_expectations(name: str, scale: Float64[Tensor, " d_mlp"], bias: Float64[Tensor, " d_mlp"]) -> Expectations:
    """Expectations of activation `name` at `scale * z + bias`, exact to about 1e-12.

    Args:
        name: the activation, as in `cfg.act_fn`.
        scale: standard deviation `s >= 0` of each neuron's input.
        bias: its mean.

    Raises:
        NotSupportedError: for an unknown activation.
        NumericalError: if an expectation is not finite.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> gaussian_expectations("relu", one, 0 * one).value.item() == 1 / math.sqrt(2 * math.pi)
        True
    """
    act = activation_function(name)
    if name == "relu":
        moments = _relu_expectations(scale, bias)
    elif name == "gelu":
        moments = _gelu_expectations(scale, bias)
    else:
        moments = _integrated_expectations(act, scale, bias)
    if not all(torch.isfinite(m).all() for m in (moments.value, moments.slope, moments.tilted_slope)):
        raise NumericalError(f"a Gaussian expectation of {name} is not finite: the weights hold NaN or inf")
    return moments


def _density(t: Tensor) -> Tensor:
    return torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def _relu_expectations(s: Tensor, b: Tensor) -> Expectations:
    # At s = 0 the formulas hold in the limit t = +-inf; at s = b = 0 they need any t and get 0.
    t = torch.where(s > 0, b / s.clamp_min(torch.finfo(s.dtype).tiny), b.sign() * math.inf).nan_to_num(
        0.0, math.inf, -math.inf
    )
    Phi, phi = torch.special.ndtr(t), _density(t)
    return Expectations(value=b * Phi + s * phi, slope=Phi, tilted_slope=phi)


def _gelu_expectations(s: Tensor, b: Tensor) -> Expectations:
    # gelu(t) = t Phi(t), and E[Phi(s z + b)] = Phi(b / r), r^2 = 1 + s^2; the rest are its derivatives:
    # E[act] = b Phi + s^2 phi / r (Stein);  E[act'] = d/db E[act];  E[z act'] = d/ds E[act].
    r = torch.sqrt(1 + s * s)
    t = b / r
    Phi, phi = torch.special.ndtr(t), _density(t)
    return Expectations(
        value=b * Phi + s * s / r * phi,
        slope=Phi + t * phi / r**2,
        tilted_slope=s / r * phi * (1 + 1 / r**2 - b * b / r**4),
    )


def _integrated_expectations(act: Callable[[Tensor], Tensor], s: Tensor, b: Tensor) -> Expectations:
    if not (torch.isfinite(s).all() and torch.isfinite(b).all()):
        raise NumericalError("an MLP weight is NaN or inf, so its Gaussian expectations do not exist")
    moments = torch.zeros(3, len(s), dtype=torch.float64, device=s.device)
    # The largest scale of a group sets its step. Few neurons have a large one, so groups are cut from the sorted list.
    for group in s.argsort().split(_NEURONS_AT_ONCE):
        moments[:, group] = _trapezoidal(act, s[group], b[group])
    value, slope, tilted_slope = moments
    return Expectations(value, slope, tilted_slope)


def _trapezoidal(act: Callable[[Tensor], Tensor], s: Tensor, b: Tensor) -> Float64[Tensor, "3 neuron"]:
    step = _STEP_TIMES_SCALE / max(float(s.max()), 1e-9)
    n = min(max(math.ceil(2 * _HALF_WIDTH / step) | 1, _MIN_NODES), _MAX_NODES)
    z = torch.linspace(-_HALF_WIDTH, _HALF_WIDTH, n, dtype=torch.float64, device=s.device)
    weights = _density(z)
    weights = weights / weights.sum()
    t = (s[:, None] * z + b[:, None]).requires_grad_()
    with torch.enable_grad():
        value = act(t)
        (slope,) = torch.autograd.grad(value.sum(), t)
    return torch.stack([value.detach() @ weights, slope @ weights, slope @ (weights * z)])
