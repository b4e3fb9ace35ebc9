from dataclasses import replace

import pytest
import torch

from sd_lens import figures, massive_activations, sinks_without, super_weights
from sd_lens.errors import InputError
from tests import planted, tiny


@pytest.fixture(scope="module")
def sunk():
    defect = planted.sink()
    model = tiny.wrap(defect.hf_model, "auto")
    return sinks_without(model, defect.texts, planted.EXPLOSION, defect.direction, [str(planted.TOKEN)], progress=False)


@pytest.fixture(scope="module")
def massive_model():
    defect = planted.through_one_weight(planted.llama())
    return tiny.wrap(defect.hf_model, "auto"), defect.texts


def test_every_head_has_a_cell_and_every_sink_a_dot(sunk):
    first, watched = (figures.sink_map(sunk.before, measure) for measure in ("first", "watched"))
    torch.testing.assert_close(torch.tensor(first.data[0].z), sunk.before.on_first)
    torch.testing.assert_close(torch.tensor(watched.data[0].z), sunk.before.watched_received)
    assert (list(first.data[1].x), list(first.data[1].y)) == ([], [])
    assert (list(watched.data[1].x), list(watched.data[1].y)) == ([planted.SINK_HEAD], [planted.SINK_LAYER])
    assert watched.layout.title.text == "Mean attention on a watched token: a sink in 4.2 % of heads"
    assert (watched.data[0].zmin, watched.data[0].zmax) == (0, 1)
    assert "0-based" in first.layout.xaxis.title.text
    with pytest.raises(InputError, match="unknown measure 'x'; expected 'first' or 'watched'"):
        tiny.unchecked(figures.sink_map)(sunk.before, "x")


def test_keys_and_values_of_both_groups_are_drawn(sunk):
    figure = figures.key_value_norms(sunk.before)
    curves = {trace.name: list(trace.y) for trace in figure.data}
    expected = {
        "keys of watched tokens": sunk.before.watched_key_norm,
        "keys of other tokens": sunk.before.other_key_norm,
        "values of watched tokens": sunk.before.watched_value_norm,
        "values of other tokens": sunk.before.other_value_norm,
    }
    assert list(curves) == list(expected)
    for name, norms in expected.items():
        assert curves[name] == pytest.approx(norms.mean(dim=1).tolist())
    assert figure.layout.yaxis.type == "log"
    figure.to_json()


def test_sinks_before_and_after_are_shares_of_heads(sunk):
    figure = figures.sinks_before_and_after(sunk)
    before, after = figure.data
    for trace, sinks in ((before, sunk.before), (after, sunk.after)):
        assert list(trace.y) == (sinks.on_first > 0.3).double().mean(dim=1).tolist()
        assert list(trace.customdata) == pytest.approx(sinks.on_first.mean(dim=1).tolist())
    assert [shape.x0 for shape in figure.layout.shapes] == [planted.EXPLOSION]
    assert "L2MLP" in figure.layout.title.text


def test_massive_channels_and_both_criteria(massive_model):
    found = massive_activations(*massive_model, progress=False)
    figure = figures.massive_channels(found)
    channel, usual, relative, median = figure.data
    assert channel.name == f"channel {planted.CHANNEL}"
    assert list(channel.y)[: planted.EXPLOSION] == [None] * planted.EXPLOSION
    assert list(channel.y)[planted.EXPLOSION :] == pytest.approx(found.largest[planted.EXPLOSION :].tolist())
    assert list(usual.y) == found.usual_threshold.tolist()
    assert list(relative.y) == [t if t < float("inf") else None for t in found.threshold.tolist()]
    assert list(median.y) == found.median.tolist()
    assert figure.layout.title.text == "Massive activations in 1 of 64 channels"
    many = found.table.loc[[0] * 7].assign(channel=range(7))
    shown = figures.massive_channels(replace(found, table=many))
    assert len(shown.data) == 8
    assert shown.layout.title.text.endswith("in 7 of 64 channels, 5 shown")
    nothing = figures.massive_channels(replace(found, table=found.table[:0]))
    assert len(nothing.data) == 3


def test_neurons_add_up_and_zeroed_norms_are_the_measured_ones(massive_model):
    model, texts = massive_model
    found = super_weights(
        model, texts[:3], planted.EXPLOSION, [str(planted.TOKEN)], neurons=2, entries=3, progress=False
    )
    (line,) = figures.write_sparsity(found).data
    assert list(line.x) == list(range(1, 49))
    assert list(line.y) == found.cumulative.tolist()
    assert line.customdata[0].endswith("L2N3")
    assert line.customdata[2] == ""
    assert "1 of 48 neurons write 99 %" in figures.write_sparsity(found).layout.title.text
    figure = figures.zeroed_norms(found)
    neurons, weights = figure.data
    assert list(neurons.y) == found.neurons.norm.tolist()
    assert list(weights.y) == found.entries.norm.tolist()
    assert list(weights.x) == [2, 3, 4]
    assert list(figure.layout.xaxis.ticktext)[2] == f"L2N3C{planted.CHANNEL}"
    assert weights.customdata[0].startswith(f"without L2N3C{planted.CHANNEL}<br>norm ")
    assert figure.layout.shapes[0].y0 == found.before["norm"]
    figure.to_json()
