import math
from dataclasses import replace

import pytest

from sd_lens import quantization_report, write_report
from sd_lens.report.rounding import rounding_figures, rounding_sentences
from tests import planted

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")


@pytest.fixture(scope="module")
def report(model, found):
    return quantization_report(model, planted.llama().texts[:4], found, n_controls=1, progress=False)


def test_sentences_carry_the_results_numbers(report, found):
    table = report.table.assign(perplexity=[10.0, 20, 12, 19, 18, 17, 11], gap_closed=[1, 0, 0.8, 0.1, 0.2, 0.3, 0.9])
    sparing, others, outliers = rounding_sentences(replace(report, table=table))
    assert (
        "perplexity 10 in full precision, 20 with every linear layer rounded, 12 with the W_out of blocks 2 and 4"
        in (sparing)
    )
    assert sparing.endswith("80 % of the gap closed.")
    assert others == (
        "For comparison, of the gap, sparing as many other blocks at best closes 10 % and SmoothQuant by itself closes "
        "30 %."
    )
    assert "largest outliers in block" in outliers
    assert len(rounding_figures(report, found)) == 2


def test_without_a_gap_or_comparisons_nothing_is_invented(report):
    table = report.table[report.table.kind.isin(["full", "rounded", "spared"])].assign(gap_closed=math.nan)
    sentences = rounding_sentences(replace(report, table=table))
    assert len(sentences) == 2
    assert sentences[0].endswith("rounding costs next to nothing.")


def test_a_report_measures_quantization_on_request(model, tmp_path):
    sentences = write_report(model, tmp_path / "r.html", planted.llama().texts, quantize=True, progress=False)
    assert sum(sentence.startswith("Quantization (W8A8") for sentence in sentences) == 1
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count("<figure>") == 25


def test_nothing_to_spare_is_no_error(tiny_llama, tmp_path):
    texts = planted.llama().texts[:2]
    sentences = write_report(tiny_llama, tmp_path / "r.html", texts, quantize=True, progress=False)
    assert sum(sentence.startswith("Quantization was not measured") for sentence in sentences) == 1
