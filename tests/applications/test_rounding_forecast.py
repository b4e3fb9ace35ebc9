import pytest
import torch

from sd_lens import QuantizationScheme, forecast_rounding
from sd_lens.applications.rounding_forecast import _probes
from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import run_with_hooks
from tests import planted, tiny
from tests.oracles.quantized import nearest_multiple


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_errors_are_those_of_the_running_model(tiny_model, granularity):
    """Lone tokens, and tokens with attention zeroed, put in through the hook in front of block 0."""
    found = forecast_rounding(
        tiny_model, QuantizationScheme(8, 6, activations=granularity), n_probes=20, seed=3, progress=False
    )
    n_layers = tiny_model.cfg.n_layers
    seen = {}
    for path, embeddings in zip(("initial", "ordinary"), _probes(tiny_model, 20, 3, torch.float32), strict=True):
        callbacks = {"blocks.0.hook_resid_pre": lambda x, e=embeddings: e[:, None].clone()}
        if path == "ordinary":
            callbacks |= {f"blocks.{layer}.hook_attn_out": torch.zeros_like for layer in range(n_layers)}
        for layer in range(n_layers):
            for point in ("mlp.hook_post", "hook_resid_post"):
                callbacks[f"blocks.{layer}.{point}"] = lambda x, key=(path, layer, point): seen.__setitem__(
                    key, x[:, 0]
                )
        run_with_hooks(tiny_model, torch.full((20, 1), 5), callbacks)
    for row in found.table.itertuples():
        h, x = (seen["ordinary", row.layer, point] for point in ("mlp.hook_post", "hook_resid_post"))
        peak = seen["initial", row.layer, "mlp.hook_post"].abs().max()
        own = h.abs().amax(dim=1)
        assert row.initial_peak == pytest.approx(float(peak), rel=1e-4)
        assert row.ordinary_peak == pytest.approx(float(own.median()), rel=1e-4)
        if granularity == "token":
            rounded = nearest_multiple(h, 6, -1)
        else:
            step = max(peak, own.median()) / 31
            rounded = torch.round(h / step) * step
        W_out = tiny_model.blocks[row.layer].mlp.W_out.detach()
        error = ((rounded - h) @ W_out).norm(dim=1) / x.norm(dim=1)
        assert row.error == pytest.approx(float(error.median()), rel=0.02)


def test_tensor_wise_the_planted_blocks_suffer_and_per_token_they_suffer_less(planted_defect, backend):
    """Tokens that explode, as random embeddings in the initial position do, take the others' step away."""
    model = tiny.wrap(planted_defect.hf_model, backend)
    blocks = [planted.EXPLOSION, planted.DECAY]
    found = forecast_rounding(model, progress=False)
    assert set(found.ranking[:2]) == set(blocks)
    assert found.table.error[blocks].min() > 5 * found.table.error.median()
    assert (found.table.initial_peak > 10 * found.table.ordinary_peak)[blocks].all()
    assert str(found).startswith("RoundingForecast (W8A8, weights per tensor, activations per tensor): relative errors")
    fine = forecast_rounding(model, QuantizationScheme(activations="token"), progress=False)
    assert (fine.table.error < 0.25 * found.table.error)[blocks].all()


def test_outliers_of_every_token_make_the_blocks_suffer_too(backend):
    found = forecast_rounding(tiny.wrap(planted.llama_with_outliers()[0], backend), progress=False)
    assert found.ranking[:2] == planted.OUTLIERS


def test_it_depends_on_the_seed_alone(tiny_llama):
    one, again, other = (forecast_rounding(tiny_llama, n_probes=16, seed=seed, progress=False) for seed in (0, 0, 1))
    assert one.to_dataframe().equals(again.to_dataframe())
    assert not one.to_dataframe().equals(other.to_dataframe())


def test_bad_arguments_and_overflows_are_named(tiny_llama):
    with pytest.raises(InputError, match="n_probes=15: expected at least 16"):
        forecast_rounding(tiny_llama, n_probes=15)
    with pytest.raises(InputError, match="the scheme rounds no activations: there is nothing to forecast"):
        forecast_rounding(tiny_llama, QuantizationScheme(8, None))
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="a probe's stream is not finite after block 1"):
        forecast_rounding(tiny_llama, n_probes=16, progress=False)
