import re

import pandas as pd
import pytest
import torch

from sd_lens import find_high_norm_tokens, singular_defects, write_report
from sd_lens.errors import InputError
from sd_lens.figures.style import shown_number
from sd_lens.report.findings import findings
from sd_lens.report.page import Page
from tests import planted, tiny

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")


@pytest.fixture(scope="module")
def model():
    return tiny.wrap(planted.llama().hf_model, "auto", with_tokenizer=True)


def test_the_report_is_one_file_with_sentences_figures_table_and_settings(model, tmp_path):
    path = tmp_path / "r.html"
    sentences = write_report(model, path, planted.llama().texts, progress=False)
    page = path.read_text(encoding="utf-8")
    assert all(sentence in page for sentence in sentences)
    assert page.count("<figure>") == 23
    assert len(re.findall(r"!function\(|plotly\.js v", page)) >= 1
    assert page.count("plotly.js v") == 1  # the script, once
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)  # nothing from elsewhere
    assert "<td>transformer-lens</td>" in page
    assert "<code>w4</code>" in page  # token 7, by name
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_sentences_carry_the_results_numbers(model):
    found = find_high_norm_tokens(model, planted.llama().texts, progress=False)
    defects = singular_defects(model, progress=False)
    text = " ".join(findings(found, defects))
    assert "480 tokens of 40 texts were run, without a beginning-of-sequence token" in text
    assert "Exploding norms: 4 of 40 initial tokens, and 36 tokens at other positions, most often 'w4' (36x)." in text
    assert "The norm explodes in block 2 and decays in block 4 (0-based)." in text
    growth = float(found.non_initial.growth[2])
    before, after = (shown_number(float(found.non_initial.median[layer])) for layer in (1, 2))
    assert (
        f"Block 2: the norm of the non-initial high-norm tokens grows {growth:,.3g}x (median of 36), "
        f"from {before} to {after} (medians before and after)." in text
    )
    fall = 100 * float(found.initial.growth[4])
    assert 0.5 < fall < 60
    assert f"Block 4: the norm of the initial tokens falls to {fall:.0f} % (median of 4)" in text
    elsewhere = sorted(defects.angles_to(found.direction)[[0, 1, 3, 5]].tolist())
    assert f"In the other 4 blocks that angle is {elsewhere[0]:.1f} to {elsewhere[-1]:.1f} degrees" in text
    assert f"{float(defects.angles_to(found.direction)[2]):.1f} degrees at block 2 (explosion;" in text
    assert f"Their mean pairwise angle is {found.pairwise_angle:.1f}".lower() in text.lower()


def test_no_high_norm_tokens_is_said_plainly(tiny_llama, tmp_path):
    sentences = write_report(tiny_llama, tmp_path / "r.html", torch.arange(3, 43).view(4, 10), progress=False)
    assert any(s.startswith("No high-norm tokens were found") for s in sentences)
    assert "<p>None.</p>" in (tmp_path / "r.html").read_text()


def test_hostile_tokens_and_names_are_escaped(tmp_path):
    hostile = "</td><script>alert(1)</script>"
    table = pd.DataFrame({"text": [0], "position": [1], "token": [hostile], "layer": [2], "norm": [3.0]})
    page = Page(hostile, hostile, [], [], table, {hostile: hostile}).to_html()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") == 6


def test_layers_of_a_token_are_written_as_ranges():
    table = pd.DataFrame(
        {"text": 0, "position": 1, "token": "x", "layer": [2, 3, 4, 11, 13, 14], "norm": [3.0, 9, 3, 3, 3, 3]}
    )
    assert "<td>2-4, 11, 13-14</td>" in Page("t", "s", [], [], table, {}).to_html()


def test_an_unwritable_report_is_noticed_before_the_work(model, tmp_path, monkeypatch):
    import sd_lens.report.writing as writing

    monkeypatch.setattr(writing, "singular_defects", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(InputError, match="cannot write"):
        write_report(model, tmp_path / "nowhere" / "r.html", ["w0"], progress=False)


def test_a_failing_run_leaves_no_file(model, tmp_path):
    with pytest.raises(InputError, match="there are no texts"):
        write_report(model, tmp_path / "r.html", [], progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_table_shows_the_largest_norms_first_and_says_what_it_leaves_out():
    table = pd.DataFrame(
        {"text": range(250), "position": 1, "token": [f"t{i}" for i in range(250)], "layer": 2, "norm": range(10, 260)}
    ).astype({"norm": float})
    page = Page("t", "s", [], [], table, {}).to_html()
    shown = re.findall(r"<code>t(\d+)</code>", page)
    assert shown == [str(i) for i in range(249, 49, -1)]
    assert "The 50 tokens with smaller norms are left out here." in page
