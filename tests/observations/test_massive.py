import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_lens import massive_activations
from sd_lens.errors import InputError, NumericalError
from tests import planted, tiny

TEXTS = [torch.tensor([3, 14, 15, 9, 26, 5]), torch.tensor([8, 9, 7]), torch.tensor([9]), torch.tensor([9, 32, 38, 46])]


def states_of(model, texts):
    """`[layer, token, d_model]` streams after each block, from TransformerLens's own cache, text by text."""
    found = []
    for text in texts:
        with torch.no_grad():
            cache = model.run_with_cache(text[None])[1]
        found.append(torch.stack([cache[f"blocks.{i}.hook_resid_post"][0] for i in range(model.cfg.n_layers)]))
    return torch.cat(found, dim=1).double()


def channels_needed(state):
    """One channel after the other, largest first, until 99 % of the squared norm is held."""
    held, n = 0.0, 0
    for size in sorted((float(x) ** 2 for x in state), reverse=True):
        n, held = n + 1, held + size
        if held >= 0.99 * float(state.square().sum()):
            break
    return n


def test_sizes_and_channels_are_those_of_explicit_loops(tiny_model):
    states = states_of(tiny_model, TEXTS)
    first = torch.tensor([True, *[False] * 5, True, False, False, True, True, False, False, False])
    for batch_tokens in (1, 7, 1000):
        found = massive_activations(tiny_model, iter(TEXTS), batch_tokens=batch_tokens, progress=False)
        assert (found.n_tokens, found.n_watched) == (14, 4)
        for layer, rows in enumerate(states):
            assert float(found.largest[layer]) == pytest.approx(float(rows.abs().max()), rel=1e-5)
            assert float(found.median[layer]) == pytest.approx(float(rows.abs().flatten().median()), rel=2e-3)
            needed = torch.tensor([channels_needed(row) for row in rows], dtype=torch.float64)
            assert float(found.watched_channels[layer]) == pytest.approx(float(needed[first].mean()))
            assert float(found.other_channels[layer]) == pytest.approx(float(needed[~first].mean()))
            shares = rows.square() / rows.square().sum(dim=1, keepdim=True)
            torch.testing.assert_close(found.channel_share[layer], shares[first].mean(dim=0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.channel_share.sum(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_planted_channel_is_found_at_its_tokens_and_nowhere_else(family, backend):
    defect = planted.through_one_weight(getattr(planted, family)())
    model = tiny.wrap(defect.hf_model, backend)
    found = massive_activations(model, defect.texts, [str(planted.TOKEN)], progress=False)
    table = found.table
    assert set(table.channel) == {planted.CHANNEL}
    assert set(table.token) == {str(planted.TOKEN)}
    assert sorted(set(table.layer)) == list(range(planted.EXPLOSION, planted.N_LAYERS))
    assert table.absolute.all()
    assert table.relative.all()
    after = table[table.layer == planted.EXPLOSION].sort_values("text")
    assert after.text.tolist() == list(range(40))
    assert after.position.tolist() == [text % 12 for text in range(40)]
    states = states_of(model, defect.texts)[planted.EXPLOSION].reshape(40, 12, -1)
    expected = states[torch.arange(40), torch.arange(40) % 12]
    assert after.value.tolist() == pytest.approx(expected[:, planted.CHANNEL].tolist(), rel=1e-5)
    assert after.share.tolist() == pytest.approx(
        (expected[:, planted.CHANNEL] ** 2 / expected.square().sum(dim=1)).tolist(), rel=1e-5
    )
    assert after.ratio.tolist() == pytest.approx(
        (expected[:, planted.CHANNEL].abs() / states.abs().flatten().median()).tolist(), rel=2e-3
    )
    assert found.watched_channels[planted.EXPLOSION] == 1
    assert found.other_channels[planted.EXPLOSION] > 20
    summary = found.channels()
    assert summary["count"].tolist() == [40] * len(summary)
    assert summary.largest.tolist() == pytest.approx(found.largest[planted.EXPLOSION :].tolist())
    assert found.to_dataframe().absolute.tolist() == [0] * planted.EXPLOSION + [40] * (6 - planted.EXPLOSION)
    assert f"channels {planted.CHANNEL};" in str(found)
    assert "\n" not in str(found)


@settings(max_examples=6, deadline=None)
@given(exponent=st.integers(-3, 3))
def test_only_the_relative_criterion_ignores_the_scale_of_the_stream(exponent):
    """Powers of 16, which are whole numbers of the histogram's bins."""
    defect = planted.through_one_weight(planted.llama())
    scale = 16.0**exponent
    with torch.no_grad():
        model = defect.hf_model.model
        model.embed_tokens.weight *= scale
        for layer in model.layers:
            layer.self_attn.o_proj.weight *= scale
            layer.mlp.down_proj.weight *= scale
    found = massive_activations(tiny.wrap(defect.hf_model, "auto"), defect.texts, progress=False)
    relative = found.table[found.table.relative]
    assert len(relative) == 40 * (planted.N_LAYERS - planted.EXPLOSION)
    assert bool(found.table.absolute.any()) == (float(found.largest.max()) > 100)
    torch.testing.assert_close(found.usual_threshold, torch.clamp(1000 * found.median, min=100.0))


def test_a_cut_table_says_so_and_holds_the_largest():
    defect = planted.through_one_weight(planted.llama())
    model = tiny.wrap(defect.hf_model, "auto")
    whole = massive_activations(model, defect.texts, progress=False).table
    with pytest.warns(UserWarning, match="a layer has more than max_entries=7 massive activations"):
        cut = massive_activations(model, defect.texts, max_entries=7, batch_tokens=30, progress=False).table
    for layer in range(planted.EXPLOSION, planted.N_LAYERS):
        largest = whole[whole.layer == layer].value.abs().nlargest(7)
        assert cut[cut.layer == layer].value.abs().tolist() == pytest.approx(largest.tolist())


def test_texts_of_one_token_have_no_gap_but_the_usual_criterion():
    defect = planted.through_one_weight(planted.llama())
    model = tiny.wrap(defect.hf_model, "auto")
    found = massive_activations(model, [torch.tensor([planted.TOKEN]), *torch.arange(20, 30)[:, None]], progress=False)
    assert found.threshold.isinf().all()
    assert found.other_channels.isnan().all()
    assert set(found.table.text) == {0}
    assert not found.table.relative.any()


def test_nothing_massive_is_an_empty_table(tiny_llama):
    found = massive_activations(tiny_llama, TEXTS, progress=False)
    assert len(found.table) == 0
    assert len(found.channels()) == 0
    assert found.to_dataframe().relative.tolist() == [0, 0, 0]
    assert "channels none" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watch": ["nowhere"]}, "the texts have none of the tokens to watch"),
        ({"max_entries": 0}, "max_entries=0: expected at least one"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, options, message):
    with pytest.raises(InputError, match=message):
        massive_activations(tiny_llama, TEXTS, progress=False, **options)


def test_a_stream_that_is_not_finite_is_an_error(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[0, 0] = math.nan
    with pytest.raises(NumericalError, match=r"not finite at blocks\.1\.hook_resid_post, texts 0 to 3"):
        massive_activations(tiny_llama, TEXTS, progress=False)
