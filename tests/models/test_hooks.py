import inspect
import tempfile
from pathlib import Path

import pytest
import torch

import sd_lens
from sd_lens import find_high_norm_tokens, scan_norms, singular_defects
from sd_lens.errors import HookError, InputError
from sd_lens.explanations import interventions, patching
from sd_lens.models import hooks
from sd_lens.models.hooks import logits_with_hooks, residual_stream_points, run_with_hooks
from tests import planted, tiny

TOKENS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 7]])


def state(model):
    """What a model is and does: its logits, parameters and hooks."""
    with torch.no_grad():
        logits = model(TOKENS)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    hooks = {
        name: (len(point.fwd_hooks), len(point.bwd_hooks), len(point._forward_hooks))
        for name, point in model.hook_dict.items()
    }
    return logits, parameters, hooks, model.training, repr(model.cfg)


def assert_unchanged(before, after):
    assert torch.equal(before[0], after[0])
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert before[2:] == after[2:]


def test_points_carry_hugging_faces_hidden_states(tiny_hf, backend):
    with torch.no_grad():
        expected = tiny_hf(TOKENS, output_hidden_states=True).hidden_states
    model = tiny.wrap(tiny_hf, backend)
    seen = {}
    points = residual_stream_points(model.cfg.n_layers)
    run_with_hooks(model, TOKENS, {name: lambda x, n=name: seen.__setitem__(n, x.clone()) for name in points})
    for name, states in zip(points[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(seen[name], states, rtol=1e-4, atol=1e-5)
    assert list(seen) == points  # in the order of the forward pass, the last one included


def test_returned_activations_replace(tiny_model):
    seen = {}
    run_with_hooks(
        tiny_model,
        TOKENS,
        {
            "blocks.1.hook_resid_pre": lambda x: torch.ones_like(x),
            "blocks.1.ln1.hook_scale": lambda x: seen.__setitem__("scale", x.clone()),
        },
    )
    expected = 1.0 if "RMS" in tiny_model.cfg.normalization_type else tiny_model.cfg.eps**0.5
    torch.testing.assert_close(seen["scale"].flatten(), torch.full((8,), expected), rtol=1e-3, atol=1e-5)


def test_unknown_names_are_errors(tiny_model):
    with pytest.raises(HookError, match=r"no hook point 'blocks\.9\.hook_resid_post'; see model\.hook_dict"):
        run_with_hooks(tiny_model, TOKENS, {"blocks.9.hook_resid_post": lambda x: None})


SILENT = {
    ("llama", "hooked_transformer"): ("blocks.0.hook_mlp_in", "exists in the model but did not fire"),
    ("gpt2", "hooked_transformer"): ("blocks.0.hook_attn_in", "exists in the model but did not fire"),
    ("llama", "bridge"): ("hook_pos_embed", "exists in the model but did not fire"),
    ("gpt2", "bridge"): ("blocks.0.attn.hook_result", "use_attn_result is False"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_points_that_do_not_fire_are_errors(family, backend):
    model = tiny.wrap(getattr(tiny, family)(), backend)
    name, message = SILENT[family, backend]
    with pytest.raises(HookError, match=message):
        run_with_hooks(model, TOKENS, {name: lambda x: None, "blocks.0.hook_resid_pre": lambda x: None})


@pytest.mark.parametrize(
    ("tokens", "message"), [([[3, 60]], "token id 60"), ([[-1, 2]], "token id -1"), ([[]], "no tokens")]
)
def test_tokens_outside_the_vocabulary_are_errors(tiny_model, tokens, message):
    with pytest.raises(InputError, match=message):
        run_with_hooks(tiny_model, torch.tensor(tokens, dtype=torch.long), {"blocks.0.hook_resid_pre": lambda x: None})


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored_after_an_exception(tiny_model, error):
    before = state(tiny_model)

    def fail(activation):
        raise error("in a callback")

    with pytest.raises(error, match="in a callback"):
        run_with_hooks(tiny_model, TOKENS, {"blocks.1.hook_resid_post": fail})
    assert_unchanged(before, state(tiny_model))


def use_ablated(model):
    with sd_lens.ablated(model, ["L1H0", "L1N3", "L0"], "resample", reference=[TOKENS], progress=False):
        model(TOKENS)


def use_write_report(model):
    with tempfile.TemporaryDirectory() as folder:
        sd_lens.write_report(model, Path(folder) / "report.html", planted.llama().texts[:14], progress=False)


def use_quantize(model):
    with sd_lens.quantize(model, [1]):
        model(TOKENS)


USES = {
    "write_report": use_write_report,
    "scan_norms": lambda model: scan_norms(model, [TOKENS], progress=False),
    "find_high_norm_tokens": lambda model: find_high_norm_tokens(model, [TOKENS], progress=False),
    "singular_defects": lambda model: singular_defects(model, progress=False),
    "singular_spectra": lambda model: sd_lens.singular_spectra(model, k=3, progress=False),
    "defect_eigenvalues": lambda model: sd_lens.defect_eigenvalues(model, torch.ones(32), progress=False),
    "forecast": lambda model: sd_lens.forecast(model, score_layer=1, progress=False),
    "predict_norms": lambda model: sd_lens.predict_norms(model, torch.ones(model.cfg.d_model), 5.0, 0, progress=False),
    "capture_linear_maps": lambda model: sd_lens.capture_linear_maps(model, [TOKENS] * 4, progress=False),
    "attention_sinks": lambda model: sd_lens.attention_sinks(model, TOKENS, progress=False),
    "massive_activations": lambda model: sd_lens.massive_activations(model, TOKENS, progress=False),
    "sinks_without": lambda model: sd_lens.sinks_without(
        model, TOKENS, 1, torch.ones(model.cfg.d_model), progress=False
    ),
    "super_weights": lambda model: sd_lens.super_weights(model, TOKENS, 1, neurons=1, entries=1, progress=False),
    "explosion_path": lambda model: sd_lens.explosion_path(model, 1, 3.0, progress=False),
    "explosion_in_context": lambda model: sd_lens.explosion_in_context(
        model, sd_lens.explosion_path(model, 1, 3.0, progress=False), TOKENS, progress=False
    ),
    "explosion_subspace": lambda model: sd_lens.explosion_subspace(model, 1, progress=False),
    "quantize": use_quantize,
    "perplexity": lambda model: sd_lens.perplexity(model, TOKENS, progress=False),
    "quantization_report": lambda model: sd_lens.quantization_report(model, TOKENS, [1], n_controls=1, progress=False),
    "search_spared_layers": lambda model: sd_lens.search_spared_layers(model, TOKENS, steps=1, progress=False),
    "forecast_rounding": lambda model: sd_lens.forecast_rounding(model, n_probes=16, progress=False),
    "smoothing_factors": lambda model: sd_lens.smoothing_factors(model, TOKENS, progress=False),
    "spare_list": lambda model: sd_lens.spare_list(model, [1]),
    "activation_outliers": lambda model: sd_lens.activation_outliers(model, TOKENS, progress=False),
    "signature": lambda model: sd_lens.signature(model, TOKENS, progress=False),
    "signature_trajectory": lambda model: sd_lens.signature_trajectory([("last", model)], progress=False),
    "observe_behaviour": lambda model: sd_lens.observe_behaviour(model, [TOKENS], progress=False),
    "attribute": lambda model: sd_lens.attribute(model, TOKENS[0], 2),
    "attribute_corpus": lambda model: sd_lens.attribute_corpus(model, TOKENS, 2, verify_tokens=1, progress=False),
    "attribute_neurons": lambda model: sd_lens.attribute_neurons(model, sd_lens.attribute(model, TOKENS[0], 2, 1), 1),
    "attribute_sources": lambda model: sd_lens.attribute_sources(
        model, sd_lens.attribute(model, TOKENS[0], 2, 1), 1, 0
    ),
    "verify": lambda model: sd_lens.verify(
        model, sd_lens.attribute(model, TOKENS[0], 2), reference=TOKENS, progress=False
    ),
    "ablated": use_ablated,
    "ablate": lambda model: sd_lens.ablate(
        model, TOKENS, ["L0H1", "L1N2", "L2"], "direction", direction=torch.ones(model.cfg.d_model), progress=False
    ),
    "sweep_ablations": lambda model: sd_lens.sweep_ablations(model, TOKENS, "mean", progress=False),
    "patch": lambda model: sd_lens.patch(model, TOKENS[0], TOKENS[1], lambda x: x[0, -1, 3], ["z"], progress=False),
}
USES_OF_MIXTURES = {
    "capture_router_weights": lambda model: sd_lens.capture_router_weights(model, TOKENS, progress=False),
    "expert_defects": lambda model: sd_lens.expert_defects(model, progress=False),
}
WITHOUT_A_MODEL = {"default_texts", "lineage", "read_texts"}


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")
def test_public_functions_leave_no_trace(tiny_model, name):
    before = state(tiny_model)
    USES[name](tiny_model)
    assert_unchanged(before, state(tiny_model))
    assert all(p.grad is None for p in tiny_model.parameters())


@pytest.mark.parametrize("name", USES_OF_MIXTURES)
def test_public_functions_for_mixtures_leave_no_trace(backend, name):
    model = tiny.wrap(tiny.mixtral(), backend)
    before = state(model)
    USES_OF_MIXTURES[name](model)
    assert_unchanged(before, state(model))


@pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")
def test_a_report_that_attributes_and_ablates_leaves_no_trace(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    before = state(model)
    use_write_report(model)
    assert_unchanged(before, state(model))


def test_no_public_function_is_left_out():
    functions = {name for name in sd_lens.__all__ if inspect.isfunction(getattr(sd_lens, name))}
    assert functions - WITHOUT_A_MODEL - {"load_model"} == set(USES) | set(USES_OF_MIXTURES)


def test_a_users_own_hook_stays(tiny_model):
    """sd_lens observes under a user's `hooks()` context, and leaves it in place."""
    with tiny_model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: 3 * x)]):
        tripled = scan_norms(tiny_model, [TOKENS], progress=False)
        again = scan_norms(tiny_model, [TOKENS], progress=False)
    plain = scan_norms(tiny_model, [TOKENS], progress=False)
    torch.testing.assert_close(tripled.maximum[0], again.maximum[0])
    torch.testing.assert_close(tripled.maximum[0], 3 * plain.maximum[0])


def test_a_point_that_fires_repeatedly_calls_back_once(tiny_model):
    calls = []
    run_with_hooks(
        tiny_model,
        TOKENS,
        {"blocks.0.ln1.hook_scale": lambda x: calls.append(x.shape), "blocks.2.hook_resid_post": lambda x: None},
    )
    assert len(calls) == 1


def test_attention_patterns_reach_their_hooks(tiny_model):
    """Needs eager attention, which sd_lens asks transformers for."""
    seen = []
    run_with_hooks(tiny_model, TOKENS, {"blocks.1.attn.hook_pattern": lambda x: seen.append(x.clone())})
    torch.testing.assert_close(seen[0].sum(dim=-1), torch.ones(2, 4, 4))


def test_logits_carry_no_graph_unless_asked_for(tiny_model):
    assert not logits_with_hooks(tiny_model, TOKENS, {}).requires_grad
    assert logits_with_hooks(tiny_model, TOKENS, {}, gradients=True).requires_grad


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "XGLMForCausalLM"])
def test_patterns_are_read_only_where_the_bridge_does_not_hear_them(tiny_llama, architecture, monkeypatch):
    monkeypatch.setattr(hooks, "architecture_of", lambda model: architecture)
    for point in ("hook_pattern", "hook_attn_scores"):
        with pytest.raises(HookError, match="can be read, not edited"):
            logits_with_hooks(tiny_llama, TOKENS, {f"blocks.0.attn.{point}": lambda x: 2 * x})


def test_an_edit_leaves_what_was_captured_before_as_it_was(tiny_model):
    seen = []
    with hooks.hooked(tiny_model, {"blocks.1.attn.hook_z": seen.append}):
        tiny_model(TOKENS)
        plain = seen[0].clone()
        with sd_lens.ablated(tiny_model, "L1H0"):
            tiny_model(TOKENS)
    assert torch.equal(seen[0], plain)
    torch.testing.assert_close(seen[1], plain)  # this reader came before the ablation


@pytest.mark.parametrize(
    "use",
    [
        lambda model: sd_lens.verify(model, sd_lens.attribute(model, TOKENS[0], 2), progress=False),
        USES["patch"],
        lambda model: sd_lens.ablate(model, TOKENS, "L1MLP", progress=False),
    ],
    ids=["verify", "patch", "ablate"],
)
def test_edits_that_never_fire_are_errors(backend, use, monkeypatch):
    """A point that is registered and silent."""
    silent = SILENT["llama", backend][0]
    monkeypatch.setattr(patching, "_point", lambda site, layer: silent)
    monkeypatch.setattr(interventions, "slots_of", lambda component: [(silent, None)])
    with pytest.raises(HookError, match="exists in the model but did not fire"):
        use(tiny.wrap(tiny.llama(), backend))
