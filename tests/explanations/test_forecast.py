import pytest
import torch

from sd_lens import forecast
from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.angles import acute_angles
from sd_lens.models.blocks import block_weights
from tests import planted, tiny


@pytest.fixture
def model(backend):
    return tiny.wrap(planted.exploding_when_initial().hf_model, backend, with_tokenizer=True)


def test_a_planted_explosion_is_forecast_with_its_blocks_direction_and_token(model):
    found = forecast(model, progress=False)
    assert found.explosion_layers == (planted.EXPLOSION,)
    assert found.decay_layers == (planted.DECAY,)
    assert float(found.direction @ planted.gpt2().direction.double()) > 0.99  # the sign too
    assert found.score_layer == planted.EXPLOSION
    ranked = found.vocabulary.sort_values("non_initial", ascending=False)
    assert ranked.token_id.iloc[0] == planted.TOKEN
    assert ranked.non_initial.iloc[0] > 2 * ranked.non_initial.iloc[1]
    assert found.vocabulary.initial.min() > ranked.non_initial.iloc[1]
    assert str(found).startswith("Forecast of")
    assert f"explosion blocks ({planted.EXPLOSION},)" in str(found)


def test_norms_are_medians_of_running_lone_tokens(tiny_model):
    """The ordinary ones with attention zeroed. Random embeddings go in through the hook in front of block 0."""
    from sd_lens.models.hooks import run_with_hooks

    found = forecast(tiny_model, n_probes=32, seed=3, progress=False)
    probes = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    mean = found.vocabulary.embedding_norm[~found.vocabulary.untrained].mean()
    probes = probes / probes.norm(dim=1, keepdim=True) * mean
    for norms, attention in ((found.norms, True), (found.ordinary_norms, False)):
        seen = {}
        callbacks = {"blocks.0.hook_resid_pre": lambda x: probes[:, None].clone()}
        if not attention:
            callbacks |= {f"blocks.{n}.hook_attn_out": torch.zeros_like for n in range(3)}
        callbacks |= {
            f"blocks.{n}.hook_resid_post": lambda x, n=n, seen=seen: seen.__setitem__(n, x[:, 0].double().norm(dim=1))
            for n in range(3)
        }
        run_with_hooks(tiny_model, torch.full((32, 1), 5), callbacks)
        assert norms.tolist() == pytest.approx([float(seen[n].quantile(0.5)) for n in range(3)], rel=1e-4)


def test_without_an_explosion_there_is_no_direction_and_no_score(backend):
    found = forecast(tiny.wrap(tiny.llama(), backend), progress=False)
    assert found.direction is None
    assert found.explosion_layers == ()
    assert found.score_layer is None
    assert found.vocabulary.initial.isna().all()
    assert str(found).endswith("no explosion")
    scored = forecast(tiny.wrap(tiny.llama(), backend), score_layer=1, progress=False)
    assert scored.vocabulary.initial.notna().all()


def test_without_scores_the_rest_is_the_same(model):
    found, whole = forecast(model, scores=False, progress=False), forecast(model, progress=False)
    assert torch.equal(found.direction, whole.direction)
    assert found.explosion_layers == whole.explosion_layers
    assert found.score_layer is None
    assert found.vocabulary.drop(columns=["initial", "non_initial"]).equals(
        whole.vocabulary.drop(columns=["initial", "non_initial"])
    )
    assert found.vocabulary[["initial", "non_initial"]].isna().all(axis=None)


def test_scores_are_coefficients_on_the_leading_right_singular_vector(backend):
    from sd_lens.linear.approximations import gaussian_fit, norm_map
    from sd_lens.linear.maps import identity_like
    from sd_lens.models.hooks import run_with_hooks

    model = tiny.wrap(tiny.llama(), backend)
    found = forecast(model, score_layer=1, progress=False)
    block = block_weights(model, 1)
    M = gaussian_fit(block, identity_like(norm_map(block.mlp_norm, block.W_in)), "post-gain").dense()
    v1 = torch.linalg.svd(block.W_out.mT.double() @ M.double()).Vh[0]
    seen = []
    run_with_hooks(
        model, torch.arange(tiny.VOCABULARY)[:, None], {"blocks.1.hook_resid_mid": lambda x: seen.append(x[:, 0])}
    )
    x = seen[0].double()
    x = x / (x.square().mean(dim=1, keepdim=True) + model.cfg.eps).sqrt() * block.mlp_norm.gain.double()
    expected = x @ v1
    scores = torch.tensor(found.vocabulary.initial.to_numpy())
    sign = torch.sign(scores @ expected)
    torch.testing.assert_close(scores, sign * expected, rtol=1e-3, atol=1e-3)


def test_untrained_tokens_are_set_apart():
    hf_model = planted.exploding_when_initial().hf_model
    with torch.no_grad():
        hf_model.transformer.wte.weight[11:14] = 0
        hf_model.transformer.wpe.weight[0] = 0
    found = forecast(tiny.wrap(hf_model, "auto"), progress=False)
    assert found.vocabulary.index[found.vocabulary.untrained].tolist() == [11, 12, 13]


def test_the_direction_is_that_of_the_singular_defect(model):
    from sd_lens import singular_defects

    found = forecast(model, progress=False)
    defects = singular_defects(model, [planted.EXPLOSION], progress=False)
    assert acute_angles(defects.block.left, found.direction).item() < 5


def test_bad_arguments_are_named(tiny_llama):
    with pytest.raises(InputError, match="n_probes=3: expected at least 16"):
        forecast(tiny_llama, n_probes=3, progress=False)
    with pytest.raises(InputError, match="block 9 does not exist: the model has blocks 0 to 2"):
        forecast(tiny_llama, score_layer=9, progress=False)
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[:] = torch.nan
    with pytest.raises(NumericalError, match="not finite after block 1"):
        forecast(tiny_llama, progress=False)


def test_the_planted_token_has_the_largest_score(planted_defect, backend):
    """Whichever sign the singular vector comes with, and though most probes do not explode."""
    found = forecast(tiny.wrap(planted_defect.hf_model, backend), score_layer=planted.EXPLOSION, progress=False)
    assert found.vocabulary.initial.idxmax() == found.vocabulary.non_initial.idxmax() == planted.TOKEN
