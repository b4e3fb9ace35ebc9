import dataclasses
import math

import pandas as pd
import pytest
import torch

from sd_lens import Behaviour, Component, ablate, ablated, attribute, observe_behaviour
from sd_lens.errors import InputError, NumericalError
from sd_lens.explanations.components import heads_and_mlps
from sd_lens.explanations.references import N_SAMPLES, collect_reference
from sd_lens.models.blocks import block_writes
from sd_lens.models.hooks import run_with_hooks
from sd_lens.observations.selection import check_where, selected
from sd_lens.observations.texts import batches
from tests import planted, tiny
from tests.models.test_hooks import assert_unchanged, state

TEXTS = [torch.tensor([3, 14, 15, 9, 26, 5]), torch.tensor([8, 9, 7]), torch.tensor([9, 32, 38, 46])]
COMPONENTS = ["L1H2", "L1ATTN", "L1MLP", "L1N7", "L1", "embed"]


def activation(model, point, tokens=TEXTS[0]):
    seen = []
    run_with_hooks(model, tokens[None], {point: lambda x: seen.append(x.clone())})
    return seen[0]


def logits(model, tokens=TEXTS[0]):
    with torch.no_grad():
        return model(tokens[None])


# Names


@pytest.mark.parametrize(
    "label", ["embed", "pos_embed", "L11H3", "L11ATTN", "L11MLP", "L11N456", "L11N456C78", "L11", "L3b_O", "L3b_out"]
)
def test_labels_are_read_as_they_are_written(label):
    assert str(Component.parse(label)) == label


@pytest.mark.parametrize(
    "label", ["", "L", "11", "L1H", "L1N", "L1MLP3", "H3", "L1X2", "mlp", "L1N2C", "L1NC3", "L1H2C3"]
)
def test_other_labels_are_errors(label):
    with pytest.raises(InputError, match="no component is called"):
        Component.parse(label)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ("L3MLP", "L3MLP does not exist: the model has blocks 0 to 2"),
        ("L1H4", "L1H4 does not exist: block 1 has heads 0 to 3"),
        (["L0MLP", "L1N48"], "L1N48 does not exist: block 1 has neurons 0 to 47"),
        ("L1N48C2", "L1N48C2 does not exist: block 1 has neurons 0 to 47"),
        ("L1N47C32", "L1N47C32 does not exist: the stream has channels 0 to 31"),
        ([], "no component was named"),
        ("L1b_O", "L1b_O is a constant that no hook point shows"),
    ],
)
def test_components_that_do_not_exist_are_named(tiny_llama, components, message):
    with pytest.raises(InputError, match=message), ablated(tiny_llama, components):
        pass


# What an ablation does to an activation


@pytest.mark.parametrize("label", COMPONENTS)
def test_ablating_what_writes_nothing_changes_nothing(tiny_hf, backend, label):
    model = tiny.wrap(tiny_hf, backend)
    with torch.no_grad():
        block = model.blocks[1]
        writers = [block.attn.W_O, block.mlp.W_out, *([model.W_E] if label == "embed" else [])]
        for weight in (*writers, getattr(block.attn, "b_O", None), getattr(block.mlp, "b_out", None)):
            if weight is not None:
                weight.zero_()
    before = logits(model)
    if label == "embed" and model.cfg.positional_embedding_type != "standard":
        assert activation(model, "hook_embed").abs().max() == 0
    with ablated(model, label):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("label", COMPONENTS)
def test_ablations_bite_and_leave_no_trace(tiny_model, label):
    before = state(tiny_model)
    with ablated(tiny_model, label):
        assert (logits(tiny_model) - before[0][:1, :1].mean()).isfinite().all()
        assert not torch.allclose(tiny_model(torch.tensor([[3, 4, 5, 6], [9, 8, 7, 7]])), before[0], atol=1e-3)
    assert_unchanged(before, state(tiny_model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored_however_the_block_ends(tiny_model, error):
    before = state(tiny_model)
    with pytest.raises(error), ablated(tiny_model, ["L1H2", "L1MLP"]), ablated(tiny_model, "L0"):
        logits(tiny_model)
        raise error
    assert_unchanged(before, state(tiny_model))


def test_the_mean_is_that_of_the_references_tokens(tiny_model):
    states = torch.cat([activation(tiny_model, "blocks.1.attn.hook_z", t)[0] for t in TEXTS])
    with ablated(tiny_model, "L1H2", "mean", reference=TEXTS, progress=False):
        z = activation(tiny_model, "blocks.1.attn.hook_z")
    torch.testing.assert_close(z[0, :, 2], states[:, 2].mean(dim=0).expand(6, -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z[0, :, :2], activation(tiny_model, "blocks.1.attn.hook_z")[0, :, :2])


def test_resampling_draws_from_the_reference_and_follows_its_seed(tiny_model):
    states = torch.cat([activation(tiny_model, "blocks.1.hook_mlp_out", t)[0] for t in TEXTS])
    drawn = []
    for seed in (0, 0, 1):
        with ablated(tiny_model, "L1MLP", "resample", reference=TEXTS, seed=seed, progress=False):
            drawn.append(activation(tiny_model, "blocks.1.hook_mlp_out")[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    distance = (drawn[0][:, None] - states).norm(dim=-1).min(dim=1).values
    assert distance.max() < 2e-6 * states.norm(dim=-1).max()  # each is one of the reference's
    assert len({tuple(row.tolist()) for row in drawn[2]} | {tuple(row.tolist()) for row in drawn[0]}) > 3


def test_the_sample_of_a_long_reference_is_uniform_and_bounded(tiny_llama):
    tokens = torch.arange(3, 53).repeat(12)[: 12 * 48].reshape(12, 48)  # 576 tokens
    found = collect_reference(
        tiny_llama, tokens, [Component("embedding")], batch_tokens=100, seed=3, progress=False
    )  # fmt: skip
    kept = found.samples["hook_embed"]
    assert len(kept) == N_SAMPLES
    embeddings = tiny_llama.W_E.detach()
    ids = torch.cdist(kept, embeddings).argmin(dim=1)
    text_of = torch.bincount(ids, minlength=60)
    assert (text_of[3:53] > 0).double().mean() > 0.9  # no token of the long corpus is left out
    torch.testing.assert_close(
        found.means["hook_embed"], embeddings.double()[tokens.flatten()].mean(dim=0), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("label", COMPONENTS)
def test_removing_a_direction_takes_just_that_part_of_a_components_write(tiny_model, label):
    u = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u /= u.norm()
    component = Component.parse(label)
    points = {
        "head": ["blocks.1.hook_attn_out"], "attention": ["blocks.1.hook_attn_out"], "mlp": ["blocks.1.hook_mlp_out"],
        "neuron": ["blocks.1.hook_mlp_out"], "block": ["blocks.1.hook_attn_out"], "embedding": ["hook_embed"],
    }[component.kind]  # fmt: skip
    block = block_writes(tiny_model, 1)
    for point in points:
        before = activation(tiny_model, point)
        if component.kind == "head":
            part = activation(tiny_model, "blocks.1.attn.hook_z")[:, :, 2] @ block.W_O[2]
        elif component.kind == "neuron":
            part = activation(tiny_model, "blocks.1.mlp.hook_post")[:, :, 7, None] * block.W_out[7]
        else:
            part = before
        with ablated(tiny_model, label, "direction", direction=3 * u):
            after = activation(tiny_model, point)
        expected = before.double() - (part.double() @ u)[..., None] * u
        torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-6)
        assert (before - after).abs().max() > 1e-3
    if component.kind == "block":
        with ablated(tiny_model, label, "direction", direction=u):
            assert (activation(tiny_model, "blocks.1.hook_mlp_out").double() @ u).abs().max() < 1e-6


def test_only_the_positions_named_are_ablated(tiny_model):
    before = activation(tiny_model, "blocks.1.hook_mlp_out")
    with ablated(tiny_model, "L1MLP", positions=[1, 4, 60]):
        after = activation(tiny_model, "blocks.1.hook_mlp_out")
    assert after[0, [1, 4]].abs().max() == 0
    torch.testing.assert_close(after[0, [0, 2, 3, 5]], before[0, [0, 2, 3, 5]])
    with ablated(tiny_model, ["L1N7", "L1N8"], positions=0):
        post = activation(tiny_model, "blocks.1.mlp.hook_post")
    assert post[0, 0, 7:9].abs().max() == 0
    assert post[0, 1:, 7:9].abs().min() > 0


def test_a_weight_goes_with_its_neuron_or_mlp_and_only_where_it_is_told(tiny_model):
    for whole in ("L1N7", "L1MLP"):
        with ablated(tiny_model, whole):
            expected = logits(tiny_model)
        with ablated(tiny_model, ["L1N7C5", whole]):
            torch.testing.assert_close(logits(tiny_model), expected)
    before = activation(tiny_model, "blocks.1.hook_mlp_out")
    part = activation(tiny_model, "blocks.1.mlp.hook_post")[0, :, 7] * block_writes(tiny_model, 1).W_out[7, 5]
    with ablated(tiny_model, ["L1N7C5", "L1N9C5"], positions=[1, 4]):
        after = activation(tiny_model, "blocks.1.hook_mlp_out")
    with ablated(tiny_model, "L1N9C5", positions=[1, 4]):
        difference = (activation(tiny_model, "blocks.1.hook_mlp_out") - after)[0]
    torch.testing.assert_close(difference[[1, 4], 5], part[[1, 4]], rtol=1e-4, atol=1e-6)
    assert difference[:, torch.arange(32) != 5].abs().max() == 0
    assert (after - before)[0, [0, 2, 3, 5]].abs().max() == 0


@pytest.mark.parametrize(
    ("mode", "options"),
    [("mean", {"reference": TEXTS}), ("resample", {"reference": TEXTS}), ("direction", {"direction": torch.ones(32)})],
)
def test_a_weight_can_only_be_zeroed(tiny_llama, mode, options):
    with (
        pytest.raises(InputError, match="L1N7C5 is a single weight, which can only be zeroed: pass mode='zero'"),
        ablated(tiny_llama, "L1N7C5", mode, progress=False, **options),
    ):
        pass


def test_contexts_nest(tiny_model):
    with ablated(tiny_model, ["L1H2", "L0MLP"]):
        together = logits(tiny_model)
    with ablated(tiny_model, "L1H2"):
        with ablated(tiny_model, "L0MLP"):
            nested = logits(tiny_model)
        one = logits(tiny_model)
    torch.testing.assert_close(nested, together)
    assert not torch.allclose(one, together)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, "unknown mode 'median'"),
        ({"mode": "mean"}, "mode='mean' needs reference"),
        ({"mode": "direction"}, "mode='direction' needs a direction"),
        ({"direction": torch.ones(32)}, "mode='zero' has no use for it"),
        ({"positions": []}, "expected positions from 0 on"),
        ({"positions": [-1]}, "expected positions from 0 on"),
        ({"positions": True}, "expected positions from 0 on"),
        ({"reference": TEXTS}, "mode='zero' has no use for it: pass mode='mean' or 'resample'"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, options, message):
    with pytest.raises(InputError, match=message):
        next(tiny.unchecked(ablated)(tiny_llama, "L1MLP", **options))  # the generator behind the context manager


# Measuring


def test_behaviour_is_what_transformers_says(tiny_hf, backend):
    """Loss, norms and attention, for texts of different lengths in one batch and in several."""
    losses, first, norms = [], [], {"initial": [], "other": []}
    tiny_hf.set_attn_implementation("eager")
    with torch.no_grad():
        for text in TEXTS:
            out = tiny_hf(text[None], output_hidden_states=True, output_attentions=True)
            losses.append(torch.nn.functional.cross_entropy(out.logits[0, :-1], text[1:], reduction="none"))
            first.append(torch.stack([a[0, :, 1:, 0] for a in out.attentions]))
            norms["initial"].append(out.hidden_states[2][0, 0].norm())
            norms["other"].append(out.hidden_states[2][0, 1:].norm(dim=-1))
    model = tiny.wrap(tiny_hf, backend)
    for batch_tokens in (1000, 1):
        found = observe_behaviour(model, TEXTS, batch_tokens=batch_tokens, progress=False)
        assert found.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
        assert found.perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)
        torch.testing.assert_close(found.sinks.float(), torch.cat(first, dim=2).mean(dim=2), rtol=1e-4, atol=1e-6)
        assert float(found.watched_norm[1]) == pytest.approx(torch.stack(norms["initial"]).mean().item(), rel=1e-5)
        assert float(found.other_norm[1]) == pytest.approx(torch.cat(norms["other"]).mean().item(), rel=1e-5)
        largest = max(torch.stack(norms["initial"]).max().item(), torch.cat(norms["other"]).max().item())
        assert float(found.maximum[1]) == pytest.approx(largest, rel=1e-5)
        assert found.n_tokens == 13
        assert found.sink_rate == ((torch.cat(first, dim=2).mean(dim=2) > 0.3).double().mean().item())


def test_tokens_can_be_watched_by_text_table_or_position(tiny_llama):
    table = pd.DataFrame({"text": [0, 2], "position": [3, 0], "norm": 0.0})
    named = observe_behaviour(tiny_llama, TEXTS, ["w6"], progress=False)  # token 9: in every text
    by_table = observe_behaviour(
        tiny_llama, TEXTS, pd.DataFrame({"text": [0, 1, 2], "position": [3, 1, 0]}), progress=False
    )
    torch.testing.assert_close(named.watched_norm, by_table.watched_norm)
    assert not torch.allclose(
        observe_behaviour(tiny_llama, TEXTS, table, progress=False).watched_norm, named.watched_norm
    )
    last = observe_behaviour(tiny_llama, TEXTS, -1, progress=False)
    by_table = observe_behaviour(
        tiny_llama, TEXTS, pd.DataFrame({"text": [0, 1, 2], "position": [5, 2, 3]}), progress=False
    )
    torch.testing.assert_close(last.watched_norm, by_table.watched_norm)


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (["nowhere"], "the texts have none of the tokens to watch"),
        (50, "the texts have none of the tokens to watch"),
        (pd.DataFrame({"text": [0]}), "the table of tokens has no column 'position'"),
    ],
)
def test_selections_without_tokens_are_named(tiny_llama, watch, message):
    with pytest.raises(InputError, match=message):
        observe_behaviour(tiny_llama, TEXTS, watch, progress=False)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (1.5, "expected a position, tokens, a table"),
        (True, "expected a position, tokens, a table"),
        ([3], "a collection must hold tokens as text"),
        (
            pd.DataFrame({"text": [0.0], "position": [1]}),
            "column 'text' of the table of tokens holds others than integers",
        ),
        (pd.DataFrame({"text": [0], "position": ["a"]}), "column 'position' of the table"),
        (pd.DataFrame({"text": [], "position": []}), "holds others than integers"),
    ],
)
def test_selections_of_another_kind_are_named(where, message):
    with pytest.raises(InputError, match=message):
        tiny.unchecked(check_where)(where)


def test_one_token_texts_have_norms_but_no_loss(tiny_llama):
    found = observe_behaviour(tiny_llama, torch.tensor([[3], [4]]), progress=False)
    assert str(found.loss) == str(found.perplexity) == "nan"
    assert found.watched_norm.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(0.0, 1.0), (2.0, 7.38905609893065), (709.0, 8.2e307), (710.0, math.inf)]
)
def test_a_perplexity_beyond_float64_is_infinite(loss, perplexity):
    norms = torch.ones(2, dtype=torch.float64)
    found = Behaviour(3, norms, norms, norms, loss, torch.ones(2, 1, dtype=torch.float64))
    assert found.perplexity == pytest.approx(perplexity, rel=0.01)


def test_an_ablation_is_the_difference_of_two_runs(tiny_model):
    found = ablate(tiny_model, TEXTS, ["L1MLP", "L0H1"], progress=False)
    whole = observe_behaviour(tiny_model, TEXTS, progress=False)
    with ablated(tiny_model, ["L1MLP", "L0H1"]):
        without = observe_behaviour(tiny_model, TEXTS, progress=False)
    for measured, expected in ((found.before, whole), (found.after, without)):
        assert measured.loss == pytest.approx(expected.loss, rel=1e-6)
        torch.testing.assert_close(measured.watched_norm, expected.watched_norm)
        torch.testing.assert_close(measured.sinks, expected.sinks)
    assert found.after.loss != pytest.approx(found.before.loss, rel=1e-4)
    assert found.components == ("L1MLP", "L0H1")
    table = found.to_dataframe()
    assert table.watched_norm_after.tolist() == pytest.approx(without.watched_norm.tolist())
    assert table.maximum_before.tolist() == pytest.approx(whole.maximum.tolist())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mode = "mean"


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_where_restricts_the_ablation_to_some_tokens(tiny_llama, mode):
    """Only token 9 ("w6") is ablated, wherever it stands; the initial tokens of the first texts stay as they were."""
    found = ablate(tiny_llama, TEXTS[:2], "L2MLP", mode, where=["w6"], watch=["w6"], seed=2, progress=False)
    assert found.after.watched_norm[2] != found.before.watched_norm[2]
    assert found.after.other_norm[2] == found.before.other_norm[2]


def test_the_mean_over_selected_tokens_is_theirs(tiny_llama):
    """Initial tokens replaced by the mean of initial tokens: with the same token in front nothing changes."""
    texts = torch.tensor([[5, 6, 7, 8], [5, 9, 3, 8]])
    found = ablate(tiny_llama, texts, "L1MLP", "mean", where=0, progress=False)
    assert found.after.loss == pytest.approx(found.before.loss, rel=1e-6)
    assert ablate(tiny_llama, texts, "L1MLP", "mean", progress=False).after.loss != pytest.approx(found.after.loss)


def test_another_reference_is_run_instead(tiny_llama):
    own = ablate(tiny_llama, TEXTS, "L1MLP", "mean", progress=False)
    other = ablate(tiny_llama, TEXTS, "L1MLP", "mean", reference=[torch.tensor([40, 41, 42])], progress=False)
    assert own.before.loss == other.before.loss
    assert own.after.loss != other.after.loss
    with pytest.raises(InputError, match="the reference has none of the tokens"):
        ablate(tiny_llama, TEXTS, "L1MLP", "mean", reference=[torch.tensor([40])], where=["w6"], progress=False)


def test_the_planted_neuron_makes_the_norm_and_the_others_do_not(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    texts = planted_defect.texts[:4]
    table = pd.DataFrame({"text": range(4), "position": range(4)})
    found = ablate(model, texts, f"L{planted.EXPLOSION}N3", watch=table, progress=False)
    assert found.after.watched_norm[planted.EXPLOSION] < 0.1 * found.before.watched_norm[planted.EXPLOSION]
    idle = ablate(model, texts, f"L{planted.EXPLOSION}N4", watch=table, progress=False)
    assert idle.after.watched_norm[planted.EXPLOSION] == pytest.approx(
        float(idle.before.watched_norm[planted.EXPLOSION]), rel=0.01
    )
    away = ablate(
        model, texts, f"L{planted.EXPLOSION}MLP", "direction", direction=planted_defect.direction, watch=table,
        progress=False,
    )  # fmt: skip
    assert away.after.watched_norm[planted.EXPLOSION] < 0.1 * away.before.watched_norm[planted.EXPLOSION]
    assert "Ablation (direction) of L2MLP: norm after block" in str(away)


def test_what_is_not_finite_is_an_error_and_the_model_is_restored(tiny_model):
    with torch.no_grad():
        tiny_model.blocks[1].mlp.W_out[0, 0] = float("nan")
    before = state(tiny_model)
    with pytest.raises(NumericalError, match="after block 1 is not finite"):
        ablate(tiny_model, TEXTS, "L0MLP", progress=False)
    after = state(tiny_model)
    assert before[2:] == after[2:]


def test_an_attribution_and_an_ablation_of_the_last_writer_agree(tiny_model):
    found = attribute(tiny_model, TEXTS[0], 3, 2)
    with ablated(tiny_model, "L2MLP"):
        without = activation(tiny_model, "blocks.2.hook_resid_post")[0, 3].double() @ found.direction
    table = found.table.set_index("component").contribution
    bias = table.get("L2b_out", 0.0)  # the ablation takes the bias away too
    assert found.total - float(without) == pytest.approx(table["L2MLP"] + bias, rel=1e-4)


def test_every_head_and_mlp_is_listed_once_in_order(tiny_model):
    labels = [str(c) for c in heads_and_mlps(tiny_model)]
    assert labels[:6] == ["L0H0", "L0H1", "L0H2", "L0H3", "L0MLP", "L1H0"]
    assert len(set(labels)) == len(labels) == 15


def test_positional_embeddings_that_are_not_there_are_named(backend):
    model = tiny.wrap(tiny.llama(), backend)
    with pytest.raises(InputError, match="pos_embed does not exist"), ablated(model, "pos_embed"):
        pass


@pytest.mark.parametrize(
    "arguments",
    [("head", 1), ("head", 1, -1), ("mlp",), ("mlp", 1, 3), ("embedding", 0), ("neuron", -1, 2), ("head", None, 2)],
)
def test_components_have_a_layer_and_an_index_where_their_kind_has(arguments):
    with pytest.raises(InputError, match=f"a component of kind '{arguments[0]}' has (a|no) (layer|index), not"):
        Component(*arguments)


def test_directions_are_taken_away_once_however_often_a_component_is_named(tiny_model):
    """Naming a head twice, or beside the attention that it is part of, in any order."""
    u = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u /= u.norm()
    with ablated(tiny_model, "L1H2", "direction", direction=u):
        once = activation(tiny_model, "blocks.1.hook_attn_out")
    with ablated(tiny_model, ["L1H2", "L1H2"], "direction", direction=u):
        torch.testing.assert_close(activation(tiny_model, "blocks.1.hook_attn_out"), once)
    for both in (["L1ATTN", "L1H2"], ["L1H2", "L1ATTN"], ["L1", "L1H2"]):
        with ablated(tiny_model, both, "direction", direction=u):
            assert (activation(tiny_model, "blocks.1.hook_attn_out").double() @ u).abs().max() < 1e-6


def test_a_direction_is_taken_away_at_the_positions_named(tiny_model):
    u = torch.ones(32)
    for label, point in (("L1H2", "blocks.1.hook_attn_out"), ("L1MLP", "blocks.1.hook_mlp_out")):
        before = activation(tiny_model, point)
        with ablated(tiny_model, label, "direction", direction=u, positions=2):
            after = activation(tiny_model, point)
        changed = (after - before).abs().amax(dim=-1)[0] > 1e-6
        assert changed.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("label", ["L1H2", "L1N7"])
def test_parts_behind_a_norm_are_taken_away_as_that_norm_lets_them_through(label):
    """Gemma 2: the write is scaled by the norm behind it, whose scale is frozen."""
    model = tiny.wrap(tiny.ARCHITECTURES["gemma2"](), "bridge")
    u = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u /= u.norm()
    is_head = label == "L1H2"
    norm, point = ("ln1_post", "blocks.1.hook_attn_out") if is_head else ("ln2_post", "blocks.1.hook_mlp_out")
    block = block_writes(model, 1)
    if is_head:
        part = activation(model, "blocks.1.attn.hook_z")[:, :, 2] @ block.W_O[2]
    else:
        part = activation(model, "blocks.1.mlp.hook_post")[:, :, 7, None] * block.W_out[7]
    gain = 1 + getattr(model.blocks[1], norm).w.detach()
    part = part * gain / activation(model, f"blocks.1.{norm}.hook_scale").reshape(1, 6, 1)
    before = activation(model, point)
    with ablated(model, label, "direction", direction=u):
        after = activation(model, point)
    torch.testing.assert_close(
        after.double(), before.double() - (part.double() @ u)[..., None] * u, rtol=1e-4, atol=1e-6
    )
    assert (after - before).abs().max() > 1e-3


def test_draws_do_not_depend_on_the_batch_and_differ_between_texts(tiny_llama):
    texts = [torch.tensor([3, 14, 15, 9]), torch.tensor([3, 14, 15, 9]), torch.tensor([8, 9])]
    losses = [
        ablate(tiny_llama, texts, ["L1MLP", "L0H1"], "resample", batch_tokens=n, seed=5, progress=False).after.loss
        for n in (1, 8, 1000)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    with ablated(tiny_llama, "L1MLP", "resample", reference=TEXTS, progress=False):
        seen = activation(tiny_llama, "blocks.1.hook_mlp_out", texts[0].expand(2, -1).reshape(-1)[:4])
        rows = []
        run_with_hooks(tiny_llama, torch.stack(texts[:2]), {"blocks.1.hook_mlp_out": rows.append})
    assert seen.shape[1] == 4
    assert not torch.equal(rows[0][0], rows[0][1])


def test_samples_at_two_points_belong_to_the_same_tokens(tiny_llama):
    """Also when tokens have been kept, dropped and replaced in many batches; and none is preferred."""
    texts = torch.arange(3, 53).repeat(24)[: 24 * 48].reshape(24, 48)
    found = collect_reference(
        tiny_llama, texts, [Component("embedding"), Component("mlp", 0)], batch_tokens=100, progress=False
    )
    embeddings, mlp = found.samples["hook_embed"], found.samples["blocks.0.hook_mlp_out"]
    for embedding, out in zip(embeddings[:20], mlp[:20], strict=True):
        token = int((embedding - tiny_llama.W_E).norm(dim=1).argmin())
        places = (texts == token).nonzero()
        outs = torch.stack([activation(tiny_llama, "blocks.0.hook_mlp_out", texts[r])[0, p] for r, p in places])
        assert (out - outs).norm(dim=1).min() < 1e-4


def test_the_sample_prefers_neither_early_nor_late_tokens(tiny_llama):
    texts = torch.cat([torch.full((20, 32), 5), torch.full((20, 32), 9)])
    embeddings = collect_reference(
        tiny_llama, texts, [Component("embedding")], batch_tokens=64, progress=False
    ).samples["hook_embed"]
    early = sum(bool(torch.equal(e, tiny_llama.W_E[5])) for e in embeddings)
    assert 90 < early < 166  # 128 +- 8 of 256, and then some


@pytest.mark.parametrize("where", [["nowhere"], [], 50, pd.DataFrame({"text": [9], "position": [0]})])
def test_ablating_none_of_the_tokens_is_an_error(tiny_llama, where):
    with pytest.raises(InputError, match="the texts have none of the tokens that were to be ablated"):
        ablate(tiny_llama, TEXTS, "L1MLP", where=where, progress=False)


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_replacing_an_activation_by_itself_is_warned_of(tiny_llama, mode):
    same = torch.tensor([[5, 6, 7, 8], [5, 9, 3, 8]])
    with pytest.warns(
        UserWarning, match=r"have the same activation at blocks\.1\.hook_mlp_out: mode='\w+' replaces it by"
    ):
        ablate(tiny_llama, same, "L1MLP", mode, where=0, progress=False)


def test_padding_is_never_selected(tiny_llama):
    """The shorter text is padded with its last token, which is the one that is asked for."""
    texts = [torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor([10, 9])]
    (batch,) = batches(tiny_llama, texts, progress=False)
    assert batch.tokens.shape == (2, 6)
    assert selected(tiny_llama, batch, ["w6"]).sum() == 1
    table = pd.DataFrame({"text": [1, 1, 0, 5, 0], "position": [1, 4, 5, 0, 77]})
    assert selected(tiny_llama, batch, table).nonzero().tolist() == [[0, 5], [1, 1]]


def test_a_table_means_tokens_of_the_texts_and_all_of_another_reference(tiny_llama):
    table = pd.DataFrame({"text": [0], "position": [2]})
    reference = [torch.tensor([40, 41, 42])]
    found = ablate(tiny_llama, TEXTS[:1], "L1MLP", "mean", where=table, reference=reference, progress=False)
    mean = activation(tiny_llama, "blocks.1.hook_mlp_out", reference[0])[0].mean(dim=0)

    def put(x):
        x = x.clone()
        x[0, 2] = mean
        return x

    seen = []
    run_with_hooks(tiny_llama, TEXTS[0][None], {"blocks.1.hook_mlp_out": put, "blocks.1.hook_resid_post": seen.append})
    assert float(found.after.maximum[1]) == pytest.approx(float(seen[0][0].norm(dim=-1).max()), rel=1e-5)
    assert found.after.loss != found.before.loss


def test_a_reference_is_cut_and_begun_like_the_texts(tiny_llama):
    long, short = torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([5, 6, 7])
    cut, whole = (
        ablate(tiny_llama, [short], "L1MLP", "mean", reference=[r], max_length=3, progress=False).after.loss
        for r in (long, short)
    )
    assert cut == pytest.approx(whole, rel=1e-6)
    with_bos, by_hand = (
        ablate(tiny_llama, [short], "L1MLP", "mean", reference=[r], prepend_bos=True, progress=False).after.loss
        for r in ("w2 w3", torch.tensor([1, 5, 6]))
    )
    assert with_bos == pytest.approx(by_hand, rel=1e-6)
