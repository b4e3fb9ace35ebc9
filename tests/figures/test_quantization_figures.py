import math

import pandas as pd
import pytest

from sd_lens import ActivationOutliers, QuantizationReport, QuantizationScheme, SpareList, SparingSearch, figures

OUTLIERS = ActivationOutliers(
    pd.DataFrame(
        {
            "layer": [0, 1, 2], "absmax": [5.0, 3000.0, 2.0], "median": [0.5, 0.1, 0.0],
            "ratio": [10.0, 30000.0, math.inf], "neuron": [3, 7, 1], "text": [0, 1, 0], "position": [4, 0, 2],
            "token": [" a", "<b>", "c"],
        }
    ),
    n_tokens=12,
)  # fmt: skip
SPARED = SpareList((1,), ("model.layers.1.mlp.down_proj",), 100, 0.05)
REPORT = QuantizationReport(
    pd.DataFrame(
        {
            "method": ["full precision", "round to nearest", "spared", "control 1", "SmoothQuant", "both of them"],
            "kind": ["full", "rounded", "spared", "control", "smoothed", "both"],
            "layers": [(), (), (1,), (0,), (), (1,)],
            "perplexity": [10.0, 110.0, 30.0, 105.0, 60.0, 20.0],
            "loss": [2.3, 4.7, 3.4, 4.65, 4.1, 3.0], "gap_closed": [1.0, 0.0, 0.8, 0.05, 0.5, 0.9],
            "n_spared": [0, 0, 1, 1, 0, 1], "n_parameters": [0, 0, 100, 100, 0, 100],
            "parameter_share": [0, 0, 0.05, 0.05, 0, 0.05],
        }
    ),
    SPARED, QuantizationScheme(), OUTLIERS, n_predicted=11,
)  # fmt: skip
SEARCH = SparingSearch(
    pd.DataFrame(
        {
            "layer": [0, 1, 2], "forecast": [0.01, 0.4, 0.02], "alone": [0.001, 0.2, 0.0], "forecast_rank": [3, 1, 2],
            "alone_rank": [2, 1, 3],
        }
    ),
    pd.DataFrame({"n_spared": [0], "layer": pd.array([None], dtype="Int64"), "divergence": [0.9]}),
    QuantizationScheme(), n_tokens=12,
)  # fmt: skip


def test_bars_are_the_reports_perplexities_with_their_shares():
    figure = figures.quantization_bars(REPORT)
    figure.to_json()
    (bars,) = figure.data
    assert list(bars.y) == REPORT.table.method.tolist()
    assert list(bars.x) == REPORT.table.perplexity.tolist()
    assert bars.text[0] == "10"
    assert bars.text[2] == "30 (80.0 % of the gap closed)"
    assert bars.customdata[2] == "W_out spared in block 1"
    assert bars.customdata[0] == "W_out spared in no block"
    assert len(set(bars.marker.color)) == 6  # one for each kind
    assert "W8A8" in figure.layout.title.text
    assert figure.layout.yaxis.autorange == "reversed"


def test_a_report_without_a_gap_has_no_shares():
    table = REPORT.table.assign(gap_closed=math.nan, perplexity=[10.0, 10.0, 10.0, 10.0, math.inf, 10.0])
    figure = figures.quantization_bars(QuantizationReport(table, SPARED, QuantizationScheme(), OUTLIERS, 11))
    figure.to_json()
    assert figure.data[0].text[2] == "10"
    assert figure.data[0].text[4] == "inf"


def test_sensitivity_is_measured_and_forecast_on_two_logarithms():
    figure = figures.rounding_sensitivity(SEARCH, explosion_layers=[1, 7], decay_layers=[2])
    figure.to_json()
    measured, forecast = figure.data
    assert list(measured.x) == list(forecast.x) == [0, 1, 2]
    assert list(measured.y) == [0.001, 0.2, None]  # 0 has no place on a logarithm
    assert list(forecast.y) == SEARCH.table.forecast.tolist()
    assert list(measured.customdata) == [2, 1, 3]
    assert figure.layout.yaxis.type == figure.layout.yaxis2.type == "log"
    assert "rank correlation 0.50" in figure.layout.title.text
    assert {a.text for a in figure.layout.annotations} == {"explosion 1", "decay 2"}
    assert "0-based" in figure.layout.xaxis.title.text


def test_outliers_are_ratios_with_the_line_where_half_becomes_zero():
    figure = figures.outlier_ratios(OUTLIERS, explosion_layers=[1])
    figure.to_json()
    (ratios,) = figure.data
    assert list(ratios.y) == [10.0, 30000.0, None]
    assert ratios.customdata[1] == "neuron 7, token &lt;b&gt; at position 0<br>largest 3,000, median 0.1"
    assert [shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1] == [2 * 127]
    assert figure.layout.yaxis.type == "log"


@pytest.mark.parametrize("draw", [figures.outlier_ratios, figures.rounding_sensitivity, figures.quantization_bars])
def test_figures_are_named_in_the_package(draw):
    assert draw.__name__ in figures.__all__
