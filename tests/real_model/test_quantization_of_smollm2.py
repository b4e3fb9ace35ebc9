"""Sparing W_out of the blocks that explode and decay: simulated W8A8, tensor-wise, on SmolLM2-135M."""

import pytest
import torch

from sd_lens import (
    activation_outliers,
    default_texts,
    forecast,
    forecast_rounding,
    load_model,
    perplexity,
    quantization_report,
    quantize,
    spare_list,
)
from sd_lens.models.loading import _dequantise, _from_folder
from sd_lens.models.packaged import packaged_folder
from tests import tiny
from tests.oracles.quantized import quantized

pytestmark = [pytest.mark.real_model, pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")]

BLOCKS = (2, 9, 11, 28, 29)
FEW = default_texts()[::4]  # docs/quantization.md has all forty


@pytest.fixture(scope="module")
def report(smollm2):
    return quantization_report(smollm2, FEW, BLOCKS, n_controls=2, alpha=None, progress=False)


def test_automatic_sparing_names_the_blocks_that_explode_and_decay(smollm2):
    assert spare_list(smollm2, forecast(smollm2, progress=False)).modules == tuple(
        f"model.layers.{layer}.mlp.down_proj" for layer in BLOCKS
    )


def test_five_of_thirty_close_most_of_the_gap_and_others_do_not(report):
    """Asked: at least 75 % with at most 6, controls under 10 %."""
    assert report.rounded_perplexity > 1.5 * report.full_perplexity
    assert report.gap_closed > 0.75
    assert report.best_control < 0.1
    assert report.spared.parameter_share < 0.05


def test_the_inputs_of_those_are_outliers(report):
    ratio = report.outliers.table.set_index("layer").ratio
    assert set(ratio.nlargest(5).index) <= {*BLOCKS, 1}
    assert ratio[11] > 10_000
    assert ratio.median() < 300


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_logits_and_perplexity_are_those_of_transformers_quantized_by_hand(backend):
    hf_model, tokenizer = _from_folder(packaged_folder(_dequantise), torch.float32, False)
    model = load_model("smollm2-135m", backend=backend)
    tokens = tokenizer(FEW[0], return_tensors="pt")["input_ids"]
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in BLOCKS]
    with torch.no_grad():
        plain = hf_model(tokens).logits
        for skip, layers in (((), ()), (names, BLOCKS)):
            with quantized(hf_model, skip=skip):
                expected = hf_model(tokens).logits
                loss = torch.nn.functional.cross_entropy(expected[0, :-1], tokens[0, 1:])
            with quantize(model, layers):
                found = model(tokens)
                measured = perplexity(model, tokens, progress=False)
            # Here and there float noise turns a number that lies between two levels.
            assert (found - expected).norm() < 0.1 * (expected - plain).norm()
            assert measured.value == pytest.approx(float(loss.exp()), rel=1e-2)
        assert perplexity(model, tokens, progress=False).value == pytest.approx(
            float(torch.nn.functional.cross_entropy(plain[0, :-1], tokens[0, 1:]).exp()), rel=1e-3
        )


def test_the_weights_foretell_which_blocks_suffer(smollm2):
    """In the order that docs/quantization.md measures: the five first, then those that are nearest to them."""
    found = forecast_rounding(smollm2, progress=False)
    assert set(found.ranking[:5]) == set(BLOCKS)
    assert set(found.ranking[:10]) == {*BLOCKS, 0, 1, 8, 10, 27}
    observed = activation_outliers(smollm2, FEW[:2], progress=False).table
    assert found.table.initial_peak[11] == pytest.approx(observed.absmax[11], rel=0.2)
