import math

import pytest
import torch

from sd_lens import QuantizationScheme, perplexity, quantization_report, quantize, smoothing_factors
from sd_lens.errors import InputError
from tests import planted, tiny

SPARED = planted.OUTLIERS
SCHEME = QuantizationScheme(8, 6)


@pytest.fixture(scope="module")
def planted_outliers():
    return planted.llama_with_outliers()


@pytest.fixture(scope="module")
def model(planted_outliers):
    return tiny.wrap(planted_outliers[0], "auto")


@pytest.fixture(scope="module")
def texts(planted_outliers):
    return planted_outliers[1]


@pytest.fixture(scope="module")
def report(model, texts):
    return quantization_report(model, texts, SPARED, scheme=SCHEME, n_controls=4, progress=False)


def test_sparing_the_planted_blocks_closes_the_gap_and_other_blocks_do_not(report):
    assert report.rounded_perplexity > report.full_perplexity
    assert report.gap_closed > 0.8
    assert report.best_control < 0.2


def test_every_row_is_what_its_method_gives(model, texts, report):
    table = report.table.set_index("method")
    assert list(table.kind) == ["full", "rounded", "spared", *["control"] * 4, "smoothed", "smoothed", "both"]
    assert table.perplexity["full precision"] == perplexity(model, texts, progress=False).value
    factors = smoothing_factors(model, texts, progress=False)
    with_W_out = smoothing_factors(model, texts, reads=("attention", "mlp", "neurons"), progress=False)
    for method, layers, smoothing in (
        ("round to nearest", (), None), ("spared", SPARED, None), ("control 1", table.layers["control 1"], None),
        ("SmoothQuant", (), factors), ("SmoothQuant, W_out too", (), with_W_out),
        ("SmoothQuant and spared", SPARED, factors),
    ):  # fmt: skip
        with quantize(model, layers, scheme=SCHEME, smoothing=smoothing):
            found = perplexity(model, texts, progress=False)
        assert table.perplexity[method] == pytest.approx(found.value, rel=1e-5), method
        assert table.loss[method] == pytest.approx(found.loss, rel=1e-5)
        assert table.layers[method] == layers
        assert table.n_spared[method] == len(layers)
    assert report.n_predicted == 10 * 15


def test_shares_are_of_the_gap_and_of_the_weights(report):
    table = report.table
    gap = report.rounded_perplexity - report.full_perplexity
    expected = ((report.rounded_perplexity - table.perplexity) / gap).tolist()
    assert table.gap_closed.tolist() == pytest.approx(expected)
    assert table.gap_closed[0] == 1
    assert table.gap_closed[1] == 0
    assert report.gap_closed == table.gap_closed[2]
    assert report.best_control == table[table.kind == "control"].gap_closed.max()
    assert report.best_smoothing == table[table.kind == "smoothed"].gap_closed.max()
    # Of a block: 32 x 32 for queries and outputs, 32 x 16 for keys and values, and three times 32 x 48.
    assert table.n_parameters[2] == 2 * 32 * 48
    assert table.parameter_share[2] == pytest.approx(2 * 48 / (planted.N_LAYERS * (2 * 32 + 2 * 16 + 3 * 48)))
    assert report.spared.modules == ("model.layers.2.mlp.down_proj", "model.layers.4.mlp.down_proj")


def test_controls_are_other_blocks(report):
    controls = report.table[report.table.kind == "control"].layers
    assert len(set(controls)) == 4
    assert all(len(layers) == 2 and not set(layers) & set(SPARED) for layers in controls)


def test_the_reason_is_among_the_results(report):
    outliers = report.outliers.table.set_index("layer").ratio
    assert set(outliers.nlargest(2).index) == set(SPARED)


def test_it_reads_in_one_line(report):
    said = str(report)
    assert said.startswith("QuantizationReport (W8A6, weights per tensor, activations per tensor): perplexity ")
    assert "with W_out of blocks (2, 4) spared" in said
    assert "\n" not in said


def test_smoothing_controls_and_calibration_can_be_chosen(model, texts):
    short = quantization_report(model, texts[:3], SPARED, n_controls=0, alpha=None, window=6, progress=False)
    assert list(short.table.kind) == ["full", "rounded", "spared"]
    assert math.isnan(short.best_control)
    assert math.isnan(short.best_smoothing)
    assert short.n_predicted == 3 * 13  # of sixteen tokens, three begin a chunk
    assert short.outliers.n_tokens == 3 * 16
    assert str(short).endswith("of the gap closed")
    options = {"n_controls": 0, "scheme": QuantizationScheme(4, 4), "progress": False}
    one = quantization_report(model, texts[:3], SPARED, **options)
    other = quantization_report(model, texts[:3], SPARED, calibration=texts[5:], **options)
    smoothed = one.table.kind == "smoothed"
    assert one.table[~smoothed].perplexity[:3].equals(other.table[~smoothed].perplexity[:3])
    assert not one.table[smoothed].perplexity.equals(other.table[smoothed].perplexity)


def test_without_a_gap_there_is_no_share(model, texts):
    found = quantization_report(
        model, texts[:2], [0], scheme=QuantizationScheme(None, None), n_controls=0, alpha=None, progress=False
    )
    assert found.table.perplexity.nunique() == 1
    assert math.isnan(found.gap_closed)
    assert str(found).endswith("spared: there is no gap to close")
    little = quantization_report(
        model, texts[:2], [0], scheme=QuantizationScheme(12, 12), n_controls=0, alpha=None, progress=False
    )
    assert little.rounded_perplexity != little.full_perplexity
    assert math.isnan(little.gap_closed)


def test_texts_are_read_once(model, texts):
    found = quantization_report(model, (text for text in texts[:2]), SPARED, n_controls=1, alpha=None, progress=False)
    assert torch.isfinite(torch.tensor(found.table.perplexity.tolist())).all()


def test_bad_arguments_are_named(model, texts):
    with pytest.raises(InputError, match="spare is empty: name at least one block"):
        quantization_report(model, texts, ())
    with pytest.raises(InputError, match="n_controls=-1: expected 0 or more"):
        quantization_report(model, texts, SPARED, n_controls=-1)
    with pytest.raises(InputError, match="window=0: expected 2 to"):
        quantization_report(model, texts, SPARED, window=0)
