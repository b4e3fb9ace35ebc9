"""SmolLM2's attention sinks, massive activations and super weights, and how they hang together."""

import pytest

from sd_lens import default_texts, find_high_norm_tokens, massive_activations, sinks_without, super_weights

pytestmark = pytest.mark.real_model
TEXTS = default_texts()[:4]


@pytest.fixture(scope="module")
def found(smollm2):
    return find_high_norm_tokens(smollm2, TEXTS, max_length=64, progress=False)


def test_sinks_come_with_the_norm_and_go_with_the_write_of_block_11(smollm2, found):
    change = sinks_without(smollm2, TEXTS, 11, found.direction, progress=False)
    before, after = (sinks.by_layer() for sinks in (change.before, change.after))
    assert before.on_first[3:10].min() > 0.3
    assert before.on_first[10:12].max() < 0.1
    assert before.on_first[12:].min() > 0.3
    assert (before.watched_value_norm < 0.5 * before.other_value_norm)[12:29].all()
    assert after.sink[12:].mean() < 0.25 * before.sink[12:].mean()
    assert after.sink[:12].tolist() == before.sink[:12].tolist()


def test_the_sinks_between_block_2_and_its_decay_do_not_need_its_write(smollm2, found):
    change = sinks_without(smollm2, TEXTS, 2, found.direction, progress=False)
    table = change.by_layer()
    assert table.sink_after[3:9].mean() > 0.8 * table.sink_before[3:9].mean()


def test_two_channels_carry_the_norm(smollm2):
    massive = massive_activations(smollm2, TEXTS, max_length=64, progress=False)
    table = massive.table
    for layer in range(11, 28):
        largest = table[(table.layer == layer) & (table.channel == 507) & table.absolute & table.relative]
        assert sorted(largest.text) == list(range(4))
        assert set(largest.position) == {0}
        assert massive.watched_channels[layer] < 4
        assert massive.other_channels[layer] > 250
    block_2 = table[table.layer == 2]
    assert block_2.absolute.sum() <= 2  # just below 1000 medians
    assert set(block_2[block_2.position == 0].text) == set(range(4))


def test_a_single_weight_harms_more_than_its_neuron(smollm2):
    result = super_weights(smollm2, TEXTS, 11, neurons=1, entries=1, max_length=32, progress=False)
    assert result.n_neurons == 2
    (neuron,), (entry,) = (list(table.itertuples()) for table in (result.neurons, result.entries))
    assert (neuron.component, entry.component) == ("L11N1229", "L11N1229C507")
    assert result.without["norm"] < 0.02 * result.before["norm"]
    assert max(neuron.norm, entry.norm) < 0.4 * result.before["norm"]
    assert entry.loss > result.before["loss"] + 1
    assert neuron.loss < result.before["loss"] + 0.3
