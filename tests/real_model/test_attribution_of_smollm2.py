"""Who makes SmolLM2's norms explode and decay, and what happens without it."""

import pytest

from sd_lens import (
    ablate,
    attribute,
    attribute_corpus,
    attribute_neurons,
    attribute_sources,
    default_texts,
    load_model,
    patch,
    verify,
)
from tests import tiny

pytestmark = pytest.mark.real_model
TEXTS = default_texts()


@pytest.fixture(scope="module")
def explosion(smollm2):
    return attribute(smollm2, TEXTS[0])


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_sums_are_exact_in_both_wrappers(backend):
    """1e-4 relative in float32, at high and ordinary norms, up to the last block."""
    model = load_model("smollm2-135m", backend=backend)
    for position, layer in ((0, 11), (0, 29), (9, 29), (40, 5)):
        found = attribute(model, TEXTS[0], position, layer)
        assert found.residual_error < 1e-5
        assert found.table.contribution.sum() == pytest.approx(found.norm, rel=1e-5)


def test_one_mlp_and_two_of_its_neurons_write_the_explosion(smollm2, explosion):
    assert explosion.layer == 11
    assert explosion.table.set_index("component").share["L11MLP"] > 0.99
    neurons = attribute_neurons(smollm2, explosion, 11).table.set_index("neuron")
    assert neurons.share.nlargest(2).index.tolist() == [1229, 1487]
    assert neurons.share.nlargest(2).sum() > 0.99


def test_it_is_so_for_every_text(smollm2):
    found = attribute_corpus(smollm2, TEXTS, 11, progress=False)
    best = found.table.iloc[int(found.table.share.argmax())]
    assert (found.n_tokens, best.component, best.top) == (40, "L11MLP", 40)
    assert best.share_std < 0.01


def test_the_mlps_of_blocks_28_and_29_undo_it(smollm2, explosion):
    after = attribute(smollm2, TEXTS[0], layer=29, direction=explosion.direction)
    undo = after.table.nsmallest(2, "contribution")
    assert undo.component.tolist() == ["L28MLP", "L29MLP"]
    assert undo.contribution.sum() < -0.8 * explosion.norm
    neurons = attribute_neurons(smollm2, after, 28).table
    assert int(neurons.contribution.argmin()) == 678


def test_ablations_agree_on_the_writer_and_the_disagreement_is_said(smollm2, explosion):
    found = verify(smollm2, explosion, progress=False).faithfulness
    table = found.table.set_index("component")
    assert table.effect.idxmax() == "L11MLP"
    assert table.effect["L11MLP"] == pytest.approx(table.contribution["L11MLP"], rel=1e-3)
    assert table.effect["L9MLP"] > 0.5 * explosion.norm  # writes against it, and yet it is needed
    assert table.contribution["L9MLP"] < 0
    assert "disagree" in found.disagreement


def test_without_the_norm_the_sink_and_the_predictions_go(smollm2):
    zero = ablate(smollm2, TEXTS[:4], "L11MLP", progress=False)
    assert zero.after.watched_norm[11] < 0.02 * zero.before.watched_norm[11]
    assert zero.after.sinks[12:].mean() < 0.5 * zero.before.sinks[12:].mean()
    assert zero.after.perplexity > 3 * zero.before.perplexity
    # set to its mean at the initial token, which it hardly differs from, everything stays (Sun et al. 2024)
    mean = ablate(smollm2, TEXTS[:4], "L11MLP", "mean", where=0, progress=False)
    assert mean.after.perplexity == pytest.approx(mean.before.perplexity, rel=0.01)


def test_the_single_most_responsible_neuron(smollm2):
    zero = ablate(smollm2, TEXTS[:4], "L11N1229", progress=False)
    assert zero.after.watched_norm[11] < 0.4 * zero.before.watched_norm[11]
    assert zero.after.sinks.mean() == pytest.approx(float(zero.before.sinks.mean()), abs=0.03)  # a quarter suffices
    assert zero.after.perplexity < 1.2 * zero.before.perplexity


def test_the_word_makes_its_own_norm_at_a_non_initial_position(smollm2):
    """` the` explodes in block 2 wherever it comes from: its embedding restores it, no other position does."""
    found = patch(
        smollm2, "The man went to the sea.", "The man went to a sea.", sites=["resid_pre"], layer=2, position=4,
        progress=False,
    )  # fmt: skip
    assert found.clean_value > 5 * found.corrupted_value
    table = found.table.set_index(["layer", "position"]).restored
    assert table[0, 4] == pytest.approx(1, rel=1e-3)
    assert table.drop(index=[(layer, 4) for layer in range(3)]).abs().max() < 0.01
    assert found.approximation.largest_error[0] > 0.5  # the explosion is not linear


def test_a_sink_head_looks_at_the_first_token_and_brings_almost_nothing_from_it(smollm2):
    found = attribute(smollm2, TEXTS[0], 9, 20)
    heads = [attribute_sources(smollm2, found, 20, head).table for head in range(9)]
    sink = max(heads, key=lambda table: table.attention[0])
    assert sink.attention[0] > 0.8
    assert abs(sink.contribution[0]) < 0.01 * found.norm
    assert sink.attention.sum() == pytest.approx(1, abs=1e-5)
