import math

import pandas as pd
import pytest
import torch

from sd_lens import AttentionSinks, attention_sinks, observe_behaviour
from sd_lens.errors import InputError, NumericalError
from sd_lens.observations.attention import received_attention
from tests import planted, tiny

TEXTS = [torch.tensor([3, 14, 15, 9, 26, 5]), torch.tensor([8, 9, 7]), torch.tensor([9]), torch.tensor([9, 32, 38, 46])]


def pair_by_pair(model, texts, is_watched):
    """Every (key, later query) pair and every token, one at a time, from TransformerLens's own cache."""
    by_position, by_group, lengths, texts_with_sink = {}, {}, {}, {}
    for number, text in enumerate(texts):
        with torch.no_grad():
            cache = model.run_with_cache(text[None])[1]
        for layer in range(model.cfg.n_layers):
            pattern, k, v = (cache[f"blocks.{layer}.attn.hook_{name}"][0].double() for name in ("pattern", "k", "v"))
            for head in range(pattern.shape[0] if len(text) > 1 else 0):
                on_first = sum(float(pattern[head, query, 0]) for query in range(len(text))) / len(text)
                texts_with_sink.setdefault((layer, head), []).append(on_first > 0.3)
            for key in range(len(text)):
                watched = is_watched(number, key, text)
                for kind, states in (("k", k), ("v", v)):
                    for head in range(states.shape[1]):
                        lengths.setdefault((kind, watched, layer, head), []).append(float(states[key, head].norm()))
                for query in range(key + 1, len(text)):
                    for head in range(pattern.shape[0]):
                        paid = float(pattern[head, query, key])
                        by_position.setdefault((layer, head, key), []).append(paid)
                        by_group.setdefault((watched, layer, head), []).append(paid)
    return by_position, by_group, lengths, texts_with_sink


def check(found: AttentionSinks, by_position, by_group, lengths, texts_with_sink):
    for place, sinks in texts_with_sink.items():
        assert float(found.sink_texts[place]) == pytest.approx(sum(sinks) / 3)
    assert found.published_sink_rate == pytest.approx(float(found.sink_texts.mean()))
    for (layer, head, key), paid in by_position.items():
        assert float(found.received[layer, head, key]) == pytest.approx(sum(paid) / len(paid), abs=1e-6)
    for watched, received in ((True, found.watched_received), (False, found.other_received)):
        for place, paid in ((p[1:], paid) for p, paid in by_group.items() if p[0] == watched):
            assert float(received[place]) == pytest.approx(sum(paid) / len(paid), abs=1e-6)
    tables = {
        ("k", True): found.watched_key_norm, ("k", False): found.other_key_norm,
        ("v", True): found.watched_value_norm, ("v", False): found.other_value_norm,
    }  # fmt: skip
    for (kind, watched, layer, head), norms in lengths.items():
        assert float(tables[kind, watched][layer, head]) == pytest.approx(sum(norms) / len(norms), rel=1e-5)


@pytest.mark.parametrize(("name", "backend"), tiny.BOOTING)
def test_sinks_are_those_of_explicit_loops(name, backend):
    model = tiny.wrap(tiny.ARCHITECTURES[name](), backend)
    table = pd.DataFrame({"text": [0, 0, 1, 3], "position": [2, 5, 0, 3]})
    rows = {tuple(row) for row in table.to_numpy().tolist()}
    expected = pair_by_pair(model, TEXTS, lambda number, key, text: (number, key) in rows)
    found = attention_sinks(model, TEXTS, table, progress=False)
    check(found, *expected)
    assert found.received.shape[2] == 6
    assert found.received[:, :, 5].isnan().all()
    assert (found.n_texts, found.n_tokens, found.n_watched) == (4, 14, 4)


def test_batches_do_not_matter_and_texts_are_read_once(tiny_model):
    whole = attention_sinks(tiny_model, TEXTS, ["9"], progress=False)
    for batch_tokens in (1, 8):
        found = attention_sinks(tiny_model, iter(TEXTS), ["9"], batch_tokens=batch_tokens, progress=False)
        for name in ("received", "watched_received", "other_received", "watched_key_norm", "other_value_norm"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-7, equal_nan=True)


def test_behaviour_tells_the_same_of_the_first_key(tiny_model):
    found = attention_sinks(tiny_model, TEXTS, progress=False)
    behaviour = observe_behaviour(tiny_model, TEXTS, progress=False)
    torch.testing.assert_close(found.on_first, behaviour.sinks)
    torch.testing.assert_close(found.watched_received, behaviour.sinks)
    assert found.sink_rate == behaviour.sink_rate


def test_texts_are_cut(tiny_llama):
    text = torch.arange(3, 23)
    found = attention_sinks(tiny_llama, [text], max_length=7, progress=False)
    assert found.received.shape[2] == found.n_tokens == 7
    torch.testing.assert_close(
        found.received, attention_sinks(tiny_llama, text[:7], progress=False).received, equal_nan=True
    )


def test_attention_that_is_paid_adds_up(tiny_model):
    """Every later query pays 1, less what it pays to itself: totals over keys, whatever the texts."""
    pattern = tiny_model.run_with_cache(TEXTS[0][None])[1]["blocks.1.attn.hook_pattern"]
    real = torch.ones(1, 6, dtype=torch.bool)
    itself = pattern.diagonal(dim1=2, dim2=3).double().sum(dim=2)
    torch.testing.assert_close(received_attention(pattern, real).sum(dim=2), 6 - itself, rtol=0, atol=1e-5)
    assert received_attention(pattern, real, 2).shape == (1, 4, 2)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_the_planted_sink_head_is_found_wherever_its_token_stands(backend):
    defect = planted.sink()
    model = tiny.wrap(defect.hf_model, backend)
    place = (planted.SINK_LAYER, planted.SINK_HEAD)
    in_front = torch.stack([text.roll(-int((text == planted.TOKEN).nonzero()[0])) for text in defect.texts])
    for texts, watch in ((in_front, 0), (defect.texts, [str(planted.TOKEN)])):
        found = attention_sinks(model, texts, watch, progress=False)
        assert (found.watched_received > 0.3).nonzero().tolist() == [list(place)]
        assert float(found.watched_received[place]) > 0.95
        assert float(found.other_received[place]) < 0.1  # what is paid before the token has been
        longer = found.watched_key_norm / found.other_key_norm
        assert float(longer[planted.SINK_LAYER, 1]) > 20  # the second key-value head: its queries are heads 2 and 3
        assert float(longer[: planted.EXPLOSION].max()) < 3
        assert found.watched_sink_rate == 1 / 24
        assert (found.on_first[place] > 0.3) == (watch == 0)
    table = found.to_dataframe().set_index(["layer", "head"])
    assert table.watched_key_norm[3, 2] == table.watched_key_norm[3, 3] == float(found.watched_key_norm[3, 1])
    assert table.watched_key_norm[3, 0] == table.watched_key_norm[3, 1] == float(found.watched_key_norm[3, 0])


def test_rates_are_shares_of_heads():
    nan = math.nan
    received = torch.tensor(
        [[[0.31, 0.1, nan], [0.3, 0.5, nan]], [[0.9, 0, nan], [0.2, 0.4, nan]]], dtype=torch.float64
    )
    norms = torch.ones(2, 1, dtype=torch.float64)
    found = AttentionSinks(
        1, 3, 1, received, received[:, :, 0], received[:, :, 1], received[:, :, 0], norms, norms, norms, norms
    )
    assert found.sink_rate == 0.5  # 0.3 itself is none
    assert found.sink_rates.tolist()[:2] == [0.5, 0.5]
    assert math.isnan(found.sink_rates[2])
    assert found.watched_sink_rate == 0.5
    assert found.by_layer().sink.tolist() == [0.5, 0.5]
    assert "50.0 % of 4 heads" in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    ("texts", "watch", "message"),
    [
        (
            [torch.tensor([5]), torch.tensor([6])],
            0,
            "every text has a single token, which only sees itself: pass longer texts",
        ),
        (TEXTS, ["nowhere"], "the texts have none of the tokens to watch"),
        (TEXTS, 50, "the texts have none of the tokens to watch"),
        (TEXTS, pd.DataFrame({"text": [0]}), "the table of tokens has no column 'position'"),
        ([], 0, "there are no texts"),
    ],
)
def test_what_cannot_be_measured_is_named(tiny_llama, texts, watch, message):
    with pytest.raises(InputError, match=message):
        attention_sinks(tiny_llama, texts, watch, progress=False)


def test_keys_that_are_not_finite_are_an_error(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].attn.W_V[0, 0, 0] = float("inf")
        tiny_llama.blocks[1].attn.W_O[0, 0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"the activations are not finite at blocks\.[12]\.attn\.hook_"):
        attention_sinks(tiny_llama, TEXTS, progress=False)
