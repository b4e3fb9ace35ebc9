import pytest
import torch

from sd_lens import Jacobian, defect_eigenvalues, predict_norms, singular_defects
from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.jacobians import jacobian_maps
from sd_lens.linear.lone_token import after_block
from sd_lens.models.blocks import block_weights
from sd_lens.models.hooks import run_with_hooks
from tests import planted, tiny
from tests.explanations.test_defects import folded

U = torch.randn(32, generator=torch.Generator().manual_seed(1))


def test_the_exact_norms_are_those_of_the_running_model(tiny_model):
    """A lone token whose stream after block 0 is set to the direction."""
    found = predict_norms(tiny_model, U, 40.0, 0, progress=False)
    norms = {}
    start = 40 * U / U.norm()
    callbacks = {"blocks.1.hook_resid_pre": lambda x: start.expand_as(x).clone()} | {
        f"blocks.{layer}.hook_resid_post": lambda x, n=layer: norms.__setitem__(n, float(x[0, 0].norm()))
        for layer in (1, 2)
    }
    run_with_hooks(tiny_model, torch.tensor([[5]]), callbacks)
    assert found.layers == (0, 1, 2)
    assert found.exact.tolist() == pytest.approx([40, norms[1], norms[2]], rel=1e-4)
    assert found.linear[:2].tolist() == pytest.approx([40, norms[1]], rel=1e-4)  # the tangent's own point


def test_a_folded_model_predicts_the_same(backend):
    plain, fold = (tiny.wrap(tiny.llama(), backend) for _ in range(2))
    one, other = (predict_norms(model, U, 40.0, 0, progress=False) for model in (plain, folded(fold)))
    for name in ("linear", "exact"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folded_models_lone_token_is_the_running_models(family, backend):
    model = folded(tiny.wrap(tiny.family(family), backend))
    seen = {}
    names = ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
    run_with_hooks(
        model, torch.arange(5, 12)[:, None], {n: lambda x, n=n: seen.__setitem__(n, x[:, 0].clone()) for n in names}
    )
    found = after_block(block_weights(model, 1), seen[names[0]])
    torch.testing.assert_close(found, seen[names[1]], rtol=0, atol=1e-4 * float(seen[names[1]].abs().max()))


def test_the_linear_picture_is_the_tangent_at_the_direction(tiny_llama):
    """Its second block by hand: f(p) + f'(p)(x - p), p the part of x along the direction; f' by autograd."""
    found = predict_norms(tiny_llama, U, 40.0, 0, progress=False)
    u = U / U.norm()
    x = after_block(block_weights(tiny_llama, 1), 40 * u[None])[0]
    p = (x @ u) * u
    block = block_weights(tiny_llama, 2)
    tangent = torch.autograd.functional.jvp(lambda s: after_block(block, s[None])[0], p, x - p)
    assert float(found.linear[2]) == pytest.approx(float((tangent[0] + tangent[1]).norm()), rel=1e-4)
    assert float(found.rate[2]) == pytest.approx(float((tangent[0] - p) @ u / (x @ u)), rel=1e-4)


def test_a_planted_decay_is_named_and_its_sign_turned_round_is_not(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    found = predict_norms(model, planted_defect.direction, 500.0, planted.EXPLOSION, progress=False)
    assert found.decay_layers == (planted.DECAY,)
    assert float(found.rate[planted.DECAY - planted.EXPLOSION]) < -0.5
    assert f"decay blocks ({planted.DECAY},)" in str(found)
    if not hasattr(model.blocks[0].mlp, "W_gate") or model.blocks[0].mlp.W_gate is None:
        other = predict_norms(model, -planted_defect.direction, 500.0, planted.EXPLOSION, progress=False)
        assert other.decay_layers == ()  # an ungated neuron does not fire on that side


def test_observed_norms_stand_beside(tiny_llama):
    found = predict_norms(tiny_llama, U, 40.0, 1, progress=False)
    table = found.to_dataframe(torch.tensor([1.0, 40.0, 30.0], dtype=torch.float64))
    assert table.layer.tolist() == [1, 2]
    assert table.observed.tolist() == [40.0, 30.0]
    logs = found.linear.log()
    assert table.log_error.tolist() == pytest.approx(
        [0, float((logs[1] - torch.tensor(30.0).log()) / 3.4012)], abs=1e-4
    )
    assert "observed" not in found.to_dataframe()
    with pytest.raises(InputError, match="expected 3 positive norms, one per block; got 2"):
        found.to_dataframe(torch.ones(2, dtype=torch.float64))


def test_jacobian_is_a_linearization_like_the_others(tiny_llama):
    streams = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    at = Jacobian(streams, layers=(2, 0))
    found = singular_defects(tiny_llama, [0, 2], at, tol=1e-6, progress=False)
    assert found.linearization == "jacobian"
    A, F = jacobian_maps(block_weights(tiny_llama, 2), streams[0])
    eye = torch.eye(32)
    U_, s, _ = torch.linalg.svd((eye + F.dense()) @ (eye + A.dense()))
    assert float(found.block.values[1]) == pytest.approx(float(s[0]), rel=1e-4)
    assert abs(float(found.block.left[1] @ U_[:, 0])) == pytest.approx(1, abs=1e-4)
    assert defect_eigenvalues(tiny_llama, U, [0], at, progress=False).linearization == "jacobian"
    with pytest.raises(InputError, match=r"block 1 has no stream to linearise at: there are those of \(2, 0\)"):
        singular_defects(tiny_llama, [1], at, progress=False)
    with pytest.raises(InputError, match="expected a finite stream of 32 entries"):
        singular_defects(tiny_llama, [2], Jacobian(torch.full((1, 32), torch.nan), (2,)), progress=False)


def test_bad_arguments_are_named(tiny_llama):
    with pytest.raises(InputError, match="layer=2: expected a block with others behind it, 0 to 1"):
        predict_norms(tiny_llama, U, 1.0, 2, progress=False)
    with pytest.raises(InputError, match="norm=0.0: expected a positive number"):
        predict_norms(tiny_llama, U, 0.0, 0, progress=False)
    with pytest.raises(InputError, match="expected a direction of 32 entries"):
        predict_norms(tiny_llama, U[:5], 1.0, 0, progress=False)
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[:] = torch.inf
    with pytest.raises(NumericalError, match="not finite after block 1"):
        predict_norms(tiny_llama, U, 1.0, 0, progress=False)
