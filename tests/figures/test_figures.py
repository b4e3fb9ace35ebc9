from dataclasses import replace

import pytest
import torch

from sd_lens import DefectEigenvalues, figures, find_high_norm_tokens, scan_norms, singular_defects
from sd_lens.figures.style import shown_number, shown_token
from tests import planted, tiny

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")


@pytest.fixture(scope="module")
def results():
    defect = planted.llama()
    model = tiny.wrap(defect.hf_model, "auto")
    return find_high_norm_tokens(model, defect.texts, progress=False), singular_defects(model, progress=False)


def test_surface_and_heatmap_show_every_norm_and_the_token(results):
    text = results[0].scan.samples[0]
    for figure in (figures.norm_surface(text), figures.norm_heatmap(text)):
        (trace,) = figure.data
        torch.testing.assert_close(torch.tensor(trace.z, dtype=torch.float64), text.norms.log10())
        assert list(trace.customdata[0]) == list(text.tokens)
        assert trace.text[2][0] == shown_number(float(text.norms[2, 0]))
        assert "token %{customdata}" in trace.hovertemplate
        assert trace.colorscale[0][1] == "#00224e"  # Cividis begins so
        assert figure.layout.title.text


def test_per_layer_norms_are_logarithmic_with_marks(results):
    found = results[0]
    figure = figures.layer_norms(found)
    assert figure.layout.yaxis.type == "log"
    assert "0-based" in figure.layout.xaxis.title.text
    maximum = next(t for t in figure.data if t.name.startswith("maximum"))
    assert list(maximum.y) == found.scan.maximum.tolist()
    assert {a.text for a in figure.layout.annotations} == {"explosion 2", "decay 4"}
    curves = {t.name: list(t.y) for t in figure.data}
    assert curves["median, initial tokens"] == found.scan.initial_median.tolist()
    assert curves["median, other tokens"] == found.scan.ordinary_median.tolist()
    assert curves["median, non-initial high-norm tokens"] == found.non_initial.median.tolist()
    assert curves["threshold"] == [None if t == float("inf") else t for t in found.threshold.tolist()]


def test_angles_are_the_results(results):
    found, defects = results
    figure = figures.direction_angles(
        defects, found.direction, explosion_layers=found.explosion_layers, decay_layers=found.decay_layers
    )
    assert list(figure.data[0].y) == defects.angles_to(found.direction).tolist()
    assert list(figure.data[0].x) == list(range(planted.N_LAYERS))
    assert "degrees" in figure.layout.yaxis.title.text
    assert len(figure.layout.shapes) == 2


def test_singular_values_are_the_results(results):
    defects = results[1]
    figure = figures.singular_values(defects)
    assert list(figure.data[0].y) == defects.block.values.tolist()
    assert [t.name for t in figure.data] == ["block L", "MLP F", "attention A", "gap s1/s2 of L"]
    some = replace(defects, layers=(7, 8, 9, 10, 11, 12))
    for drawn in (figures.singular_values(some), figures.direction_angles(some, defects.block.left[0])):
        assert all(list(trace.x) == [7, 8, 9, 10, 11, 12] for trace in drawn.data)


def test_a_model_without_high_norm_tokens_can_be_drawn(tiny_llama):
    found = find_high_norm_tokens(tiny_llama, torch.arange(3, 43).view(4, 10), progress=False)
    figure = figures.layer_norms(found)
    assert not figure.layout.annotations


HOSTILE = "<script>alert(1)</script><b> &\n"


def test_token_text_is_escaped(monkeypatch, tiny_llama):
    monkeypatch.setattr(type(tiny_llama.tokenizer), "decode", lambda *_: HOSTILE)
    text = scan_norms(tiny_llama, torch.arange(3, 9), progress=False).samples[0]
    assert text.tokens[0] == HOSTILE
    for figure in (figures.norm_surface(text), figures.norm_heatmap(text)):
        assert "<script>" not in "".join(map(str, figure.data[0].customdata[0]))
        assert "<b>" not in str(figure.layout)


def test_shown_tokens_and_numbers():
    assert shown_token(" a\n\t<b>&") == "\u00b7a\\n\\t&lt;b&gt;&amp;"
    assert [shown_number(x) for x in (23517.6, 999.96, 0.01234567)] == ["23,518", "1000", "0.01235"]


def test_eigenvalues_are_drawn_on_a_signed_logarithm_with_their_angles():
    found = DefectEigenvalues(
        layers=(1, 2),
        eigenvalue=torch.tensor([-99 + 5j, 9], dtype=torch.complex128),
        angle=torch.tensor([3.0, 80], dtype=torch.float64),
        rayleigh=torch.tensor([-999.0, 0], dtype=torch.float64),
        linearization="gaussian",
    )
    figure = figures.eigenvalues(found, explosion_layers=[2], decay_layers=[1])
    real, rayleigh, angle = figure.data
    assert list(real.y) == pytest.approx([-2, 1])
    assert list(rayleigh.y) == pytest.approx([-3, 0])
    assert (list(real.text), list(angle.y), angle.yaxis) == (["-99", "9"], [3, 80], "y2")
    assert {a.text for a in figure.layout.annotations} == {"explosion 2", "decay 1"}
