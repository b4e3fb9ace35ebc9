import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens import QuantizationScheme, quantize, smoothing_factors
from sd_lens.applications.smoothing import _factor
from sd_lens.errors import InputError, NumericalError
from tests import tiny
from tests.oracles.quantized import linear_modules, quantized

TOKENS = torch.tensor([[3, 14, 15, 9, 26], [9, 8, 7, 7, 11]])
EVERYTHING = ("attention", "heads", "mlp", "neurons")
UNROUNDED = QuantizationScheme(None, None)
GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj"), "heads": ("o_proj",), "mlp": ("gate_proj", "up_proj"),
    "neurons": ("down_proj",),
}  # fmt: skip


def logits_of(model):
    with torch.no_grad():
        found = model(TOKENS)
    return getattr(found, "logits", found)


def factors_by_hand(hf_model, tokens, alpha):
    """From hooks on transformers' modules: by module name. Of a model with Llama's names."""
    largest = {}

    def keep(name):
        def hook(_, args):
            found = args[0].reshape(-1, args[0].shape[-1]).abs().amax(dim=0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return hook

    modules = linear_modules(hf_model)
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        for row in tokens:
            hf_model(row[None])
    for handle in handles:
        handle.remove()
    factors = {}
    for ending in GROUPS.values():
        for block in {name.rsplit(".", 1)[0] for name in modules if name.endswith(ending)}:
            names = [f"{block}.{last}" for last in ending]
            weights = torch.cat([modules[name].weight for name in names]).abs().amax(dim=0).detach()
            for name in names:
                factors[name] = largest[name] ** alpha / weights ** (1 - alpha)
    return factors


@pytest.mark.parametrize("name", [pair for pair in tiny.BOOTING if pair[0] != "falcon sequential"], ids="-".join)
def test_before_rounding_the_function_is_unchanged(name):
    model = tiny.wrap(tiny.ARCHITECTURES[name[0]](), name[1])
    plain = logits_of(model)
    factors = smoothing_factors(model, TOKENS, 0.7, reads=EVERYTHING, progress=False)
    assert max(float(s.max()) for s in factors.factors.values()) > 3
    with quantize(model, scheme=UNROUNDED, smoothing=factors):
        torch.testing.assert_close(logits_of(model), plain, rtol=1e-3, atol=1e-3)
        weights = [p.detach().clone() for p in model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(logits_of(model), plain)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_factors_and_logits_are_those_made_by_hand(backend, alpha):
    hf_model = tiny.llama()
    model = tiny.wrap(copy.deepcopy(hf_model), backend)
    expected = factors_by_hand(hf_model, TOKENS, alpha)
    found = smoothing_factors(model, TOKENS, alpha, reads=EVERYTHING, progress=False)
    assert len(found.factors) == 4 * 3
    assert found.n_tokens == TOKENS.numel()
    for (layer, reads), s in found.factors.items():
        place = "self_attn" if reads in ("attention", "heads") else "mlp"
        name = f"model.layers.{layer}.{place}.{GROUPS[reads][0]}"
        torch.testing.assert_close(s, expected[name], rtol=1e-4, atol=1e-6)
    plain = logits_of(model)
    with quantized(hf_model, factors=expected), quantize(model, smoothing=found):
        effect = (logits_of(hf_model) - plain).norm()
        assert (logits_of(model) - logits_of(hf_model)).norm() < 0.05 * effect


def test_padding_does_not_count(tiny_llama):
    """A short text in a batch with a long one."""
    texts = [TOKENS[0], TOKENS[1, :2]]
    together = smoothing_factors(tiny_llama, texts, progress=False)
    apart = [smoothing_factors(tiny_llama, [text], alpha=1.0, progress=False) for text in texts]
    one = smoothing_factors(tiny_llama, texts, alpha=1.0, batch_tokens=1, progress=False)
    assert together.n_tokens == 7
    for key, s in smoothing_factors(tiny_llama, texts, alpha=1.0, progress=False).factors.items():
        torch.testing.assert_close(s, torch.maximum(apart[0].factors[key], apart[1].factors[key]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(s, one.factors[key], rtol=1e-4, atol=1e-6)


def test_by_default_only_what_stands_behind_norms_is_smoothed(tiny_llama):
    factors = smoothing_factors(tiny_llama, TOKENS, progress=False)
    assert {reads for _, reads in factors.factors} == {"attention", "mlp"}
    assert str(factors) == "SmoothingFactors (alpha 0.5) of attention, mlp, calibrated on 10 tokens"


@given(st.floats(0, 1), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_half_of_the_difficulty_goes_either_way(alpha, x, w):
    """max|X| / s = max|X|^(1 - alpha) max|W|^(1 - alpha) and s max|W| = max|X|^alpha max|W|^alpha."""
    X, W = torch.tensor([x]), torch.tensor([w])
    s = _factor(X, W, alpha)
    torch.testing.assert_close(X / s, (X * W) ** (1 - alpha), rtol=1e-4, atol=0)
    torch.testing.assert_close(s * W, (X * W) ** alpha, rtol=1e-4, atol=0)


def test_dead_channels_keep_their_scale():
    zero, one = torch.zeros(1), torch.ones(1)
    assert _factor(zero, one, 0.5) == _factor(one, zero, 0.5) == _factor(zero, zero, 0.5) == 1


def test_bad_arguments_are_named(tiny_llama):
    with pytest.raises(InputError, match=r"alpha=1\.5: expected 0 to 1"):
        smoothing_factors(tiny_llama, TOKENS, 1.5)
    with pytest.raises(
        InputError, match=r"reads=\['W_out'\]: expected some of \('attention', 'heads', 'mlp', 'neurons'\)"
    ):
        smoothing_factors(tiny_llama, TOKENS, reads=["W_out"])
    factors = smoothing_factors(tiny.wrap(tiny.llama(hidden_size=16), "auto"), TOKENS, progress=False)
    with (
        pytest.raises(InputError, match="the smoothing factors are of another model"),
        quantize(tiny_llama, smoothing=factors),
    ):
        pass


def test_what_is_not_finite_stops_the_calibration_and_leaves_no_hook(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_in[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="not finite at block 1, neurons"):
        smoothing_factors(tiny_llama, TOKENS, reads=["neurons"], progress=False)
    assert not any(
        "_Calibrating" in repr(hook)
        for module in tiny_llama.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
