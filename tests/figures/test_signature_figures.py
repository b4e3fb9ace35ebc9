import math

import pytest
import torch

from sd_lens import SignatureTrajectory, figures, lineage
from sd_lens.applications.lineage import lineage as compared
from tests.applications.test_lineage import made


@pytest.fixture(scope="module")
def found():
    """Two of one base, one of another, one of another width, one without a direction."""
    generator = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 64, generator=generator)
    return lineage(
        {
            "a<b>": made(base),
            "other": made(other),
            "tuned": made(base + 0.05 * torch.randn(64, generator=generator)),
            "wide": made(torch.randn(100, generator=generator)),
            "wide tuned": made(-torch.randn(100, generator=torch.Generator().manual_seed(0))),
            "none": made(None, d_model=64),
        }
    )


def test_the_heatmap_shows_every_angle_and_kin_side_by_side(found):
    figure = figures.lineage_heatmap(found)
    (trace,) = figure.data
    assert list(trace.x) == list(trace.y) == ["a&lt;b&gt;", "tuned", "other", "wide", "wide tuned", "none"]
    for i, one in enumerate(found.order):
        for j, other in enumerate(found.order):
            expected = float(found.angles[one, other])
            assert trace.z[i][j] == (None if math.isnan(expected) else expected)
    assert trace.customdata[0][1].startswith("a&lt;b&gt;<br>tuned<br>related<br>")
    assert "largest channels shared" in trace.customdata[0][1]
    assert trace.customdata[0][3] == "a&lt;b&gt;<br>wide<br>not comparable"
    assert figure.layout.yaxis.autorange == "reversed"
    figure.to_json()


def test_the_dendrogram_links_at_the_angles_and_shows_each_widths_threshold(found):
    figure = figures.lineage_dendrogram(found)
    links = [trace for trace in figure.data if trace.line.dash is None]
    assert [trace.y[1] for trace in links] == [merge.height for merge in found.merges]
    heights = {frozenset(m.left + m.right): m.height for m in found.merges}
    assert heights[frozenset((0, 2))] == float(found.angles[0, 2])
    assert len(links) == 3
    related = next(trace for trace in links if trace.y[1] == float(found.angles[0, 2]))
    assert list(related.x) == [0, 0, 1, 1]
    assert (related.y[0], related.y[-1]) == (0, 0)
    across = next(trace for trace in links if 0.5 in trace.x)
    assert across.line.color != related.line.color
    lines = {trace.y[0]: (min(trace.x), max(trace.x)) for trace in figure.data if trace.line.dash == "dot"}
    assert sorted(lines) == sorted(found.table.threshold.dropna().unique())
    assert sorted(lines.values()) == [(-0.4, 2.4), (2.6, 4.4)]
    assert list(figure.layout.xaxis.ticktext)[:2] == ["a&lt;b&gt;", "tuned"]


def test_a_lineage_of_nothing_comparable_is_drawn_without_links():
    figure = figures.lineage_dendrogram(compared({"a": made(torch.ones(64)), "b": made(torch.ones(65))}))
    assert not figure.data
    figure = figures.lineage_heatmap(compared({"a": made(None, d_model=4), "b": made(torch.ones(65))}))
    assert [list(row) for row in figure.data[0].z] == [[None, None], [None, 0.0]]


def test_the_trajectory_shows_norms_and_angles():
    signatures = tuple(made(torch.ones(64)) for _ in range(3))
    trajectory = SignatureTrajectory(
        ("step 0", "step <1>", "2"), signatures, torch.tensor([math.nan, 12.0, 0.0], dtype=torch.float64)
    )
    figure = figures.signature_trajectory(trajectory)
    norms, angles = figure.data
    assert list(norms.x) == ["step 0", "step &lt;1&gt;", "2"]
    assert list(norms.y) == [9.0, 9.0, 9.0]
    assert list(angles.y) == [None, 12.0, 0.0]
    assert angles.yaxis == "y2"
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("category", "log")
    figure.to_json()
