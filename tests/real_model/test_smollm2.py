"""Behaviour on the real model: SmolLM2-135M-Instruct, whose initial token explodes in blocks 2 and 11."""

import math

import pytest
import torch

from sd_lens import (
    Jacobian,
    capture_linear_maps,
    default_texts,
    defect_eigenvalues,
    find_high_norm_tokens,
    forecast,
    load_model,
    predict_norms,
    singular_defects,
)
from sd_lens.linear.angles import acute_angles
from sd_lens.models.hooks import residual_stream_points, run_with_hooks
from sd_lens.models.loading import _dequantise, _from_folder
from sd_lens.models.packaged import packaged_folder, packaged_gguf
from tests import tiny

pytestmark = [pytest.mark.real_model, pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")]


@pytest.fixture(scope="module")
def found(smollm2):
    return find_high_norm_tokens(smollm2, default_texts(), progress=False)


@pytest.fixture(scope="module")
def defects(smollm2):
    return singular_defects(smollm2, progress=False)


def hugging_face():
    return _from_folder(packaged_folder(_dequantise), torch.float32, False)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_every_residual_agrees_with_transformers(backend):
    """Nothing is folded or centred: max relative error 1e-4 after every block, for high-norm tokens and others."""
    hf_model, tokenizer = hugging_face()
    tokens = tokenizer("The lighthouse keeper climbed the stairs; the sea was calm.", return_tensors="pt")["input_ids"]
    expected = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out))
        for layer in hf_model.model.layers
    ]
    with torch.no_grad():
        logits = hf_model(tokens).logits
    for hook in hooks:
        hook.remove()
    model = load_model("smollm2-135m", backend=backend)
    seen = {}
    names = residual_stream_points(30)[1:]
    run_with_hooks(model, tokens, {n: lambda x, n=n: seen.__setitem__(n, x.clone()) for n in names})
    for name, states in zip(names, expected, strict=True):
        states = states.reshape(1, -1, 576)
        error = (seen[name] - states).norm(dim=-1) / states.norm(dim=-1)
        assert error.max() <= 1e-4, (name, float(error.max()))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), logits, rtol=1e-3, atol=1e-3)


def test_gguf_file_and_cached_folder_are_the_same_model(found):
    from_file = load_model(packaged_gguf(), backend="bridge")
    assert from_file.cfg.default_prepend_bos is False
    again = find_high_norm_tokens(from_file, default_texts()[:2], progress=False)
    torch.testing.assert_close(again.scan.samples[0].norms, found.scan.samples[0].norms, rtol=1e-4, atol=0)


def test_explosion_and_decay_blocks(found):
    assert found.explosion_layers == (2, 11)
    assert found.decay_layers == (9, 28, 29)
    assert found.initial.n_tokens == 40  # whatever token it is
    assert found.initial.growth[11] > 100
    assert found.initial.growth[28] < 0.5
    common = found.table[found.table.position > 0].drop_duplicates(["text", "position"]).token.value_counts()
    assert common.index[0] == " the"


def test_the_rule_says_the_same_of_half_the_corpus(smollm2, found):
    half = find_high_norm_tokens(smollm2, default_texts()[::2], progress=False)
    assert (half.explosion_layers, half.decay_layers) == (found.explosion_layers, found.decay_layers)
    assert acute_angles(half.direction[None], found.direction).item() < 1


def test_weights_predict_the_direction_at_explosion_and_great_decay(found, defects):
    angles = defects.angles_to(found.direction)
    assert angles[11] < 10
    assert angles[28] < 10
    assert angles[2] < 25
    assert acute_angles(defects.block.left[2:3], found.layer_directions[2]).item() < 15
    others = torch.tensor([angle for layer, angle in enumerate(angles) if layer not in (2, 11, 28)])
    assert others.min() > 30
    assert others.median() > 60
    assert defects.block.gap[11] > 5


@pytest.mark.parametrize("layer", [11, 17])
def test_the_closed_form_is_within_the_sampling_noise(smollm2, layer):
    """Two sampled estimates differ by more from each other than the closed form does from their mean."""
    closed = singular_defects(smollm2, [layer], progress=False)
    one, other = (
        singular_defects(smollm2, [layer], "sampled", n_samples=20_000, seed=seed, progress=False) for seed in (0, 1)
    )
    left = torch.cat([d.block.left for d in (closed, one, other)]).double()
    mean = left[1] + left[2]
    assert (left[0] - mean / mean.norm()).norm() < (left[1] - left[2]).norm()


def test_both_wrappers_predict_the_same(defects):
    for backend in tiny.BACKENDS:
        other = singular_defects(load_model("smollm2-135m", backend=backend), [2, 11, 28], progress=False)
        angles = [
            acute_angles(other.block.left[i : i + 1], defects.block.left[b]).item() for i, b in enumerate((2, 11, 28))
        ]
        assert max(angles) < 0.05


@pytest.fixture(scope="module")
def forecasted(smollm2):
    return forecast(smollm2, progress=False)


def test_the_forecast_names_the_observed_blocks_and_the_direction(found, forecasted):
    assert forecasted.explosion_layers == found.explosion_layers
    assert forecasted.decay_layers == found.decay_layers
    assert float(forecasted.direction @ found.direction) > math.cos(math.radians(2))  # asked: 10 degrees
    logs = forecasted.norms[2:].log() / found.initial.median[2:].log()
    assert (logs - 1).abs().max() < 0.05


def test_scores_tell_which_tokens_explode_without_attention(smollm2, found, forecasted):
    """Against a scan of the whole vocabulary by the running model, attention's outputs zeroed, to block 2."""
    norms = []
    zeroed = {f"blocks.{layer}.hook_attn_out": torch.zeros_like for layer in range(3)}
    for tokens in torch.arange(smollm2.cfg.d_vocab)[:, None].split(4096):
        read = {"blocks.2.hook_resid_post": lambda x: norms.append(x[:, 0].norm(dim=1))}
        run_with_hooks(smollm2, tokens, zeroed | read)
    explodes = torch.cat(norms) > found.threshold[2]
    assert 2000 < int(explodes.sum()) < 4000
    scores = torch.tensor(forecasted.vocabulary.non_initial.to_numpy())
    ranks = scores.argsort().argsort().double() + 1
    n, m = int(explodes.sum()), int((~explodes).sum())
    area = (float(ranks[explodes].sum()) - n * (n + 1) / 2) / (n * m)
    assert area >= 0.99


def test_predicted_norms_are_those_observed_to_the_end(smollm2, found, forecasted):
    """From the forecast alone; asked: 10 % of the logarithm."""
    predicted = predict_norms(smollm2, forecasted.direction, float(forecasted.norms[11]), 11, progress=False)
    assert predicted.decay_layers == (28, 29)
    assert predicted.to_dataframe(found.initial.median).log_error.abs().max() < 0.05


def test_the_captured_map_has_the_sign_of_the_decay_and_the_jacobian_no_eigenvalue(smollm2, found):
    """Where the Gaussian map's eigenvalue is large and positive: docs/linearizations.md."""
    captured = capture_linear_maps(smollm2, default_texts(), [28], progress=False)
    predicted = predict_norms(smollm2, found.direction, float(found.initial.median[11]), 11, progress=False)
    at = Jacobian(predicted.streams, predicted.layers[1:])
    gaussian, fitted, local = (
        defect_eigenvalues(smollm2, found.direction, [28], linearization, progress=False)
        for linearization in ("gaussian", captured, at)
    )
    assert float(gaussian.eigenvalue.real) > 100
    assert -1 < float(fitted.eigenvalue.real) < -0.3
    assert float(fitted.angle) < 15
    assert abs(complex(local.eigenvalue)) < 0.01
    assert float(predicted.rate[28 - 11]) < -0.5
