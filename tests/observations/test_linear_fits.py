import math
from dataclasses import replace

import pytest
import torch

from sd_lens import capture_linear_maps, load_model
from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import norm_map
from sd_lens.linear.lone_token import normalized
from sd_lens.models.blocks import block_weights
from tests import tiny

LENGTHS = [3, 20, 1, 7, 40, 12, 12, 2, 33]
RIDGE = 1e-6


def corpus(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator) for n in lengths]


@pytest.fixture(params=tiny.BOOTING, ids=lambda p: f"{p[0]}-{p[1]}")
def model(request):
    name, backend = request.param
    return tiny.wrap(tiny.ARCHITECTURES[name](), backend)


def cached(model, texts, point):
    """A point's activations at all tokens, a text at a time, without any padding: `[token, d]`."""
    rows = []
    for text in texts:
        with torch.no_grad():
            activation = model.run_with_cache(text[None])[1][point]
        rows.append(activation.reshape(len(text), -1).double())
    return torch.cat(rows)


def lstsq(X, Y):
    """With the ridge as rows of its own."""
    weight = math.sqrt(RIDGE * float(X.square().sum()) / X.shape[1]) * torch.eye(X.shape[1], dtype=X.dtype)
    zero = torch.zeros(X.shape[1], Y.shape[1], dtype=X.dtype)
    return torch.linalg.lstsq(torch.cat([X, weight]), torch.cat([Y, zero])).solution.T


def scale_of(model, texts, layer, name, gain):
    return 1 if gain is None else cached(model, texts, f"blocks.{layer}.{name}.hook_scale")


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_fits_are_lstsq_on_every_activation(model):
    """Outputs from the wrapper's own norm, and from what the MLP really writes."""
    texts = corpus()
    layer = model.cfg.n_layers - 1
    fits = capture_linear_maps(model, texts, [layer], ridge=RIDGE, progress=False)
    assert (fits.layers, fits.n_tokens) == ((layer,), sum(LENGTHS))
    block = block_weights(model, layer)
    prefix = f"blocks.{layer}"
    x = cached(model, texts, f"{prefix}.hook_resid_pre")
    gain = block.attention_norm.gain
    norm = cached(model, texts, f"{prefix}.ln1.hook_normalized") * (1 if gain is None else gain.double())
    norm = norm / scale_of(model, texts, layer, "ln1_post", block.attention_post_gain)
    assert relative_error(fits.norms[0], lstsq(x, norm)) < 1e-4

    written = cached(model, texts, f"{prefix}.hook_mlp_out")
    bias = getattr(model.blocks[layer].mlp, "b_out", None)
    written = written if bias is None else written - bias.detach().double()
    mlp_input = x if block.parallel else x + cached(model, texts, f"{prefix}.hook_attn_out")
    A, F = fits.maps(block)
    assert relative_error(F.dense(), lstsq(mlp_input, written)) < 1e-4
    values = torch.einsum("hdm,hed->hme", block.W_O, block.W_V.repeat_interleave(len(block.W_O) // len(block.W_V), 0))
    post_gain = 1 if block.attention_post_gain is None else block.attention_post_gain[:, None]
    assert relative_error(A.dense(), post_gain * values.sum(dim=0) @ fits.norms[0]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma2"])
def test_batches_and_their_padding_do_not_matter(name):
    model = tiny.wrap(tiny.ARCHITECTURES[name](), "bridge")
    texts = corpus()
    alone = capture_linear_maps(model, texts, batch_tokens=1, progress=False)
    for batch_tokens in (50, 4096):
        together = capture_linear_maps(model, iter(texts), batch_tokens=batch_tokens, progress=False)
        assert together.n_tokens == alone.n_tokens == sum(LENGTHS)
        assert relative_error(together.norms, alone.norms) < 1e-4
        assert relative_error(together.neurons, alone.neurons) < 1e-4


def test_blocks_are_fitted_together_as_alone(tiny_model):
    together = capture_linear_maps(tiny_model, corpus(), progress=False)
    assert together.layers == (0, 1, 2)
    some = capture_linear_maps(tiny_model, corpus(), [2, 0, 2], progress=False)
    assert some.layers == (2, 0)
    torch.testing.assert_close(some.norms, together.norms[[2, 0]])
    torch.testing.assert_close(some.neurons, together.neurons[[2, 0]])


def test_under_gaussian_streams_the_norms_fit_is_its_linear_part_over_the_rms(tiny_model):
    block = block_weights(tiny_model, 0)
    rms = 3.0
    x = rms * torch.randn(200_000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = torch.linalg.lstsq(x, normalized(replace(block.attention_norm, bias=None), x)).solution.T
    expected = norm_map(block.attention_norm, block.W_in).dense() / rms
    # E[1 / rms] of 31 or 32 dimensions is a little off the 1 / rms of infinitely many.
    assert relative_error(fit, expected) < 0.03


def test_what_a_bos_adds_is_counted(tiny_llama):
    texts = ["w0 w1 w2"] * 20
    assert capture_linear_maps(tiny_llama, texts, prepend_bos=True, progress=False).n_tokens == 80
    assert capture_linear_maps(tiny_llama, texts, prepend_bos=False, progress=False).n_tokens == 60


def test_weights_in_half_precision_give_single_precision():
    model = load_model(tiny.llama(), backend="bridge", dtype=torch.bfloat16)
    fits = capture_linear_maps(model, corpus(), [1], progress=False)
    assert fits.norms.dtype == fits.neurons.dtype == torch.float32
    assert fits.neurons.isfinite().all()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there are no texts"),
        (corpus([31]), {}, "31 tokens are too few to fit 32 dimensions: pass texts of at least 32"),
        (corpus(), {"layers": [3]}, "block 3 does not exist"),
        (corpus(), {"layers": []}, "layers is empty"),
        (corpus(), {"ridge": -1.0}, "ridge=-1.0: expected 0 or a positive number"),
        (corpus(), {"ridge": math.nan}, "ridge=nan"),
    ],
)
def test_unusable_arguments_are_errors(tiny_llama, texts, options, message):
    with pytest.raises(InputError, match=message):
        capture_linear_maps(tiny_llama, texts, progress=False, **options)


def test_as_many_tokens_as_dimensions_are_enough(tiny_llama):
    assert capture_linear_maps(tiny_llama, corpus([32]), progress=False).neurons.isfinite().all()


def test_activations_that_are_not_finite_are_an_error(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_in[0, 0] = torch.nan
    capture_linear_maps(tiny_llama, corpus(), [0], progress=False)
    with pytest.raises(NumericalError, match=r"not finite at blocks\.1\.mlp\.hook_post, texts 0 to 8, in torch"):
        capture_linear_maps(tiny_llama, corpus(), progress=False)
