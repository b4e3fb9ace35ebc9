import pandas as pd
import pytest
import torch

from sd_lens import ablated, attribute, attribute_corpus, verify
from sd_lens.errors import InputError
from sd_lens.explanations.faithfulness import compared
from sd_lens.models.hooks import run_with_hooks
from tests import planted, tiny

TEXT = torch.tensor([3, 14, 15, 9, 26, 5])
TEXTS = [TEXT, torch.tensor([8, 9, 7]), torch.tensor([9, 32, 38, 46])]


def stream(model, tokens, layer, position):
    seen = []
    run_with_hooks(model, tokens[None], {f"blocks.{layer}.hook_resid_post": lambda x: seen.append(x.clone())})
    return seen[0][0, position].double()


def test_effects_are_those_of_one_ablation_after_the_other(tiny_model):
    found = verify(tiny_model, attribute(tiny_model, TEXT, 3, 2), progress=False)
    table = found.faithfulness.table.set_index("component")
    assert len(table) == 15
    for component in ("L0H1", "L1MLP", "L2H3", "L2MLP"):
        with ablated(tiny_model, component, positions=3):
            without = stream(tiny_model, TEXT, 2, 3) @ found.direction
        assert table.effect[component] == pytest.approx(found.total - float(without), rel=1e-3, abs=1e-5)
    assert table.contribution.to_dict() == found.table.set_index("component").contribution[table.index].to_dict()
    ranks = [torch.tensor(table[c].to_numpy()).argsort().argsort() for c in ("contribution", "effect")]
    expected = torch.corrcoef(torch.stack([r.double() for r in ranks]))[0, 1].item()
    assert found.faithfulness.rank_correlation == pytest.approx(expected)


def test_small_batches_give_the_same(tiny_llama):
    found = attribute(tiny_llama, TEXT, 3, 2)
    one, other = (verify(tiny_llama, found, batch_tokens=n, progress=False).faithfulness.table.effect for n in (9, 999))
    assert one.tolist() == pytest.approx(other.tolist(), rel=1e-4, abs=1e-6)


def test_what_is_written_last_has_the_effect_that_it_contributes():
    """In the last block nothing responds to the MLP."""
    model = tiny.wrap(tiny.llama(), "auto")
    table = verify(model, attribute(model, TEXT, 3, 2), progress=False).faithfulness.table.set_index("component")
    assert table.effect["L2MLP"] == pytest.approx(table.contribution["L2MLP"], rel=1e-4)


def test_the_planted_writer_is_the_cause(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    found = verify(model, attribute(model, planted_defect.texts[5], 5, planted.EXPLOSION), progress=False)
    strongest = found.faithfulness.table.iloc[int(found.faithfulness.table.effect.argmax())]
    assert strongest.component == f"L{planted.EXPLOSION}MLP"
    assert strongest.effect == pytest.approx(strongest.contribution, rel=0.02)


@torch.no_grad()
def relay():
    """MLP 0 writes a marker. MLP 1 writes 2 along axis 5 where it reads the marker, and always writes -1 there."""
    model = tiny.llama(num_hidden_layers=2)
    for parameter in model.model.parameters():
        parameter.zero_() if parameter.ndim == 2 else parameter.fill_(1)
    axis = torch.eye(32)
    model.model.embed_tokens.weight.copy_(axis[3].expand(60, -1))
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.gate_proj.weight[0] = first.up_proj.weight[0] = axis[3]
    first.down_proj.weight[:, 0] = 0.002 * axis[4]
    second.gate_proj.weight[1] = second.up_proj.weight[1] = axis[4]
    second.gate_proj.weight[2] = second.up_proj.weight[2] = axis[3]
    neurons = []
    handle = second.down_proj.register_forward_pre_hook(lambda _, x: neurons.append(x[0][0, 0].clone()))
    model(TEXT[None])
    handle.remove()
    second.down_proj.weight[5, 1] = 2 / neurons[0][1]
    second.down_proj.weight[5, 2] = -1 / neurons[0][2]
    return model


def test_a_component_that_works_through_others_makes_a_disagreement(backend):
    """MLP 1 writes all of the 1 along axis 5; but without MLP 0 it would be -1."""
    model = tiny.wrap(relay(), backend)
    found = verify(model, attribute(model, TEXT, 2, 1, torch.eye(32)[5]), progress=False)
    assert found.total == pytest.approx(1, rel=1e-3)
    table = found.faithfulness.table.set_index("component")
    assert table.contribution["L0MLP"] == pytest.approx(0, abs=1e-6)
    assert table.contribution["L1MLP"] == pytest.approx(1, rel=1e-3)
    assert table.effect["L1MLP"] == pytest.approx(1, rel=1e-3)
    assert table.effect["L0MLP"] == pytest.approx(2, rel=0.02)
    assert (
        "L1MLP writes most (100.0 %), but ablating L0MLP, which writes 0.0 %, changes most (20"
        in found.faithfulness.disagreement
    )
    assert str(found).endswith(found.faithfulness.disagreement)


def test_agreement_needs_no_sentence():
    labels = [f"L0H{i}" for i in range(4)]
    values = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    agree = compared(labels, values, values.square(), 10.0, "zero")
    assert (agree.disagreement, agree.rank_correlation) == ("", pytest.approx(1))
    assert str(agree) == "rank correlation with zero ablation 1.00"
    reversed_ = compared(labels, values, values.flip(0), 10.0, "zero")
    assert reversed_.rank_correlation == pytest.approx(-1)
    assert "in different order" in reversed_.disagreement


def test_means_take_the_components_place_if_a_reference_is_given(tiny_llama):
    found = verify(tiny_llama, attribute(tiny_llama, TEXT, 3, 2), reference=TEXTS, progress=False)
    assert found.faithfulness.mode == "mean"
    with ablated(tiny_llama, "L1MLP", "mean", reference=TEXTS, positions=3, progress=False):
        without = stream(tiny_llama, TEXT, 2, 3) @ found.direction
    effect = found.faithfulness.table.set_index("component").effect["L1MLP"]
    assert effect == pytest.approx(found.total - float(without), rel=1e-3)


def test_attributions_of_other_models_are_refused(tiny_llama):
    found = attribute(tiny_llama, TEXT, 3, 2)
    with pytest.raises(InputError, match="the attribution is of another model"):
        verify(tiny.wrap(tiny.llama(num_attention_heads=8, head_dim=4), "auto"), found, progress=False)


# Over a corpus


def test_a_corpus_is_the_mean_and_spread_of_its_tokens(tiny_model):
    places = [(0, 3), (1, 1), (2, 0)]  # token 9, in each text
    single = [attribute(tiny_model, TEXTS[text], position, 2) for text, position in places]
    contributions = torch.stack([torch.tensor(a.table.contribution) for a in single])
    shares = torch.stack([torch.tensor(a.table.share) for a in single])
    for batch_tokens in (1, 1000):
        found = attribute_corpus(tiny_model, TEXTS, 2, where=_table(places), batch_tokens=batch_tokens, progress=False)
        table = found.table
        assert found.n_tokens == 3
        assert table.component.tolist() == single[0].table.component.tolist()
        for column, expected in (
            ("contribution", contributions.mean(dim=0)),
            ("contribution_std", contributions.std(dim=0)),
            ("share", shares.mean(dim=0)),
            ("share_std", shares.std(dim=0)),
        ):
            torch.testing.assert_close(torch.tensor(table[column].to_numpy()), expected, rtol=1e-4, atol=1e-6)
        assert table.top.tolist() == torch.bincount(contributions.argmax(dim=1), minlength=len(table)).tolist()
        assert found.total == pytest.approx(sum(a.total for a in single) / 3, rel=1e-5)
        assert found.residual_error < 1e-5


def _table(places):
    return pd.DataFrame(places, columns=["text", "position"])


def test_a_direction_serves_all_tokens(tiny_llama):
    u = torch.randn(32, generator=torch.Generator().manual_seed(4))
    found = attribute_corpus(tiny_llama, TEXTS, 1, where=None, direction=u, progress=False)
    states = torch.cat([torch.stack([stream(tiny_llama, t, 1, i) for i in range(len(t))]) for t in TEXTS])
    assert found.n_tokens == 13
    assert found.total == pytest.approx(float((states @ u.double() / u.double().norm()).mean()), rel=1e-4)
    assert found.norm == pytest.approx(float(states.norm(dim=1).mean()), rel=1e-4)


def test_a_corpus_is_verified_over_its_first_tokens(tiny_model):
    found = attribute_corpus(tiny_model, TEXTS, 2, verify_tokens=2, progress=False)
    single = [verify(tiny_model, attribute(tiny_model, t, 0, 2), progress=False).faithfulness for t in TEXTS[:2]]
    expected = sum(torch.tensor(f.table.effect) for f in single) / 2
    torch.testing.assert_close(torch.tensor(found.faithfulness.table.effect), expected, rtol=1e-4, atol=1e-5)
    assert attribute_corpus(tiny_model, TEXTS, 2, progress=False).faithfulness is None
    assert "not verified by ablation" in str(attribute_corpus(tiny_model, TEXTS, 2, progress=False))


def test_the_planted_component_is_the_most_frequent(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    found = attribute_corpus(
        model, planted_defect.texts, planted.EXPLOSION, _table([(i, i % 12) for i in range(40)]), progress=False
    )
    best = found.table.iloc[int(found.table.top.argmax())]
    assert (best.component, best.top) == (f"L{planted.EXPLOSION}MLP", 40)
    assert f"L{planted.EXPLOSION}MLP for 40 of them" in str(found)


def test_a_corpus_without_the_tokens_is_an_error(tiny_llama):
    with pytest.raises(InputError, match="the texts have none of the tokens that were asked for"):
        attribute_corpus(tiny_llama, TEXTS, 1, where=30, progress=False)
    with pytest.raises(InputError, match="block 3 does not exist"):
        attribute_corpus(tiny_llama, TEXTS, 3, progress=False)
