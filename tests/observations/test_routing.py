import importlib

import pandas as pd
import pytest
import torch

from sd_lens import capture_router_weights, load_model
from sd_lens.errors import InputError, NotSupportedError, NumericalError
from tests import tiny
from tests.oracles.routers import weights_of_tokens

LENGTHS = [3, 20, 1, 7, 40, 12]
LAYER = 1


def corpus():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator) for n in LENGTHS]


@pytest.mark.parametrize(("name", "backend"), tiny.BOOTING_MIXTURES)
def test_means_are_an_explicit_loop_over_the_tokens(name, backend):
    texts = corpus()
    expected = weights_of_tokens(tiny.MIXTURES[name](), texts, LAYER).mean(dim=0)
    assert ((expected > 0.05) & (expected < 0.9)).all()
    model = tiny.wrap(tiny.MIXTURES[name](), backend)
    for batch_tokens in (1, 50, 4096):
        found = capture_router_weights(model, iter(texts), [LAYER], batch_tokens=batch_tokens, progress=False)
        assert (found.layers, found.n_tokens) == ((LAYER,), sum(LENGTHS))
        torch.testing.assert_close(found.weights[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "layers"), [("mixtral", (0, 1)), ("qwen2_moe interleaved", (1,))])
def test_all_mixtures_are_captured_by_default(name, layers):
    model = tiny.wrap(tiny.MIXTURES[name](), "bridge")
    found = capture_router_weights(model, corpus(), progress=False)
    assert found.layers == layers
    again = capture_router_weights(model, corpus(), [1, 1], progress=False)
    torch.testing.assert_close(again.weights[0], found.weights[-1])


def test_tokens_can_be_chosen(backend):
    texts = corpus()
    model = tiny.wrap(tiny.mixtral(), backend)
    tokens = weights_of_tokens(tiny.mixtral(), texts, LAYER)
    starts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    chosen = pd.DataFrame({"text": [1, 4, 4], "position": [3, 0, 39]})
    for where, rows in ((0, starts), (chosen, starts[chosen.text.tolist()] + torch.tensor(chosen.position.tolist()))):
        found = capture_router_weights(model, texts, [LAYER], where=where, batch_tokens=50, progress=False)
        assert found.n_tokens == len(rows)
        torch.testing.assert_close(found.weights[0], tokens[rows].mean(dim=0), rtol=0, atol=1e-6)


def test_half_precision_is_averaged_in_double():
    model = load_model(tiny.mixtral(), backend="bridge", dtype=torch.bfloat16)
    found = capture_router_weights(model, corpus(), progress=False)
    assert found.weights.dtype == torch.float64
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixtral", {"texts": []}, "there are no texts"),
        ("mixtral", {"layers": [2]}, "block 2 does not exist"),
        ("mixtral", {"layers": []}, "layers is empty"),
        ("mixtral", {"where": 64}, "where=64 means no token of these texts"),
        ("mixtral", {"where": True}, "where=True: expected a position"),
        ("qwen3_moe interleaved", {"layers": [0, 1]}, "block 0 has no experts but a single MLP"),
        ("llama", {}, "the model has no mixtures of experts: every block has a single MLP"),
    ],
)
def test_unusable_arguments_are_errors(name, options, message):
    model = tiny.wrap((tiny.MIXTURES | tiny.ARCHITECTURES)[name](), "bridge")
    with pytest.raises(InputError, match=message):
        tiny.unchecked(capture_router_weights)(model, **({"texts": corpus(), "progress": False} | options))


def test_architectures_that_are_not_covered_are_an_error():
    model = tiny.wrap(tiny.llama_like("Olmoe", num_experts=4, num_experts_per_tok=2), "bridge")
    with pytest.raises(NotSupportedError, match="not supported yet: OlmoeForCausalLM; supported are"):
        capture_router_weights(model, corpus(), progress=False)


def test_streams_that_are_not_finite_are_an_error():
    hf_model = tiny.mixtral()
    with torch.no_grad():
        hf_model.model.layers[0].mlp.experts.down_proj[:, 0] = torch.nan
    model = tiny.wrap(hf_model, "bridge")
    capture_router_weights(model, corpus(), [0], progress=False)
    with pytest.raises(NumericalError, match=r"not finite at blocks\.1\.hook_resid_mid, texts 0 to 5, in torch"):
        capture_router_weights(model, corpus(), progress=False)


def test_a_run_ends_with_the_last_router(monkeypatch):
    """Only mixtures are observed, by one point each: no stream is kept."""
    routing = importlib.import_module("sd_lens.observations.routing")
    names = []
    monkeypatch.setattr(routing, "run_with_hooks", lambda model, tokens, callbacks: names.extend(callbacks))
    capture_router_weights(tiny.wrap(tiny.mixtral(), "bridge"), corpus(), [0], progress=False)
    assert names == ["blocks.0.hook_resid_mid"]
