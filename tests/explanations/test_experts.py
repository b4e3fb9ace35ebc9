import pytest
import torch

from sd_lens import RouterWeighted, capture_router_weights, expert_defects, find_high_norm_tokens, singular_defects
from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.angles import acute_angles
from sd_lens.linear.approximations import attention_map, ffn_map
from sd_lens.models.blocks import block_view
from tests import planted, tiny
from tests.explanations.test_defects import folded


@pytest.mark.parametrize(("name", "backend"), tiny.BOOTING_MIXTURES)
def test_triples_are_the_dense_svd_of_every_experts_maps(name, backend):
    model = tiny.wrap(tiny.MIXTURES[name](), backend)
    found = expert_defects(model, [1], tol=1e-6, progress=False)
    experts = block_view(model, 1).experts
    assert (found.layers, found.experts) == ((1,) * len(experts), tuple(range(len(experts))))
    eye = torch.eye(32, dtype=torch.float64)
    for e, expert in enumerate(experts):
        F = ffn_map(expert).dense().double()
        for part, M in (("ffn", F), ("block", (eye + F) @ (eye + attention_map(expert).dense().double()))):
            U, s, Vh = torch.linalg.svd(M)
            triples = getattr(found, part)
            assert float(triples.values[e]) == pytest.approx(float(s[0]), rel=1e-5)
            assert float(triples.gap[e]) == pytest.approx(float(s[0] / s[1]), rel=0.02)
            assert abs(float(triples.left[e].double() @ U[:, 0])) == pytest.approx(1, abs=1e-4)
            assert abs(float(triples.right[e].double() @ Vh[0])) == pytest.approx(1, abs=1e-4)


@pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")
def test_an_expert_is_the_mixture_with_all_weight_on_it(backend):
    model = tiny.wrap(tiny.mixtral(), backend)
    found = expert_defects(model, [1], progress=False)
    alone = RouterWeighted((1,), torch.eye(4, dtype=torch.float64)[[2]])
    expected = singular_defects(model, [1], alone, progress=False)
    torch.testing.assert_close(found.block.left[[2]], expected.block.left, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.block.values[[2]], expected.block.values, rtol=1e-5, atol=0)


def test_the_planted_expert_is_named(backend):
    """From the weights alone; the running model, its tokens and their routing agree."""
    case = planted.mixtral()
    model = tiny.wrap(case.hf_model, backend)
    defects = expert_defects(model, progress=False)
    strongest = int(defects.block.values.argmax())
    assert (defects.layers[strongest], defects.experts[strongest]) == (planted.EXPLOSION, planted.EXPERT)
    assert f"of expert {planted.EXPERT} in block {planted.EXPLOSION}, gap" in str(defects)
    assert float(defects.angles_to(case.direction)[strongest]) < 5
    marker = torch.eye(planted.WIDTH)[0]
    assert float(acute_angles(defects.ffn.right[[strongest]], marker)) < 5
    others = torch.arange(len(defects.layers)) != strongest
    assert float(defects.block.values[strongest]) > 10 * float(defects.block.values[others].max())

    found = find_high_norm_tokens(model, case.texts, progress=False)
    assert found.explosion_layers == (planted.EXPLOSION,)
    assert float(defects.angles_to(found.direction)[strongest]) < 5
    routed = capture_router_weights(model, case.texts, where=found.table, progress=False)
    assert float(routed.weights[planted.EXPLOSION, planted.EXPERT]) > 0.9
    everywhere = capture_router_weights(model, case.texts, progress=False)
    assert float(everywhere.weights[planted.EXPLOSION, planted.EXPERT]) < 0.6
    for weights in (routed, everywhere):
        whole = singular_defects(model, [planted.EXPLOSION], weights, progress=False)
        assert float(whole.angles_to(case.direction)[0]) < 5


@pytest.mark.parametrize(("name", "layers"), [("qwen2_moe", (0, 1)), ("qwen2_moe interleaved", (1,))])
def test_every_mixture_is_covered_a_shared_expert_last(name, layers):
    found = expert_defects(tiny.wrap(tiny.MIXTURES[name](), "bridge"), progress=False)
    assert found.layers == tuple(layer for layer in layers for _ in range(5))
    assert found.experts == tuple(range(5)) * len(layers)
    assert found.convention == "post-gain"


def test_a_folded_model_gives_the_pre_gain_convention(backend):
    unfolded = expert_defects(tiny.wrap(tiny.mixtral(), backend), convention="pre-gain", progress=False)
    after = expert_defects(folded(tiny.wrap(tiny.mixtral(), backend)), progress=False)
    assert (unfolded.convention, after.convention) == ("pre-gain", "pre-gain")
    for part in ("block", "ffn"):
        one, other = getattr(unfolded, part), getattr(after, part)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=0)


def test_says_what_it_is(backend):
    found = expert_defects(tiny.wrap(tiny.mixtral(), backend), progress=False)
    row = int(found.block.values.argmax())
    assert str(found) == repr(found) == (
        f"ExpertDefects of {found.model_name}, 8 experts in 2 blocks (post-gain): largest singular value "
        f"{found.block.values[row]:.5g} of expert {row % 4} in block {row // 4}, gap {found.block.gap[row]:.3g}"
    )  # fmt: skip
    table = found.to_dataframe()
    assert table.layer.tolist() == [0] * 4 + [1] * 4
    assert table.expert.tolist() == [*range(4)] * 2
    for part in ("block", "ffn"):
        assert table[f"{part}_value"].tolist() == getattr(found, part).values.tolist()
        assert table[f"{part}_gap"].tolist() == getattr(found, part).gap.tolist()


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("llama", None, "the model has no mixtures of experts"),
        ("llama", [1], "block 1 has no experts but a single MLP"),
        ("qwen3_moe interleaved", [1, 0], "block 0 has no experts but a single MLP"),
        ("mixtral", [2], "block 2 does not exist"),
    ],
)
def test_blocks_without_experts_are_errors(name, layers, message):
    model = tiny.wrap((tiny.MIXTURES | tiny.ARCHITECTURES)[name](), "bridge")
    with pytest.raises(InputError, match=message):
        expert_defects(model, layers, progress=False)


def test_an_expert_with_nan_is_an_error():
    hf_model = tiny.mixtral()
    with torch.no_grad():
        hf_model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or inf"):
        expert_defects(tiny.wrap(hf_model, "bridge"), progress=False)
