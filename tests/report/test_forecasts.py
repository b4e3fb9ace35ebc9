from dataclasses import replace

import pandas as pd
import pytest
import torch

import sd_lens.report.writing as writing
from sd_lens import Forecast, PredictedNorms, find_high_norm_tokens, write_report
from sd_lens.errors import NumericalError
from sd_lens.report.forecasts import Forecasts, forecast_figures, forecast_sentences, observed_norms
from tests import planted, tiny

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")

HOSTILE = "<script>\n"


@torch.no_grad()
def every_token_explodes():
    """The planted GPT-2, with attention of the explosion's block writing the marker: no token of a text stands out."""
    defect = planted.gpt2()
    defect.hf_model.transformer.h[planted.EXPLOSION].attn.c_proj.bias[0] = 30
    return defect.hf_model


@pytest.fixture(scope="module")
def observed():
    model = tiny.wrap(planted.gpt2().hf_model, "auto", with_tokenizer=True)
    return find_high_norm_tokens(model, planted.gpt2().texts, progress=False)


@pytest.fixture(scope="module")
def nothing():
    model = tiny.wrap(tiny.llama(num_hidden_layers=6), "auto")
    return find_high_norm_tokens(model, torch.arange(3, 43).view(4, 10), progress=False)


def foretold(**options):
    vocabulary = pd.DataFrame(
        {
            "token": ["a", HOSTILE, "u", "b"], "untrained": [False, False, True, False],
            "non_initial": [1.0, 3.0, 9.0, float("nan")],
        }
    )  # fmt: skip
    norms = torch.tensor([1.0, 2, 900, 950, 30, 31], dtype=torch.float64)
    return Forecast(
        **{
            "explosion_layers": (2,), "decay_layers": (4,), "direction": -planted.gpt2().direction.double(),
            "norms": norms, "ordinary_norms": norms.clamp_max(40), "score_layer": 2, "vocabulary": vocabulary,
            "n_probes": 16, "model_name": "m",
        } | options
    )  # fmt: skip


NONE = foretold(
    explosion_layers=(), decay_layers=(), direction=None, norms=torch.zeros(6).double(), score_layer=None,
    vocabulary=pd.DataFrame({"token": ["a"], "untrained": [False], "non_initial": [float("nan")]}),
)  # fmt: skip


def test_a_forecast_beside_an_observation(observed):
    text = " ".join(forecast_sentences(observed, Forecasts(foretold(), None, None)))
    assert "without running text: the norm explodes in block 2 and decays in block 4; the forecast direction is" in text
    assert "degrees from the observed one, turned round." in text
    assert "is forecast after block 3, 950, and observed after block" in text


def test_tokens_are_ranked_escaped_and_untrained_ones_left_out(observed):
    text = " ".join(forecast_sentences(observed, Forecasts(foretold(), None, None)))
    assert "Of 3 tokens with trained embeddings" in text
    assert "block 2's MLP, without attention, are '&lt;script&gt;\\n' (3), 'a' (1)." in text
    assert "'u'" not in text
    assert "<script>" not in text


def test_a_forecast_without_an_observation(nothing):
    assert observed_norms(nothing) is None
    predicted = PredictedNorms((2, 3), *torch.tensor([[9.0, 2], [9, 3], [0, -0.8]]).double(), torch.zeros(1, 2))
    forecasts = Forecasts(foretold(), predicted, None)
    text = " ".join(forecast_sentences(nothing, forecasts))
    assert "decays in block 4; in the texts no high-norm tokens were observed." in text
    assert "or more in block 3, by the blocks' tangents." in text
    assert "observed after" not in text
    assert [figure.data[0].name for _, figure in forecast_figures(nothing, forecasts)] == [
        "forecast, initial path", "predicted, exact blocks"
    ]  # fmt: skip


def test_no_forecast_is_said_plainly(observed, nothing):
    (sentence,) = forecast_sentences(observed, Forecasts(NONE, None, None))
    assert sentence.startswith("From the weights alone, without running text, no explosion is forecast:")
    assert sentence.endswith("explosions that need a particular token, such as those observed, are not seen this way.")
    (sentence,) = forecast_sentences(nothing, Forecasts(NONE, None, None))
    assert sentence.endswith("keep ordinary norms.")
    assert forecast_figures(nothing, Forecasts(NONE, None, None)) == []


def test_predicted_norms_are_compared_with_the_medians(observed):
    medians = observed.initial.median
    linear = medians[2:].clone()
    linear[3] = linear[3] ** 1.5
    predicted = PredictedNorms(
        (2, 3, 4, 5), linear, linear, torch.tensor([0, 0, -0.9, 0]).double(), torch.zeros(3, planted.WIDTH)
    )
    text = " ".join(forecast_sentences(observed, Forecasts(foretold(), predicted, None)))
    assert "Carried on from block 2 along the forecast direction" in text
    assert "or more in block 4, by the blocks' tangents; the logarithm of its norm is off" in text
    assert "by 50.0 % at most (after block 5:" in text


def test_a_report_of_a_model_whose_every_token_explodes(backend, tmp_path):
    model = tiny.wrap(every_token_explodes(), backend, with_tokenizer=True)
    text = " ".join(write_report(model, tmp_path / "r.html", planted.gpt2().texts[:14], progress=False))
    assert "without running text: the norm explodes in block 2 and decays in block 4; in the texts no high-norm" in text
    assert "without attention, are 'w4' (" in text  # the planted token, first
    assert "Carried on from block 2" in text
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    captions = ("Medians of random embeddings", "A stream along the forecast direction", "How each block&#x27;s")
    assert [page.count(f"<figcaption>{caption}") for caption in captions] == [1, 1, 0]


def test_a_report_of_a_forecast_and_an_observation(backend, tmp_path):
    defect = planted.llama()
    text = " ".join(
        write_report(tiny.wrap(defect.hf_model, backend), tmp_path / "r.html", defect.texts, progress=False)
    )
    assert "From the weights alone, without running text: the norm explodes in " in text
    assert " degrees from the observed one" in text
    assert "the logarithm of its norm is off from the observed medians by " in text
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<figcaption>How each block&#x27;s") == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_two_blocks_are_enough(backend, layer, tmp_path):
    """An explosion of every initial token in the first block, or in the last, behind which nothing is predicted."""
    hf_model = tiny.gpt2(n_layer=2)
    with torch.no_grad():
        hf_model.transformer.h[layer].attn.c_proj.bias[0] = 3000
    model = tiny.wrap(hf_model, backend)
    sentences = write_report(model, tmp_path / "r.html", torch.arange(3, 43).view(4, 10), progress=False)
    assert any(s.startswith("From the weights alone, without running text") for s in sentences)


def test_predictions_start_behind_the_last_explosion_that_has_blocks_behind_it(tiny_llama):
    direction = torch.ones(32, dtype=torch.float64)
    norms = torch.tensor([5.0, 6, 7], dtype=torch.float64)
    found = foretold(explosion_layers=(0, 1, 2), direction=direction, norms=norms, ordinary_norms=norms)
    assert writing._behind_explosion(tiny_llama, found, False).layers == (1, 2)
    for explosions, along in (((2,), direction), ((), direction), ((), None)):
        none = replace(found, explosion_layers=explosions, direction=along)
        assert writing._behind_explosion(tiny_llama, none, False) is None


def test_eigenvalues_that_are_not_found_do_not_cost_the_report(observed, monkeypatch):
    def fail(*_, **__):
        raise NumericalError("residual <1>")

    monkeypatch.setattr(writing, "defect_eigenvalues", fail)
    forecasts = writing._forecasts(tiny.wrap(planted.gpt2().hf_model, "auto"), observed, False)
    assert forecasts.eigenvalues is None
    assert forecast_sentences(observed, forecasts)[-1] == "There is no figure of eigenvalues: residual &lt;1&gt;."
