"""Every mixture of experts, in every wrapper that boots it, against the running model."""

import pytest
import torch

from sd_lens import (
    Jacobian,
    RouterWeighted,
    attribute,
    attribute_neurons,
    capture_linear_maps,
    defect_eigenvalues,
    forecast,
    load_model,
    predict_norms,
    singular_defects,
    singular_spectra,
)
from sd_lens.errors import NotSupportedError
from sd_lens.linear.approximations import attention_map, ffn_map
from sd_lens.linear.captured import Captured
from sd_lens.linear.lone_token import mlp_write
from sd_lens.linear.mixtures import router_weights
from sd_lens.models.blocks import block_view, block_weights
from sd_lens.models.hooks import run_with_hooks
from sd_lens.models.views import BlockWeights, MixtureWeights
from tests import tiny
from tests.explanations.test_defects import folded
from tests.oracles.jacobians import attention_jacobian
from tests.oracles.routers import weights_of_tokens

LAYER = 1
TEXTS = torch.randint(3, tiny.VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(0))
IDS = [f"{name}-{backend}" for name, backend in tiny.BOOTING_MIXTURES]


@pytest.fixture(params=tiny.BOOTING_MIXTURES, ids=IDS)
def booted(request):
    """The name of a mixture of experts, and it in a wrapper."""
    name, backend = request.param
    return name, tiny.wrap(tiny.MIXTURES[name](), backend)


@pytest.fixture
def model(booted):
    return booted[1]


def streams_and_writes(model):
    """What the MLP of a run's tokens reads, before its norm, and what it writes."""
    seen = {}
    names = [f"blocks.{LAYER}.hook_resid_mid", f"blocks.{LAYER}.hook_mlp_out"]
    run_with_hooks(model, TEXTS, {n: lambda x, n=n: seen.__setitem__(n, x.flatten(0, 1)) for n in names})
    return [seen[name] for name in names]


def reconstructed(block, x):
    """The experts' writes with the router's weights."""
    weights = router_weights(block, x)
    return sum(weights[:, [e]] * mlp_write(expert, x) for e, expert in enumerate(block.experts))


def test_experts_with_their_routers_weights_write_what_the_mlp_writes(model):
    block = block_view(model, LAYER)
    x, written = streams_and_writes(model)
    assert written.std(dim=0).mean() > 0.05
    for e in range(len(block.experts)):
        assert (router_weights(block, x)[:, e] > 0).any(), f"expert {e} is never run"
    torch.testing.assert_close(reconstructed(block, x), written, rtol=0, atol=1e-5 * float(written.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe interleaved", "qwen3_moe"])
def test_folded_models_are_viewed_as_they_run(name, backend):
    if (name, backend) not in tiny.BOOTING_MIXTURES:
        pytest.skip("HookedTransformer knows Mixtral alone")
    model = folded(tiny.wrap(tiny.MIXTURES[name](), backend))
    x, written = streams_and_writes(model)
    block = block_view(model, LAYER)
    assert block.mlp_norm.gain is None or bool((block.mlp_norm.gain == 1).all())
    torch.testing.assert_close(reconstructed(block, x), written, rtol=0, atol=1e-5 * float(written.abs().max()))


@pytest.mark.skipif("hooked_transformer" not in tiny.BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("renormalized", [True, False])
def test_a_configuration_of_ones_own_is_judged_by_its_structure(renormalized):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, n_heads=4, d_head=8, n_ctx=32, d_vocab=tiny.VOCABULARY, d_mlp=40, act_fn="silu",
        gated_mlp=True, num_experts=4, experts_per_token=2, norm_topk_prob=renormalized, normalization_type="RMS",
        seed=0,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    tiny.randomised(model)
    x, written = streams_and_writes(model)
    block = block_view(model, LAYER)
    torch.testing.assert_close(reconstructed(block, x), written, rtol=0, atol=1e-5 * float(written.abs().max()))
    assert bool((router_weights(block, x).sum(dim=1) > 0.999).all()) == renormalized


def test_router_weights_are_those_of_transformers_own_router(booted):
    name, model = booted
    x, _ = streams_and_writes(model)
    expected = weights_of_tokens(tiny.MIXTURES[name](), TEXTS, LAYER)
    torch.testing.assert_close(router_weights(block_view(model, LAYER), x).double(), expected, rtol=0, atol=1e-5)


def test_attention_equals_the_autograd_jacobian(model):
    """Of dense blocks as of mixtures: experts share it."""
    for layer in (0, 1):
        expected = attention_jacobian(model, layer, token=5)
        view = block_view(model, layer)
        for block in view.experts if isinstance(view, MixtureWeights) else (view,):
            torch.testing.assert_close(attention_map(block).dense(), expected, rtol=1e-4, atol=1e-5)


def test_the_closed_form_of_each_expert_is_sampled_least_squares_within_its_noise(model):
    for expert in block_view(model, LAYER).experts:
        closed = ffn_map(expert).dense()
        errors = [ffn_map(expert, "sampled", n_samples=n, seed=1).dense() - closed for n in (4_000, 64_000)]
        few, many = (float(error.norm() / closed.norm()) for error in errors)
        assert many < 0.15
        assert many < few / 2  # 1 / sqrt(16) = 1/4, with room for chance


def test_dense_blocks_among_mixtures_are_dense(booted):
    name, model = booted
    assert isinstance(block_view(model, 0), BlockWeights) == ("interleaved" in name)
    assert isinstance(block_view(model, LAYER), MixtureWeights)
    if "interleaved" in name:
        seen, block = {}, block_weights(model, 0)
        names = ("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out")
        run_with_hooks(model, TEXTS, {n: lambda x, n=n: seen.__setitem__(n, x.flatten(0, 1)) for n in names})
        torch.testing.assert_close(mlp_write(block, seen[names[0]]), seen[names[1]], rtol=1e-4, atol=1e-5)


def test_writes_sum_exactly(booted):
    name, model = booted
    found = attribute(model, TEXTS[0], 5, LAYER)
    assert found.residual_error < 1e-5
    assert found.table.share.sum() == pytest.approx(1, rel=1e-4)
    if "interleaved" in name:
        contribution = found.table.set_index("component").contribution
        neurons = attribute_neurons(model, found, 0).table.contribution.sum()
        assert neurons == pytest.approx(contribution["L0MLP"], rel=1e-3, abs=1e-5)


def test_views_do_not_copy_the_experts(backend):
    model = tiny.wrap(tiny.mixtral(), backend)
    one, other = (block_view(model, LAYER).experts[2] for _ in range(2))
    for name in ("W_in", "W_gate", "W_out"):
        assert getattr(one, name).data_ptr() == getattr(other, name).data_ptr()


def test_half_precision_stays_as_it_is():
    block = block_view(load_model(tiny.qwen_moe(2), backend="bridge", dtype=torch.bfloat16), LAYER)
    for expert in block.experts:
        assert {expert.W_in.dtype, expert.W_gate.dtype, expert.W_out.dtype} == {torch.bfloat16}
    assert router_weights(block, torch.randn(3, 32)).dtype == torch.float32


ALONE = RouterWeighted((1,), torch.eye(1, 4, dtype=torch.float64))
REFUSING = {
    "block_weights": lambda model: block_weights(model, LAYER),
    "singular_defects": lambda model: singular_defects(model, progress=False),
    "sampled": lambda model: singular_defects(model, linearization="sampled", progress=False),
    "singular_spectra": lambda model: singular_spectra(model, progress=False),
    "defect_eigenvalues": lambda model: defect_eigenvalues(model, torch.ones(32), progress=False),
    "forecast": lambda model: forecast(model, progress=False),
    "predict_norms": lambda model: predict_norms(model, torch.ones(32), 100.0, 0, progress=False),
    "capture_linear_maps": lambda model: capture_linear_maps(model, TEXTS, progress=False),
    "Jacobian": lambda model: singular_defects(
        model, [LAYER], Jacobian(torch.ones(1, 32), (LAYER,)), progress=False
    ),
    "Captured": lambda model: singular_defects(
        model, [LAYER], Captured((LAYER,), torch.ones(1, 32, 32), torch.ones(1, 48, 32), 9), progress=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", REFUSING)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe interleaved"])
def test_what_needs_a_single_mlp_says_what_does_not(function, name, backend, monkeypatch):
    if (name, backend) not in tiny.BOOTING_MIXTURES:
        pytest.skip("HookedTransformer knows Mixtral alone")
    monkeypatch.setattr(
        "sd_lens.explanations.defects.leading_triples", lambda *_, **__: pytest.fail("work was done first")
    )
    with pytest.raises(
        NotSupportedError,
        match=r"not supported yet: a mixture of experts as one MLP \(block \d\); expert_defects looks at each expert, "
        r".* take linearization=capture_router_weights\(model, texts\)",
    ):
        REFUSING[function](tiny.wrap(tiny.MIXTURES[name](), backend))
