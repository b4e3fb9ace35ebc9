import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import sd_lens
from sd_lens import figures
from sd_lens.errors import InputError
from sd_lens.explanations.attribution import Attribution, Faithfulness, component_columns
from sd_lens.explanations.components import Component
from sd_lens.explanations.drilling import NeuronAttribution, SourceAttribution
from sd_lens.explanations.patching import Patching
from sd_lens.explanations.sweep import AblationSweep
from sd_lens.figures.grids import component_heatmap, shown_share, signed_log, signed_log_ticks
from tests import tiny

# As GPT-2 has them: two blocks of three heads, an MLP, and a bias of each.
WRITERS = [
    Component("embedding"), Component("positional embedding"),
    *(
        component
        for layer in range(2)
        for component in [
            *(Component("head", layer, head) for head in range(3)), Component("attention bias", layer),
            Component("mlp", layer), Component("mlp bias", layer),
        ]
    ),
]  # fmt: skip
CONTRIBUTIONS = [3.0, -1.0, 0.01, -40.0, 7.0, 0.3, 23000.0, -2.0, 5.0, -600.0, 0.0, 1.0, -80.0, 0.5]
HOSTILE = "<b> &\n"


def attribution(tokens=("w1", "w2")):
    contribution = torch.tensor(CONTRIBUTIONS, dtype=torch.float64)
    total = float(contribution.sum()) + 1e-6  # as rounding leaves it
    table = component_columns(WRITERS).assign(contribution=CONTRIBUTIONS, share=(contribution / total).numpy())
    unit = torch.eye(4, dtype=torch.float64)[0]
    return Attribution(torch.arange(len(tokens)), tuple(tokens), 1, unit, total, total, 1e-10, table)


def unchanged(result, draw):
    """What `draw` returns, after a look that it left the result's table as it was."""
    before = result.table.copy(deep=True)
    figure = draw(result)
    pd.testing.assert_frame_equal(result.table, before)
    figure.to_json()
    return figure


@pytest.mark.parametrize("largest", [1, 5, 14, 100])
def test_waterfall_sums_to_the_total(largest):
    given = attribution()
    bars, labels = unchanged(given, lambda r: figures.contribution_waterfall(r, largest)).data
    *steps, total = bars.y
    assert math.fsum(steps) == pytest.approx(total, rel=1e-14)
    assert total == given.total
    assert list(bars.measure) == ["relative"] * len(steps) + ["total"]
    assert len(steps) == min(largest, len(WRITERS)) + 1
    assert f"{max(len(WRITERS) - largest, 0)} others" in bars.customdata[-2]
    # Each share stands above its bar, whichever way the bar goes.
    heights = np.cumsum([0.0, *steps])
    assert list(labels.y) == pytest.approx(np.maximum(heights[:-1], heights[1:]))


def test_waterfall_shows_the_largest_in_the_order_of_writing():
    figure = figures.contribution_waterfall(attribution(), 4)
    assert list(figure.layout.xaxis.ticktext) == ["L0H1", "L0MLP", "L1H1", "L1MLP", "everything else (10)", "total"]
    assert list(figure.data[0].y)[:4] == [-40.0, 23000.0, -600.0, -80.0]
    assert (
        figure.data[0].customdata[2] == f"L1H1<br>contribution -600<br>share {-600 / attribution().total * 100:.3g} %"
    )
    with pytest.raises(InputError, match="largest=0: at least one must be shown"):
        figures.contribution_waterfall(attribution(), 0)


def test_a_total_of_zero_has_no_shares():
    given = attribution()
    given = replace(given, total=0.0, table=given.table.assign(share=float("nan")))
    figure = figures.contribution_waterfall(given)
    assert "share undefined" in figure.data[0].customdata[0]
    assert set(figure.data[1].text) == {""}


def test_grid_shows_every_head_and_mlp_in_its_place():
    given = attribution()
    figure = unchanged(given, figures.contribution_heatmap)
    (trace,) = figure.data
    assert trace.z.shape == (2, 5)
    by_label = given.table.set_index("component").contribution
    for layer in range(2):
        for column, name in enumerate(["H0", "H1", "H2", None, "MLP"]):
            cell = trace.z[layer][column]
            if name is None:
                assert np.isnan(cell)  # the gap between heads and MLP
                continue
            number = by_label[f"L{layer}{name}"]
            assert cell == pytest.approx(np.sign(number) * np.log10(1 + abs(number)))
            assert trace.customdata[layer][column].startswith(f"L{layer}{name}<br>contribution ")
    everything = str(trace.customdata)
    assert "embed" not in everything
    assert "b_O" not in everything
    axis = figure.layout.coloraxis
    assert axis.cmax == -axis.cmin == pytest.approx(np.log10(23001))
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "MLP"]
    # The label of a column stands in the middle of its cell.
    middles = (np.array(trace.x[:-1]) + np.array(trace.x[1:])) / 2
    assert list(figure.layout.xaxis.tickvals) == pytest.approx(middles[[0, 1, 2, 4]])


def test_signed_logarithm():
    logs = signed_log(np.array([-99.0, 0.0, 9.0]), 1.0)
    np.testing.assert_allclose(logs, [-2, 0, 1])
    np.testing.assert_allclose(signed_log(np.array([-0.99, 0.0, 0.09]), 0.01), logs)


def test_ticks_are_the_real_numbers():
    for limit, unit in [(23000.0, 1.0), (18.0, 1.0), (0.4, 1.0), (1e9, 1.0), (0.97, 0.01)]:
        ticks = signed_log_ticks(limit, unit)
        numbers = np.array([float(text.replace(",", "")) for text in ticks["ticktext"]])
        assert ticks["tickvals"] == pytest.approx(signed_log(numbers, unit).tolist())
        assert 0 in numbers
        assert 3 <= len(numbers) <= 11
        assert limit / 100 < numbers.max() <= limit
    assert signed_log_ticks(23000.0)["ticktext"][-4:] == ["10", "100", "1,000", "10,000"]


def test_grid_of_zeros():
    table = component_columns(WRITERS).assign(x=0.0)
    axis = component_heatmap("zeros", table, "x", ["a"] * len(table), colour_title="").layout.coloraxis
    assert axis.cmax == -axis.cmin > 0


def test_corpus_attributions_are_drawn_from_means(tiny_llama):
    texts = torch.arange(3, 23).view(4, 5)
    found = sd_lens.attribute_corpus(tiny_llama, texts, layer=1, progress=False)
    figure = unchanged(found, figures.contribution_waterfall)
    *steps, total = figure.data[0].y
    assert math.fsum(steps) == pytest.approx(total)
    assert total == found.total
    assert "spread between tokens" in figure.data[0].customdata[0]
    row = found.table.set_index("component").loc["L1H2"]
    cell = figures.contribution_heatmap(found).data[0].customdata[1][2]
    assert cell.startswith("L1H2<br>")
    assert cell.endswith(f"spread between tokens {row.contribution_std:.4g}")


def test_neurons_largest_first(tiny_llama):
    given = sd_lens.attribute(tiny_llama, torch.arange(3, 9), 4, 1)
    neurons = sd_lens.attribute_neurons(tiny_llama, given, 1)
    (trace,) = unchanged(neurons, lambda r: figures.neuron_bars(r, 6)).data
    expected = neurons.table.reindex(neurons.table.contribution.abs().sort_values(ascending=False).index)[:6]
    assert list(trace.y) == expected.contribution.tolist()
    assert [label.split("<br>")[0] for label in trace.customdata] == [f"L1N{n}" for n in expected.neuron]
    assert f"activation {expected.activation.iloc[0]:.4g}" in trace.customdata[0]
    assert len(set(trace.marker.color)) == 1 + bool(
        (expected.contribution < 0).any() and expected.contribution.max() > 0
    )
    with pytest.raises(InputError, match="largest=0"):
        figures.neuron_bars(neurons, 0)


def test_sources_have_contribution_and_attention_from_the_same_zero():
    table = pd.DataFrame(
        {
            "position": range(3), "token": [HOSTILE, " a", "b"], "attention": [0.7, 0.1, 0.2],
            "contribution": [5.0, -1.0, 0.5], "share": [0.5, -0.1, float("nan")],
        }
    )  # fmt: skip
    sources = SourceAttribution(1, 2, 4.5, 0.0, table)
    figure = unchanged(sources, figures.source_map)
    bars, marks = figure.data
    assert list(bars.y) == [5.0, -1.0, 0.5]
    assert list(marks.y) == [0.7, 0.1, 0.2]
    assert marks.yaxis == "y2"
    (low, high), (low2, high2) = figure.layout.yaxis.range, figure.layout.yaxis2.range
    assert low / high == pytest.approx(low2 / high2)
    assert low < -1
    against = figures.source_map(replace(sources, table=table.assign(contribution=[-5.0, 1.0, 0.5])))
    assert against.layout.yaxis.range[0] < -5
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;\u00b7&amp;\\n", "\u00b7a", "b"]
    assert "<b>" not in str(figure)
    positive = figures.source_map(replace(sources, table=table.assign(contribution=[5.0, 1.0, 0.5])))
    assert positive.layout.yaxis.range[0] == positive.layout.yaxis2.range[0] == 0


def test_many_sources_have_no_room_for_names():
    table = pd.DataFrame({"position": range(65), "token": "w", "attention": 1 / 65, "contribution": 1.0, "share": 0.1})
    assert figures.source_map(SourceAttribution(0, 0, 65.0, 0.0, table)).layout.xaxis.ticktext is None


def test_the_attributed_token_is_escaped():
    for draw in (figures.contribution_waterfall, figures.contribution_heatmap):
        title = draw(attribution(tokens=("w1", HOSTILE))).layout.title.text
        assert "&lt;b&gt;" in title
        assert "<b>" not in title


def sweep(components=("L0H1", "L1MLP", "L0ATTN")):
    parsed = [Component.parse(c) for c in components]
    measured = {"norm": [110.0, 3.0, 90.0], "loss": [2.5, 9.0, 3.0], "sink": [0.4, 0.1, 0.3]}
    table = component_columns(parsed).assign(**{name: column[: len(parsed)] for name, column in measured.items()})
    return AblationSweep("zero", 1, {"norm": 100.0, "loss": 2.0, "sink": 0.4}, table)


@pytest.mark.parametrize(
    ("measure", "head", "mlp"), [("norm", 0.1, -0.97), ("loss", 0.5, 7.0), ("sink", 0.0, 0.1 - 0.4)]
)
def test_ablations_are_changes_and_what_was_not_swept_has_no_cell(measure, head, mlp):
    figure = unchanged(sweep(), lambda r: figures.ablation_heatmap(r, measure))
    (trace,) = figure.data
    assert trace.z.shape == (2, 4)
    there = {(0, 1): head, (1, 3): mlp}
    for place in np.ndindex(2, 4):
        if place in there:
            assert trace.z[place] == pytest.approx(signed_log(np.array([there[place]]), 0.01).item(), abs=1e-12)
        else:
            assert np.isnan(trace.z[place])
    assert trace.hoverongaps is False
    assert trace.customdata[0][1] == (
        "without L0H1<br>norm +10 %<br>loss +0.5 nats per token<br>attention on the first token 0"
    )
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin
    if measure == "norm":
        assert list(figure.layout.coloraxis.colorbar.ticktext)[-1] == "+30 %"


def test_sweeps_of_mlps_alone():
    trace = figures.ablation_heatmap(sweep(["L1MLP"])).data[0]
    assert trace.customdata[1][1].startswith("without L1MLP")


def test_sweeps_that_cannot_be_drawn():
    with pytest.raises(InputError, match=r"unknown measure 'x'; expected one of \('norm', 'loss', 'sink'\)"):
        tiny.unchecked(figures.ablation_heatmap)(sweep(), "x")
    with pytest.raises(InputError, match="no head and no MLP"):
        figures.ablation_heatmap(sweep(["L0ATTN"]))


def patching():
    """Two blocks, three positions, two heads; every number tells its place."""
    places = [("resid_pre", layer, position, pd.NA) for layer in range(2) for position in range(3)]
    places += [("z", layer, position, head) for layer in range(2) for position in range(3) for head in range(2)]
    table = pd.DataFrame(places, columns=["site", "layer", "position", "head"]).astype({"head": "Int64"})
    restored = table.layer + table.position / 10 + table["head"].fillna(0).astype(float) / 100
    table = table.assign(value=10 * restored, restored=restored, estimate=-3 * restored)
    return Patching("norm", ("w1", HOSTILE, "w3"), ("w1", "w2", "w3"), 10.0, 0.0, table)


def test_patching_by_block_and_position():
    figure = unchanged(patching(), figures.patching_heatmap)
    (trace,) = figure.data
    np.testing.assert_allclose(trace.z, [[0, 0.1, 0.2], [1, 1.1, 1.2]])
    estimate = figures.patching_heatmap(patching(), measure="estimate")
    np.testing.assert_allclose(estimate.data[0].z, -3 * trace.z)
    for drawn in (figure, estimate):  # one scale, so that the two can be compared
        assert (drawn.layout.coloraxis.cmin, drawn.layout.coloraxis.cmax) == (-1, 1)
    assert list(figure.layout.xaxis.ticktext) == ["w1", "&lt;b&gt;\u00b7&amp;\\n/w2", "w3"]
    assert trace.customdata[1][2] == ("block 1<br>token w3<br>position 2<br>restored 1.2<br>estimate -3.6<br>metric 12")
    assert "<b>" not in str(figure)


@pytest.mark.parametrize(("position", "tenths"), [(None, 0.2), (-1, 0.2), (0, 0.0), (-2, 0.1)])
def test_patched_heads_of_a_position(position, tenths):
    figure = figures.patching_heatmap(patching(), "z", position=position)
    np.testing.assert_allclose(figure.data[0].z, np.array([[0, 0.01], [1, 1.01]]) + tenths)
    assert figure.data[0].customdata[1][0].startswith("block 1, head 0<br>")
    assert figure.layout.title.text.endswith(f"heads at position {round(tenths * 10)}")


def test_patchings_that_cannot_be_drawn():
    with pytest.raises(InputError, match=r"site 'mlp_out' was not patched; expected one of \('resid_pre', 'z'\)"):
        figures.patching_heatmap(patching(), "mlp_out")
    with pytest.raises(InputError, match="unknown measure 'x'; expected 'restored' or 'estimate'"):
        tiny.unchecked(figures.patching_heatmap)(patching(), measure="x")
    with pytest.raises(InputError, match="position 3 does not exist: the texts have 3 tokens"):
        figures.patching_heatmap(patching(), "z", position=3)
    with pytest.raises(InputError, match="position=0 is for site 'z'; 'resid_pre' is shown at all positions"):
        figures.patching_heatmap(patching(), position=0)


def test_a_real_patching(tiny_llama):
    found = sd_lens.patch(
        tiny_llama, torch.tensor([3, 4, 5]), torch.tensor([3, 6, 5]), sites=("z",), layer=1, progress=False
    )
    (trace,) = figures.patching_heatmap(found, "z", position=1).data
    row = found.table.query("layer == 1 and position == 1 and head == 3").iloc[0]
    assert trace.z[1][3] == row.restored


def test_faithfulness_is_one_point_a_component():
    table = pd.DataFrame(
        {"component": ["L0H0", "L0MLP", "L1H0"], "contribution": [0.1, 900.0, -20.0], "effect": [-3.0, 5000.0, -20.0]}
    )
    found = Faithfulness(0.5, table, "zero", "")
    figure = unchanged(found, figures.faithfulness_scatter)
    line, heads, mlps = figure.data
    assert list(line.x) == list(line.y)
    np.testing.assert_allclose(heads.x, signed_log(np.array([0.1, -20.0])))
    np.testing.assert_allclose(heads.y, signed_log(np.array([-3.0, -20.0])))
    np.testing.assert_allclose(mlps.y, signed_log(np.array([5000.0])))
    assert mlps.customdata[0] == "L0MLP<br>contribution 900<br>effect 5,000"
    assert figure.layout.xaxis.range == figure.layout.yaxis.range
    assert figure.layout.xaxis.range[0] < min(*heads.x, *heads.y)
    assert figure.layout.title.text == "Contributions against zero ablation: rank correlation 0.50"
    undefined = figures.faithfulness_scatter(replace(found, rank_correlation=float("nan")))
    assert undefined.layout.title.text.endswith("rank correlation undefined")


def test_an_mlp_of_few_neurons_can_be_drawn():
    table = pd.DataFrame({"neuron": [0], "activation": [1.0], "contribution": [0.0], "share": [float("nan")]})
    figure = figures.neuron_bars(NeuronAttribution(0, 0.0, 0.0, table))
    assert "share undefined" in figure.data[0].customdata[0]
    assert shown_share(0.99765) == "99.8 %"
