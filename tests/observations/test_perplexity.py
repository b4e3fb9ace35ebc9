import math

import pytest
import torch

from sd_lens import observe_behaviour, perplexity
from sd_lens.errors import InputError, NumericalError
from sd_lens.observations.divergence import summed_divergence
from sd_lens.observations.perplexity import windows
from tests import tiny

TEXTS = [torch.randint(60, (n,), generator=torch.Generator().manual_seed(n)) for n in (23, 7, 1, 40)]


def by_hand(hf_model, texts, window, stride):
    """Every token's loss from the first window that predicts it."""
    losses = []
    for text in texts:
        predicted = {0}
        for start in range(0, len(text), stride):
            part = text[start : start + window]
            with torch.no_grad():
                logs = torch.log_softmax(hf_model(part[None]).logits[0].double(), dim=-1)
            for i in range(1, len(part)):
                if start + i not in predicted:
                    losses.append(-float(logs[i - 1, part[i]]))
                    predicted.add(start + i)
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (8, 8), (8, 3), (8, 1), (2, 1), (5, 5)])
def test_it_is_that_of_transformers_token_by_token(tiny_hf, backend, window, stride):
    loss, n = by_hand(tiny_hf, TEXTS, window, stride)
    found = perplexity(tiny.wrap(tiny_hf, backend), TEXTS, window=window, stride=stride, progress=False)
    assert found.n_predicted == n
    assert found.n_texts == 4
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.value == pytest.approx(math.exp(loss), rel=1e-3)


def test_the_default_is_whole_texts_as_behaviour_measures_them(tiny_llama):
    found = perplexity(tiny_llama, TEXTS, progress=False)
    behaviour = observe_behaviour(tiny_llama, TEXTS, progress=False)
    assert found.loss == pytest.approx(behaviour.loss, rel=1e-5)
    assert found.value == pytest.approx(behaviour.perplexity, rel=1e-5)
    assert (found.window, found.stride) == (64, 64)
    assert str(found).startswith(
        f"Perplexity {found.value:,.5g}: {found.loss:.4f} nats per token over 67 tokens of 4 texts"
    )


def test_a_token_in_front_is_put_before_the_text_alone(tiny_llama):
    """With it, the first word is predicted too."""
    text = "w5 w6 w7 w8 w9 w10"
    assert perplexity(tiny_llama, text, prepend_bos=False, progress=False).n_predicted == 5
    assert perplexity(tiny_llama, text, prepend_bos=True, progress=False).n_predicted == 6
    with_it = torch.cat([torch.tensor([1]), tiny_llama.to_tokens(text, prepend_bos=False)[0]])
    found = perplexity(tiny_llama, text, prepend_bos=True, window=3, progress=False)
    assert found.loss == perplexity(tiny_llama, with_it, window=3, progress=False).loss


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 30])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_predict_every_token_once_and_only_what_they_have_not_seen(length, stride):
    row = torch.arange(length)
    predicted = [int(token) for tokens, n_seen in windows(row, 8, stride) for token in tokens[max(n_seen, 1) :]]
    firsts_of_chunks = set(range(0, length, 8)) if stride == 8 else {0}
    assert predicted == [i for i in range(length) if i not in firsts_of_chunks]
    assert all(len(tokens) <= 8 for tokens, _ in windows(row, 8, stride))


def test_texts_are_read_lazily_and_once(tiny_llama):
    read = []

    def texts():
        for text in TEXTS:
            read.append(len(text))
            yield text

    first = next(iter(texts()))
    assert len(first) == read[0]
    read.clear()
    perplexity(tiny_llama, texts(), progress=False)
    assert read == [23, 7, 1, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window=1: expected 2 to 64 tokens, the model's context"),
        ({"window": 65}, "window=65: expected 2 to 64 tokens"),
        ({"window": 8, "stride": 9}, "stride=9: expected 1 to 8, the window"),
        ({"stride": 0}, "stride=0: expected 1 to 64"),
    ],
)
def test_bad_windows_are_named(tiny_llama, options, message):
    with pytest.raises(InputError, match=message):
        perplexity(tiny_llama, TEXTS, **options)


def test_texts_without_a_token_to_predict_are_an_error(tiny_llama):
    with pytest.raises(InputError, match="there is no token to predict"):
        perplexity(tiny_llama, [torch.tensor([3]), torch.tensor([4])], progress=False)


def test_what_is_not_finite_stops_it(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="the next-token loss of text 0 is nan"):
        perplexity(tiny_llama, TEXTS, progress=False)


def test_divergence_is_that_of_torch_and_zero_of_itself():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 7, generator=generator)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert float(summed_divergence(p, q)) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert float(summed_divergence(p, p)) == pytest.approx(0, abs=1e-6)
    assert summed_divergence(p, q).dtype == torch.float64
