from dataclasses import replace

import pandas as pd
import pytest
import torch

from sd_lens import Forecast, PredictedNorms, SingularSpectra, figures
from sd_lens.errors import InputError


def floats(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


FORECAST = Forecast(
    explosion_layers=(1,), decay_layers=(3,), direction=floats(1, 0), norms=floats(2, 900, 950, 20),
    ordinary_norms=floats(1, 2, 3, 4), score_layer=1, vocabulary=pd.DataFrame(), n_probes=16, model_name="m",
)  # fmt: skip
PREDICTED = PredictedNorms(
    layers=(1, 2, 3), linear=floats(900, 980, 10), exact=floats(900, 950, 20), rate=floats(0, 0.05, -0.99),
    streams=torch.zeros(2, 2),
)  # fmt: skip
OBSERVED = floats(2.5, 1000, 1100, 15)


def curves(figure):
    figure.to_json()
    return {trace.name: trace for trace in figure.data}


def test_forecast_norms_are_the_results_on_a_logarithm():
    figure = figures.forecast_norms(FORECAST, OBSERVED)
    drawn = curves(figure)
    assert list(drawn["forecast, initial path"].y) == FORECAST.norms.tolist()
    assert list(drawn["forecast, ordinary norms"].y) == FORECAST.ordinary_norms.tolist()
    assert list(drawn["observed"].y) == OBSERVED.tolist()
    assert all(list(trace.x) == [0, 1, 2, 3] for trace in figure.data)
    assert list(drawn["observed"].text) == ["2.5", "1,000", "1,100", "15"]
    assert figure.layout.yaxis.type == "log"
    assert "0-based" in figure.layout.xaxis.title.text
    assert {a.text for a in figure.layout.annotations} == {"explosion 1", "decay 3"}


def test_a_forecast_without_explosion_marks_no_block():
    none = replace(FORECAST, explosion_layers=(), decay_layers=(), direction=None)
    figure = figures.forecast_norms(none)
    assert list(curves(figure)) == ["forecast, initial path", "forecast, ordinary norms"]
    assert not figure.layout.annotations


def test_norms_of_zero_have_no_point():
    drawn = curves(figures.forecast_norms(FORECAST, floats(0, 5, 5, 5)))
    assert drawn["observed"].y[0] is None


def test_predicted_norms_stand_beside_the_observed_ones_with_the_eigenvalues():
    figure = figures.predicted_norms(PREDICTED, OBSERVED, explosion_layers=[0, 1], decay_layers=[3])
    drawn = curves(figure)
    assert list(drawn["observed"].y) == OBSERVED[1:].tolist()
    assert list(drawn["predicted, exact blocks"].y) == PREDICTED.exact.tolist()
    assert list(drawn["predicted, local linear picture"].y) == PREDICTED.linear.tolist()
    rate = drawn["local eigenvalue"]
    # The first block is where the stream was given: nothing happens in it.
    assert (list(rate.x), list(rate.y), rate.yaxis) == ([2, 3], [0.05, -0.99], "y2")
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis2.type == "linear"
    assert {a.text for a in figure.layout.annotations} == {"explosion 1", "decay 3"}
    assert "observed" not in curves(figures.predicted_norms(PREDICTED))


def test_observations_of_another_model_are_errors():
    for draw, result in ((figures.forecast_norms, FORECAST), (figures.predicted_norms, PREDICTED)):
        with pytest.raises(InputError, match=r"expected 4 .*norms, one per block; got 2"):
            draw(result, floats(1, 2))


@pytest.mark.parametrize("k", [2, 3])
def test_singular_spectra_are_the_results(k):
    values = floats(9, 3, 1, 8, 4, 2).view(2, 3)[:, :k]
    figure = figures.singular_spectra(SingularSpectra((4, 7), values, "m", "gaussian"))
    drawn = curves(figure)
    assert list(drawn) == [*(f"s{i + 1}" for i in range(k)), "gap s1/s2"]
    assert all(list(trace.x) == [4, 7] for trace in figure.data)
    assert [list(drawn[f"s{i + 1}"].y) for i in range(k)] == values.T.tolist()
    assert list(drawn["gap s1/s2"].y) == [3, 2]
    assert figure.layout.yaxis.type == "log"
    assert len({trace.line.color for trace in figure.data}) == k + 1
