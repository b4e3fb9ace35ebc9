import pytest
import torch

from sd_lens import load_model, scan_norms
from sd_lens.errors import NumericalError
from sd_lens.observations.norms import QUANTILES
from tests import tiny

LENGTHS = [3, 20, 1, 7, 12, 12, 2]


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def norms_one_by_one(hf_model, texts):
    """`[layer, token]` norms by transformers, a text at a time, without any padding."""
    states = []

    def remember(module, inputs, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = hf_model.model.layers if hasattr(hf_model, "model") else hf_model.transformer.h
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    found = []
    for text in texts:
        states.clear()
        with torch.no_grad():
            hf_model(text[None])
        found.append(torch.stack([s.reshape(len(text), -1).double().norm(dim=-1) for s in states]))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_scan_equals_brute_force_whatever_the_batches(tiny_hf, backend, texts, batch_tokens):
    expected = norms_one_by_one(tiny_hf, texts)
    together = torch.cat(expected, dim=1)
    scan = scan_norms(tiny.wrap(tiny_hf, backend), iter(texts), batch_tokens=batch_tokens, keep_texts=3, progress=False)
    assert (scan.n_texts, scan.n_tokens, scan.n_truncated) == (len(texts), sum(LENGTHS), 0)
    torch.testing.assert_close(scan.maximum, together.max(dim=1).values, rtol=1e-4, atol=0)
    for i, level in enumerate(QUANTILES):
        exact = together.quantile(level, dim=1, interpolation="lower")
        torch.testing.assert_close(scan.quantiles[:, i], exact, rtol=2e-3, atol=0)
    ordinary = torch.cat([e[:, 1:] for e in expected], dim=1)
    torch.testing.assert_close(
        scan.ordinary_median, ordinary.quantile(0.5, dim=1, interpolation="lower"), rtol=2e-3, atol=0
    )
    initial = torch.cat([e[:, :1] for e in expected], dim=1)
    torch.testing.assert_close(
        scan.initial_median, initial.quantile(0.5, dim=1, interpolation="lower"), rtol=2e-3, atol=0
    )
    assert len(scan.samples) == 3
    for sample, norms, text in zip(scan.samples, expected, texts, strict=False):
        torch.testing.assert_close(sample.norms, norms, rtol=1e-4, atol=0)
        assert sample.tokens == tuple(map(str, text.tolist()))
    assert sum(scan.initial_tokens.values()) == len(texts)


def test_the_tokens_as_run_are_echoed(tiny_llama):
    scan = scan_norms(tiny_llama, ["w0 w1", "w0 w2 w3"], prepend_bos=True, progress=False)
    assert scan.prepend_bos is True
    assert scan.initial_tokens == {"<s>": 2}
    assert scan.samples[1].tokens == ("<s>", "w0", "w2", "w3")
    assert scan_norms(tiny_llama, "w5 w0", progress=False).initial_tokens == {"w5": 1}


def test_a_generator_is_read_once_and_memory_does_not_grow(tiny_llama):
    def corpus():
        for i in range(300):
            yield torch.full((8,), 3 + i % 50)

    scan = scan_norms(tiny_llama, corpus(), keep_texts=2, progress=False)
    assert (scan.n_texts, scan.n_tokens, len(scan.samples)) == (300, 2400, 2)


def test_table_and_line_tell_the_same(tiny_llama, texts):
    scan = scan_norms(tiny_llama, texts, progress=False)
    table = scan.to_dataframe()
    assert list(table.layer) == [0, 1, 2]
    assert table.maximum.tolist() == scan.maximum.tolist()
    assert table.q50.tolist() == scan.median.tolist()
    assert str(scan).startswith(f"NormScan: {sum(LENGTHS)} tokens of 7 texts; largest norm")


def test_overflow_in_half_precision_is_an_error_that_says_what_to_do(backend):
    hf_model = tiny.llama()
    with torch.no_grad():
        hf_model.model.layers[1].mlp.down_proj.weight *= 1e5
    model = load_model(hf_model, backend=backend, dtype=torch.float16)
    with pytest.raises(NumericalError, match=r"not finite at blocks\.1\.hook_resid_post.*load the model in float32"):
        scan_norms(model, torch.arange(3, 13), progress=False)


def test_nan_weights_are_an_error(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[0].mlp.W_out[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"not finite at blocks\.0\.hook_resid_post, texts 0 to 0"):
        scan_norms(tiny_llama, torch.arange(3, 13), progress=False)


def test_cut_texts_are_counted(tiny_llama, texts):
    scan = scan_norms(tiny_llama, texts, max_length=6, batch_tokens=8, progress=False)
    assert scan.n_truncated == sum(n > 6 for n in LENGTHS)
    assert scan.n_tokens == sum(min(n, 6) for n in LENGTHS)
