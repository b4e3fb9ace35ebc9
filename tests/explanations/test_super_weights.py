import pandas as pd
import pytest
import torch

from sd_lens import ablate, attribute, attribute_neurons, observe_behaviour, super_weights
from sd_lens.errors import InputError, NotSupportedError
from tests import planted, tiny
from tests.models.test_hooks import assert_unchanged, state

TEXTS = [torch.tensor([3, 14, 15, 9, 26, 5]), torch.tensor([8, 9, 7]), torch.tensor([9, 32, 38, 46])]


def zeroed(name, backend, *places):
    """The same model, made again, with entries of block 1's `W_out` zero in its weights."""
    model = tiny.wrap(tiny.ARCHITECTURES[name](), backend)
    with torch.no_grad():
        for neuron, channel in places:
            model.blocks[1].mlp.W_out[neuron, channel] = 0
            assert model.blocks[1].mlp.W_out[neuron, channel] == 0
    return model


@pytest.mark.parametrize(("name", "backend"), tiny.BOOTING)
def test_norms_and_losses_are_those_of_models_with_the_weight_zero(name, backend):
    model = tiny.wrap(tiny.ARCHITECTURES[name](), backend)
    before = state(model)
    found = super_weights(model, TEXTS, 1, neurons=1, entries=2, progress=False)
    assert_unchanged(before, state(model))
    first, second = zip(found.entries.neuron, found.entries.channel, strict=True)
    row = found.entries.iloc[0]
    without = observe_behaviour(zeroed(name, backend, first), TEXTS, progress=False)
    assert row.norm == pytest.approx(float(without.watched_norm[1]), rel=1e-5)
    assert row.loss == pytest.approx(without.loss, rel=1e-5)
    assert row.sink == pytest.approx(float(without.sinks.mean()), rel=1e-4)
    assert row.loss != pytest.approx(found.before["loss"], rel=1e-6)
    together = ablate(model, TEXTS, list(found.entries.component), progress=False)
    without = observe_behaviour(zeroed(name, backend, first, second), TEXTS, progress=False)
    assert together.after.loss == pytest.approx(without.loss, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_planted_neuron_and_weight_are_found(family, backend):
    defect = planted.through_one_weight(getattr(planted, family)())
    model = tiny.wrap(defect.hf_model, backend)
    where = [str(planted.TOKEN)]
    found = super_weights(model, defect.texts[:13], planted.EXPLOSION, where, neurons=2, entries=2, progress=False)
    assert (found.n_tokens, found.n_neurons) == (13, 1)
    assert (found.neurons.component[0], found.entries.component[0]) == ("L2N3", f"L2N3C{planted.CHANNEL}")
    assert found.neurons.share[0] == pytest.approx(1, abs=0.01)
    assert found.entries.share[0] == pytest.approx(1, abs=0.01)
    assert found.before["norm"] > 100 * found.without["norm"]
    for table in (found.neurons, found.entries):
        assert table.norm[0] < 0.01 * found.before["norm"]
        assert table.norm[1] == pytest.approx(found.before["norm"], rel=0.01)
    assert float(found.direction[planted.CHANNEL]) > 0.999
    assert "1 of" in str(found)
    assert f"single weight L2N3C{planted.CHANNEL}" in str(found)
    assert "\n" not in str(found)
    assert found.to_dataframe().kind.tolist() == ["neuron", "neuron", "weight", "weight"]


def test_contributions_are_means_of_those_of_single_tokens(tiny_model):
    u = torch.randn(32, generator=torch.Generator().manual_seed(0))
    table = pd.DataFrame({"text": [0, 0, 2], "position": [1, 4, 2]})
    found = super_weights(tiny_model, TEXTS, 1, table, u, neurons=4, entries=1, batch_tokens=6, progress=False)
    singles = [
        attribute_neurons(tiny_model, attribute(tiny_model, TEXTS[text], position, 1, u), 1)
        for text, position in table.to_numpy().tolist()
    ]
    mean = sum(torch.tensor(single.table.contribution.to_numpy()) for single in singles) / 3
    written = sum(single.total for single in singles) / 3
    assert found.written == pytest.approx(written, rel=1e-4, abs=1e-6)
    assert found.neurons.neuron.tolist() == (mean / written).topk(4).indices.tolist()
    assert found.neurons.contribution.tolist() == pytest.approx(mean[found.neurons.neuron].tolist(), abs=1e-6)
    assert found.neurons.share.tolist() == pytest.approx((mean / written)[found.neurons.neuron].tolist(), abs=1e-5)
    # how few reach 99 %: adding up one by one, in the sense of the write
    parts = sorted((c / written for c in mean.tolist()), reverse=True)
    totals = [sum(parts[: n + 1]) for n in range(len(parts))]
    assert found.cumulative.tolist() == pytest.approx(totals, abs=1e-4)
    assert found.n_neurons == next(n for n, total in enumerate(totals) if total >= 0.99) + 1
    largest = (mean / written).argsort(descending=True)[: found.n_neurons].tolist()
    together = ablate(tiny_model, TEXTS, [f"L1N{j}" for j in largest], watch=table, progress=False)
    assert found.without["norm"] == pytest.approx(float(together.after.watched_norm[1]), rel=1e-5)
    assert found.without["loss"] == pytest.approx(together.after.loss, rel=1e-5)


def test_entries_are_the_largest_products(tiny_model):
    found = super_weights(tiny_model, TEXTS[:1], 1, 3, neurons=1, entries=5, progress=False)
    with torch.no_grad():
        cache = tiny_model.run_with_cache(TEXTS[0][None])[1]
    products = cache["blocks.1.mlp.hook_post"][0, 3][:, None] * tiny_model.blocks[1].mlp.W_out.detach()
    size, place = products.abs().flatten().topk(5)
    assert found.entries["size"].tolist() == pytest.approx(size.tolist(), rel=1e-5)
    pairs = zip(found.entries.neuron, found.entries.channel, strict=True)
    assert [j * 32 + c for j, c in pairs] == place.tolist()
    stream = cache["blocks.1.hook_resid_post"][0, 3].double()
    torch.testing.assert_close(found.direction, stream / stream.norm(), rtol=1e-5, atol=1e-7)
    for row in found.entries.itertuples():
        length = float(products[row.neuron, row.channel]) * float(stream[row.channel] / stream.norm())
        assert row.contribution == pytest.approx(length, rel=1e-4, abs=1e-7)
        shorter = stream.clone()
        shorter[row.channel] -= float(products[row.neuron, row.channel])
        assert row.norm == pytest.approx(float(shorter.norm()), rel=1e-5)


def test_behind_a_norm_sizes_are_those_that_enter_the_stream():
    model = tiny.wrap(tiny.ARCHITECTURES["gemma2"](), "bridge")
    found = super_weights(model, TEXTS[:1], 1, 3, neurons=3, entries=1, progress=False)
    with torch.no_grad():
        cache = model.run_with_cache(TEXTS[0][None])[1]
    gain = 1 + model.blocks[1].ln2_post.w.detach()
    scale = cache["blocks.1.ln2_post.hook_scale"].reshape(6)[3]
    products = cache["blocks.1.mlp.hook_post"][0, 3][:, None] * model.blocks[1].mlp.W_out.detach() * gain / scale
    assert found.entries["size"][0] == pytest.approx(float(products.abs().max()), rel=1e-5)
    torch.testing.assert_close(products.sum(dim=0), cache["blocks.1.hook_mlp_out"][0, 3], rtol=1e-4, atol=1e-6)
    lengths = products.double() @ found.direction
    assert found.neurons.contribution.tolist() == pytest.approx(lengths[found.neurons.neuron].tolist(), abs=1e-6)
    assert found.written == pytest.approx(float(lengths.sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "block 3 does not exist: the model has blocks 0 to 2"),
        ({"where": ["nowhere"]}, "the texts have none of the tokens that were asked for"),
        ({"direction": torch.zeros(32)}, "expected 32 finite numbers, not all 0"),
        ({"neurons": 0}, "neurons=0, entries=8: expected at least one of each"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, options, message):
    with pytest.raises(InputError, match=message):
        tiny.unchecked(super_weights)(tiny_llama, TEXTS, **{"layer": 1, "progress": False} | options)


def test_mlps_that_write_nothing_or_have_no_neurons_are_named(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out.zero_()
    with pytest.raises(InputError, match="L1MLP writes nothing along the direction at these tokens"):
        super_weights(tiny_llama, TEXTS, 1, progress=False)
    mixture = tiny.wrap(tiny.mixtral(), "bridge")
    with pytest.raises(NotSupportedError, match="the MLP of block 1 has no single matrix W_out"):
        super_weights(mixture, TEXTS, 1, progress=False)


def test_a_hook_that_edits_the_output_is_noticed(tiny_llama):
    edit = [("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)]
    with (
        pytest.raises(NotSupportedError, match="the neurons of L1MLP miss what it writes by"),
        tiny_llama.hooks(fwd_hooks=edit),
    ):
        super_weights(tiny_llama, TEXTS, 1, progress=False)
