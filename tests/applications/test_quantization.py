import copy
from contextlib import nullcontext

import pytest
import torch

from sd_lens import QuantizationScheme, find_high_norm_tokens, quantize
from sd_lens.errors import InputError, NotSupportedError, NumericalError
from sd_lens.models.linear_layers import InputPoint, linear_groups
from tests import planted, tiny
from tests.oracles.quantized import linear_modules, quantized

TOKENS = torch.tensor([[3, 14, 15, 9, 26], [9, 8, 7, 7, 11]])
FINE = QuantizationScheme(4, 4, "channel", "token")
# Its logits are not transformers' without any quantization: TransformerLens's attention with alibi.
UNLIKE_TRANSFORMERS = {"falcon sequential"}
SAME = [pair for pair in tiny.BOOTING if pair[0] not in UNLIKE_TRANSFORMERS]


def logits_of(model):
    with torch.no_grad():
        found = model(TOKENS)
    return getattr(found, "logits", found)


def state_of(model):
    """Every parameter, and every hook of every module (the bridge adds one of its own to norms as it first runs)."""
    logits_of(model)
    parameters = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }
    return parameters, hooks


def assert_same_state(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for name, (where, values) in before[0].items():
        assert after[0][name][0] == where, name
        assert torch.equal(after[0][name][1], values), name


def assert_same_effect(found, expected, plain):
    """The last bit of a float can turn a number that lies between two levels: one step, of thousands."""
    effect = (expected - plain).norm()
    assert effect > 1e-2 * plain.norm()
    assert (found - expected).norm() < 0.05 * effect


@pytest.mark.parametrize("scheme", [QuantizationScheme(), FINE], ids=str)
@pytest.mark.parametrize("pair", SAME, ids=lambda p: f"{p[0]}-{p[1]}")
def test_logits_are_those_of_transformers_quantized_by_hand(pair, scheme):
    """Joint matrices that a wrapper runs in parts, grouped queries, Conv1D, biases, parallel blocks."""
    name, backend = pair
    hf_model, model = tiny.ARCHITECTURES[name](), tiny.wrap(tiny.ARCHITECTURES[name](), backend)
    plain = logits_of(model)
    with quantized(hf_model, scheme):
        expected = logits_of(hf_model)
    with quantize(model, scheme=scheme):
        assert_same_effect(logits_of(model), expected, plain)
    assert torch.equal(logits_of(model), plain)


@pytest.mark.parametrize("scheme", [QuantizationScheme(5, None), QuantizationScheme(None, 5)], ids=str)
def test_weights_or_activations_alone(tiny_hf, backend, scheme):
    hf_model, model = copy.deepcopy(tiny_hf), tiny.wrap(tiny_hf, backend)
    plain = logits_of(model)
    with quantized(hf_model, scheme), quantize(model, scheme=scheme):
        assert_same_effect(logits_of(model), logits_of(hf_model), plain)


def test_spared_blocks_keep_their_down_projection(backend):
    hf_model, model = tiny.llama(), tiny.wrap(tiny.llama(), backend)
    plain = logits_of(model)
    with quantize(model, [2, 0]) as spared:
        found = logits_of(model)
    assert spared == (0, 2)
    with quantized(hf_model, skip=["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]):
        assert_same_effect(found, logits_of(hf_model), plain)
    with quantized(hf_model):
        assert (logits_of(hf_model) - found).norm() > 0.2 * (found - plain).norm()


def test_auto_spares_the_planted_explosion_and_decay(backend):
    model = tiny.wrap(planted.exploding_when_initial().hf_model, backend)
    with quantize(model, "auto") as spared:
        assert spared == (planted.EXPLOSION, planted.DECAY)


def test_what_texts_show_can_be_spared(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    found = find_high_norm_tokens(model, planted_defect.texts, progress=False)
    with quantize(model, found) as spared:
        assert spared == (planted.EXPLOSION, planted.DECAY)


def test_every_linear_layer_is_quantized_and_no_other(tiny_hf, backend):
    names = set(linear_modules(tiny_hf))
    model = tiny.wrap(tiny_hf, backend)
    groups = linear_groups(model)
    assert {linear.name for group in groups for linear in group.linears} == names
    inside = {id(w.parameter) for group in groups for linear in group.linears for w in linear.weights}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with quantize(model, scheme=QuantizationScheme(4, 8)):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (id(parameter) not in inside), name


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_the_same_afterwards_however_it_ends(tiny_hf, backend, ending):
    model = tiny.wrap(tiny_hf, backend)
    before = state_of(model)
    with nullcontext() if ending is None else pytest.raises(ending), quantize(model, [1]):
        logits_of(model)
        if ending is not None:
            raise ending
    assert_same_state(before, state_of(model))


def test_an_interrupt_in_the_middle_of_a_run_leaves_no_trace(tiny_llama):
    before = state_of(tiny_llama)

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = tiny_llama.blocks[2].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt), quantize(tiny_llama):
        pass  # it is the run that checks whether quantization bites which is interrupted
    handle.remove()
    assert_same_state(before, state_of(tiny_llama))


@pytest.mark.parametrize("allowed", [0, 1, 5])
def test_an_interrupt_between_two_edits_leaves_no_trace(tiny_llama, monkeypatch, allowed):
    before, calls, edited = state_of(tiny_llama), [], InputPoint.edited

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return edited(*arguments)

    monkeypatch.setattr(InputPoint, "edited", interrupted)
    with pytest.raises(KeyboardInterrupt), quantize(tiny_llama):
        pass
    assert len(calls) == allowed + 1
    assert_same_state(before, state_of(tiny_llama))


def test_contexts_nest_and_can_be_repeated(tiny_llama):
    before = state_of(tiny_llama)
    with quantize(tiny_llama):
        once = logits_of(tiny_llama)
        with quantize(tiny_llama):  # what is rounded stays where it is
            torch.testing.assert_close(logits_of(tiny_llama), once, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits_of(tiny_llama), once, rtol=0, atol=0)
    with quantize(tiny_llama):
        torch.testing.assert_close(logits_of(tiny_llama), once, rtol=0, atol=0)
    assert_same_state(before, state_of(tiny_llama))


def test_folded_models_are_quantized_too(backend):
    """HookedTransformer's folded weights are its parameters; the bridge's run goes around its own modules."""
    if backend == "hooked_transformer":
        model = tiny.wrap(tiny.llama(), backend)
        model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
        plain = logits_of(model)
        with quantize(model):
            difference = (logits_of(model) - plain).abs().max()
        assert 1e-2 < difference < 2
    else:
        model = tiny.wrap(tiny.llama(), backend)
        model.enable_compatibility_mode(disable_warnings=True)
        before = state_of(model)
        with (
            pytest.raises(NotSupportedError, match=r"goes around model\.layers\.0\.mlp\.gate_proj, as the"),
            quantize(model),
        ):
            pass
        assert_same_state(before, state_of(model))


def test_half_precision_runs_in_its_own_type(backend):
    model = tiny.wrap(tiny.llama().bfloat16(), backend).to(torch.bfloat16)
    with quantize(model):
        logits = logits_of(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits).all()


def test_mixtures_of_experts_and_unknown_architectures_are_refused(backend):
    with pytest.raises(NotSupportedError, match="MixtralForCausalLM"), quantize(tiny.wrap(tiny.mixtral(), backend)):
        pass
    with pytest.raises(NotSupportedError, match="GPTNeoForCausalLM"), quantize(tiny.wrap(tiny.gpt_neo(), backend)):
        pass


@pytest.mark.skipif("hooked_transformer" not in tiny.BACKENDS, reason="TransformerLens 4 has only the bridge")
def test_a_model_of_no_known_architecture_is_refused():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(
        HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=8, d_head=8, act_fn="gelu", d_vocab=20, device="cpu")
    )
    with pytest.raises(NotSupportedError, match="a model of no known architecture"), quantize(model):
        pass


def test_weights_that_are_not_finite_are_named(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[0, 0] = torch.inf
    with (
        pytest.raises(NumericalError, match=r"the weights of model\.layers\.1\.mlp\.down_proj are not finite"),
        quantize(tiny_llama),
    ):
        pass


@pytest.mark.parametrize(
    ("spare", "message"),
    [
        ([3], "block 3 does not exist: the model has blocks 0 to 2"),
        ([-1], "block -1 does not exist"),
        ([True], "spare: True is not a block; blocks are numbered from 0"),
        ("all", "spare='all': expected 'auto', blocks, or the result of forecast or find_high_norm_tokens"),
        ("auto", "there is nothing to spare: no block explodes or decays; name the blocks to spare"),
    ],
)
def test_blocks_that_cannot_be_spared_are_named(tiny_llama, spare, message):
    with pytest.raises(InputError, match=message), quantize(tiny_llama, spare):
        pass
