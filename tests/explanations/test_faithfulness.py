import pandas as pd
import pytest
import torch

from sd_lens import (
    ablated,
    attribute,
    attribute_corpus,
    attribute_neurons,
    attribute_sources,
    load_model,
    verify,
)
from sd_lens.errors import InputError, NotSupportedError, NumericalError
from sd_lens.explanations import contributions
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
    own = found.table.set_index("component").contribution
    for component in table.index:  # ablating an MLP takes its output bias away too
        bias = own.get(f"{component[:2]}b_out", 0.0) if component.endswith("MLP") else 0.0
        assert table.contribution[component] == pytest.approx(own[component] + bias)
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
    totals = torch.tensor([a.total for a in single], dtype=torch.float64)
    total = float(totals.mean())
    for batch_tokens in (1, 1000):
        found = attribute_corpus(tiny_model, TEXTS, 2, where=_table(places), batch_tokens=batch_tokens, progress=False)
        table = found.table
        assert found.n_tokens == 3
        assert table.component.tolist() == single[0].table.component.tolist()
        for column, expected in (
            ("contribution", contributions.mean(dim=0)),
            ("contribution_std", contributions.std(dim=0)),
            ("share", contributions.mean(dim=0) / total),
            ("share_std", (contributions - contributions.mean(dim=0) / total * totals[:, None]).std(dim=0) / total),
        ):
            torch.testing.assert_close(torch.tensor(table[column].to_numpy()), expected, rtol=1e-4, atol=1e-6)
        assert table.top.tolist() == torch.bincount(contributions.abs().argmax(dim=1), minlength=len(table)).tolist()
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
    with pytest.raises(InputError, match="block -1 does not exist"):
        attribute_corpus(tiny_llama, TEXTS, -1, progress=False)


def test_the_sign_of_a_direction_changes_neither_shares_nor_who_is_first(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    where = _table([(i, i % 12) for i in range(12)])
    one, other = (
        attribute_corpus(
            model, planted_defect.texts[:12], planted.EXPLOSION, where, sign * planted_defect.direction, progress=False
        ).table
        for sign in (1.0, -1.0)
    )
    assert one.top.tolist() == other.top.tolist()
    assert one.top.max() == 12
    assert one.share.tolist() == pytest.approx(other.share.tolist(), rel=1e-4, abs=1e-6)
    assert other.share.max() > 0.9


def test_a_direction_that_the_streams_do_not_have_gives_no_shares(tiny_llama):
    found = attribute(tiny_llama, TEXT, 2, 1)
    u = torch.randn(32, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    u -= (u @ found.direction) * found.direction
    orthogonal = attribute(tiny_llama, TEXT, 2, 1, u)
    assert orthogonal.table.share.isna().all()
    assert orthogonal.table.contribution.abs().max() > 1e-3


def test_only_so_many_tokens_are_verified_however_they_are_batched(tiny_llama):
    one, other = (
        attribute_corpus(tiny_llama, TEXTS, 2, verify_tokens=2, batch_tokens=n, progress=False).faithfulness.table
        for n in (1, 1000)
    )
    assert one.effect.tolist() == pytest.approx(other.effect.tolist(), rel=1e-4, abs=1e-5)


def test_a_corpus_is_run_no_further_than_its_last_token(tiny_llama):
    seen = []
    with tiny_llama.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(tuple(x.shape[:2])))]):
        attribute_corpus(tiny_llama, TEXTS, 1, _table([(1, 1)]), progress=False)
    assert seen == [(1, 2)]


def test_the_residual_error_is_the_largest_and_relative_to_the_norm(tiny_llama, monkeypatch):
    shift = iter([3e-5, 1e-6, 2e-6])
    project = contributions.Writes.project

    def missing(self, directions):
        found = project(self, directions).clone()
        found[:, 0] += next(shift) * self.residual.double().norm(dim=1)
        return found

    monkeypatch.setattr(contributions.Writes, "project", missing)
    found = attribute_corpus(tiny_llama, TEXTS, 1, batch_tokens=1, progress=False)
    assert found.residual_error == pytest.approx(3e-5, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "miss", "refused"),
    [
        (torch.float32, 2e-4, True),
        (torch.float32, 5e-5, False),
        (torch.bfloat16, 0.1, True),
        (torch.bfloat16, 0.01, False),
    ],
)
def test_sums_that_miss_the_stream_are_refused(dtype, miss, refused, monkeypatch):
    model = load_model(tiny.llama(), device="cpu", dtype=dtype)
    project = contributions.Writes.project

    def missing(self, directions):
        found = project(self, directions)
        error = found.sum(dim=1) - self.residual.double().norm(dim=1)
        found[:, 0] += miss * self.residual.double().norm(dim=1) - error
        return found

    monkeypatch.setattr(contributions.Writes, "project", missing)
    if refused:
        with pytest.raises(NotSupportedError, match=r"or hooks that are active edit it"):
            attribute(model, TEXT, 2, 1)
    else:
        assert attribute(model, TEXT, 2, 1).residual_error == pytest.approx(miss, rel=0.1)


def test_a_stream_of_zeros_has_no_direction(tiny_llama):
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.zero_()
    with pytest.raises(NumericalError, match="it has no direction of its own"):
        attribute(tiny_llama, TEXT, 2, 1)


def test_drilling_and_verifying_need_the_attributions_own_model_and_cache(tiny_llama):
    found = attribute(tiny_llama, TEXT, 3, 1)
    other = tiny.wrap(tiny.llama(seed=4), "auto")
    with torch.no_grad():
        cache = tiny_llama.run_with_cache(TEXT.flip(0)[None])[1]
    for use in (
        lambda: attribute_neurons(other, found, 1),
        lambda: attribute_neurons(tiny_llama, found, 1, cache=cache),
        lambda: attribute_sources(other, found, 1, 0),
        lambda: attribute_sources(tiny_llama, found, 1, 0, cache=cache),
    ):
        with pytest.raises(InputError, match="in the attribution: model, hooks or cache are others"):
            use()
    with pytest.raises(InputError, match="the attribution is of another model, or of this one in another state"):
        verify(other, found, progress=False)
    with pytest.raises(InputError, match="the attribution is of another model: it has other components"):
        verify(tiny.wrap(tiny.llama(num_hidden_layers=1), "auto"), found, progress=False)


def test_disagreement_looks_at_sizes_not_signs_and_has_a_limit():
    labels = ["L0H0", "L0H1", "L0H2", "L0H3", "L0H4"]
    written = torch.tensor([-9.0, 1, 2, 3, 4], dtype=torch.float64)
    same = compared(labels, written, torch.tensor([-8.0, 1, 2, 3, 4], dtype=torch.float64), 10.0, "zero")
    assert same.disagreement == ""
    for order, sentence in (([3.0, 1, 2, 4, 5], False), ([5.0, 1, 2, 3, 4], True)):
        found = compared(labels, torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64),
                         torch.tensor(order, dtype=torch.float64), 10.0, "zero")  # fmt: skip
        assert (found.rank_correlation >= 0.5) != sentence
        assert ("in different order" in found.disagreement) == sentence
