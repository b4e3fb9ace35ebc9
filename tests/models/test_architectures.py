"""Every architecture that the block view supports, in every wrapper that boots it, against the running model."""

import pytest
import torch

from sd_lens import attribute, attribute_neurons, attribute_sources, singular_defects
from sd_lens.linear.approximations import attention_map, block_map, ffn_map
from sd_lens.linear.gaussian import activation_function
from sd_lens.linear.jacobians import jacobian_maps
from sd_lens.linear.lone_token import after_block, lone_attention, mlp_write
from sd_lens.models.blocks import MIXTURES, SUPPORTED, block_weights
from sd_lens.models.hooks import run_with_hooks
from tests import tiny
from tests.oracles.responses import normalized, responses

LAYER = 1
TEXT = torch.tensor([3, 14, 15, 9, 26, 5])


@pytest.fixture(params=tiny.BOOTING, ids=lambda p: f"{p[0]}-{p[1]}")
def model(request):
    name, backend = request.param
    return tiny.wrap(tiny.ARCHITECTURES[name](), backend)


def streams(model, n=80):
    return 3 * torch.randn(n, model.cfg.d_model, generator=torch.Generator().manual_seed(0))


def assert_constant(rows):
    """All rows are one vector: the biases."""
    assert (rows - rows.mean(dim=0)).abs().max() < 1e-4 * max(1, float(rows.abs().max()))


def test_every_supported_architecture_is_among_them():
    assert {type(build()).__name__ for build in tiny.ARCHITECTURES.values()} == set(SUPPORTED) - set(MIXTURES)
    assert {type(build()).__name__ for build in tiny.MIXTURES.values()} == set(MIXTURES)  # tested in test_mixtures.py


def test_attention_is_linear_as_A_says_once_the_norms_scale_is_taken_out(model):
    """A lone token's attention output is A x / scale plus a constant, for every stream x."""
    A = attention_map(block_weights(model, LAYER)).dense().double()
    gain = block_weights(model, LAYER).attention_post_gain
    found = responses(model, LAYER, streams(model))
    _, scale = normalized(model, found.attention_input)
    linear = found.attention_input.double() @ A.T / scale
    assert linear.abs().max() > 0.1
    assert found.attention.std(dim=0).mean() > 0.05
    assert_constant(found.attention - linear)
    if gain is not None:
        assert not torch.allclose(A, A / gain.double()[:, None])


def test_the_mlp_is_what_the_views_tensors_compute(model):
    block = block_weights(model, LAYER)
    found = responses(model, LAYER, streams(model))
    x, _ = normalized(model, found.mlp_input)
    for part, operation in ((block.mlp_norm.gain, torch.mul), (block.mlp_norm.bias, torch.add)):
        x = x if part is None else operation(x, part.double())
    gate = x @ (block.W_in if block.W_gate is None else block.W_gate).double()
    bias = block.b_in if block.W_gate is None else block.b_gate
    h = activation_function(block.act_fn)(gate if bias is None else gate + bias.double())
    if block.W_gate is not None:
        linear = x @ block.W_in.double()
        h = h * (linear if block.b_in is None else linear + block.b_in.double())
    written = h @ block.W_out.double()
    written = written if block.mlp_post_gain is None else written * block.mlp_post_gain.double()
    assert written.std(dim=0).mean() > 0.05
    assert_constant(found.mlp - written)


def after_running(model, streams):
    """What block `LAYER` of the running model makes of `streams` in front of it, as one-token texts."""
    seen = []
    callbacks = {
        f"blocks.{LAYER}.hook_resid_pre": lambda x: streams[:, None].to(x.dtype),
        f"blocks.{LAYER}.hook_resid_post": lambda x: seen.append(x[:, 0]),
    }
    run_with_hooks(model, torch.full((len(streams), 1), 5), callbacks)
    return seen[0]


def test_a_lone_token_runs_through_the_view_as_through_the_model(model):
    """Biases, norms and their eps included, for long streams and for short ones."""
    block = block_weights(model, LAYER)
    for scale in (1e-3, 1, 100):
        x = scale * streams(model, 8)
        expected = after_running(model, x)
        torch.testing.assert_close(after_block(block, x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.skipif("hooked_transformer" not in tiny.BACKENDS, reason="there is no HookedTransformer")
def test_hooked_transformers_bias_behind_the_gate_is_no_bias_in_front_of_it():
    """It is zero in every converted model, and not in one that was trained further."""
    model = tiny.wrap(tiny.llama(), "hooked_transformer")
    before = ffn_map(block_weights(model, LAYER)).dense()
    torch.nn.init.normal_(model.blocks[LAYER].mlp.b_in, generator=torch.Generator().manual_seed(1))
    test_a_lone_token_runs_through_the_view_as_through_the_model(model)
    test_the_jacobian_is_what_small_steps_of_the_running_model_show(model)
    assert torch.equal(ffn_map(block_weights(model, LAYER)).dense(), before)
    assert attribute(model, TEXT, layer=LAYER).residual_error < 1e-5


def test_the_jacobian_is_what_small_steps_of_the_running_model_show(model):
    block = block_weights(model, LAYER)
    x = streams(model, 1)[0]
    A, F = jacobian_maps(block, x)
    L = block_map(A, F, parallel=block.parallel).dense()
    steps = 0.02 * torch.eye(len(x))
    differences = (after_running(model, x + steps) - after_running(model, x - steps)) / 0.04
    if block.act_fn != "relu":  # a step may cross a kink
        torch.testing.assert_close(L, differences.mT, rtol=0, atol=2e-2 * float(L.abs().max()))
    torch.testing.assert_close(L, torch.autograd.functional.jacobian(lambda s: after_block(block, s[None])[0], x))
    torch.testing.assert_close(A.T.dense(), A.dense().mT)
    torch.testing.assert_close(F.T.dense(), F.dense().mT)


def test_writes_depend_on_the_direction_of_a_long_stream_alone(model):
    """Hence their derivatives along the stream vanish: what 1/rms does to the eigenvalue there."""
    block = block_weights(model, LAYER)
    x = 1e4 * torch.nn.functional.normalize(streams(model, 1)[0], dim=0)
    torch.testing.assert_close(lone_attention(block, x[None]), lone_attention(block, 3 * x[None]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mlp_write(block, x[None]), mlp_write(block, 3 * x[None]), rtol=1e-3, atol=1e-3)
    A, F = jacobian_maps(block, x)
    L = block_map(A, F, parallel=block.parallel)
    assert (L @ x - x).norm() < 1e-3 * x.norm()


def test_the_closed_form_is_sampled_least_squares_within_its_noise(model):
    block = block_weights(model, LAYER)
    closed = ffn_map(block).dense()
    errors = [ffn_map(block, "sampled", n_samples=n, seed=1).dense() - closed for n in (4_000, 64_000)]
    few, many = (float(error.norm() / closed.norm()) for error in errors)
    assert many < 0.15
    assert many < few / 2  # 1 / sqrt(16) = 1/4, with room for chance


@pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")
def test_defects_are_the_dense_svd_of_the_blocks_map(model):
    block = block_weights(model, LAYER)
    A, F = attention_map(block).dense().double(), ffn_map(block).dense().double()
    eye = torch.eye(block.d_model, dtype=torch.float64)
    L = eye + A + F if block.parallel else (eye + F) @ (eye + A)
    torch.testing.assert_close(
        block_map(attention_map(block), ffn_map(block), parallel=block.parallel).dense().double(), L,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    U, s, _ = torch.linalg.svd(L)
    found = singular_defects(model, [LAYER], tol=1e-6, progress=False)
    assert float(found.block.values[0]) == pytest.approx(float(s[0]), rel=1e-5)
    assert abs(float(found.block.left[0].double() @ U[:, 0])) == pytest.approx(1, abs=1e-5)


def test_writes_sum_exactly(model):
    for position, layer in ((0, 1), (4, 0), (5, 1)):
        found = attribute(model, TEXT, position, layer)
        assert found.residual_error < 1e-5
        assert found.table.share.sum() == pytest.approx(1, rel=1e-4)
    contribution = found.table.set_index("component").contribution
    neurons, sources = attribute_neurons(model, found, 1), attribute_sources(model, found, 1, 2)
    assert neurons.table.contribution.sum() == pytest.approx(contribution["L1MLP"], rel=1e-3, abs=1e-5)
    assert sources.table.contribution.sum() == pytest.approx(contribution["L1H2"], rel=1e-3, abs=1e-5)


def test_parallel_blocks_are_known_as_such():
    parallel = {"gpt_neox", "gptj", "phi", "falcon"}
    for name, build in tiny.ARCHITECTURES.items():
        assert block_weights(tiny.wrap(build(), "bridge"), 0).parallel == (name in parallel), name
