"""The report as a reader sees it: opened in headless Chromium."""

import re
import subprocess

import pytest

from sd_lens import write_report
from tests import planted, tiny
from tests.report.browser import CHROMIUM, visit

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning"),
]


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    model = tiny.wrap(planted.llama().hf_model, "auto", with_tokenizer=True)
    write_report(model, folder / "report.html", planted.llama().texts, progress=False)
    return visit(folder / "report.html", folder)


def test_every_figure_is_drawn(visited):
    figures = re.split(r'<div id="figure-\d+"', visited.dom)[1:]
    assert len(figures) == 23
    for figure in figures:
        assert "main-svg" in figure
    assert sum('class="gl-container"' in f and "<canvas" in f for f in figures) == 1  # the surface
    assert "WebGL is not supported" not in visited.dom
    assert figures[0].count('class="js-line"') >= 3  # curves, not only axes
    assert 'class="hm"' in visited.dom  # the heatmap


def test_nothing_is_written_to_the_console(visited):
    assert visited.console == []


def test_nothing_is_asked_of_the_network(visited):
    assert visited.requests == []


def test_the_checks_themselves_can_fail(tmp_path):
    """A page with an error, a request and no figure is seen as such."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>nonsense.call()</script>")
    seen = visit(page, tmp_path)
    assert any("nonsense is not defined" in line for line in seen.console)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert "main-svg" not in seen.dom
    assert subprocess.run([CHROMIUM, "--version"], capture_output=True, check=True).stdout
