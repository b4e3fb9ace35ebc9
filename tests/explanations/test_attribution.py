import dataclasses
import types
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM

from sd_lens import attribute, attribute_neurons, attribute_sources
from sd_lens.errors import InputError, NotSupportedError, NumericalError
from sd_lens.models.blocks import block_writes
from tests import planted, tiny

TEXT = torch.tensor([3, 14, 15, 9, 26, 5])


def cache_of(model, tokens=TEXT):
    with torch.no_grad():
        return model.run_with_cache(tokens[None])[1]


def folded(hf_model):
    """The processing that TransformerLens does by default: norms folded, writes centred."""
    model = tiny.wrap(hf_model, "hooked_transformer" if "hooked_transformer" in tiny.BACKENDS else "bridge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(model, "enable_compatibility_mode"):
            model.enable_compatibility_mode()
        else:
            model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    return model


def test_contributions_sum_to_the_norm_of_every_token_after_every_block(tiny_model):
    cache = cache_of(tiny_model)
    for layer in range(tiny_model.cfg.n_layers):
        for position in (0, 3, 5):
            found = attribute(tiny_model, TEXT, position, layer)
            norm = cache[f"blocks.{layer}.hook_resid_post"][0, position].double().norm().item()
            assert found.total == pytest.approx(norm, rel=1e-5)
            assert found.norm == pytest.approx(norm, rel=1e-5)
            assert found.table.contribution.sum() == pytest.approx(norm, rel=1e-5)
            assert found.table.share.sum() == pytest.approx(1, rel=1e-5)
            assert found.residual_error < 1e-5
            assert (found.layer, found.position) == (layer, position)


def test_each_contribution_is_what_the_component_wrote(tiny_model):
    """Against every write formed in full from the cache."""
    u = torch.randn(tiny_model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cache, layer, position = cache_of(tiny_model), 2, 4
    table = attribute(tiny_model, TEXT, position, layer, direction=u).table.set_index("component")
    expected = {"embed": cache["hook_embed"][0, position]}
    if tiny_model.cfg.positional_embedding_type == "standard":
        expected["pos_embed"] = cache["hook_pos_embed"].expand(1, 6, -1)[0, position]
    for block in range(layer + 1):
        attn, mlp = tiny_model.blocks[block].attn, tiny_model.blocks[block].mlp
        for head in range(tiny_model.cfg.n_heads):
            expected[f"L{block}H{head}"] = cache[f"blocks.{block}.attn.hook_z"][0, position, head] @ attn.W_O[head]
        b_O, b_out = getattr(attn, "b_O", None), getattr(mlp, "b_out", None)
        expected[f"L{block}MLP"] = cache[f"blocks.{block}.hook_mlp_out"][0, position]
        if b_O is not None and bool(b_O.any()):
            expected[f"L{block}b_O"] = b_O
        if b_out is not None and bool(b_out.any()):
            expected[f"L{block}b_out"] = b_out
            expected[f"L{block}MLP"] = expected[f"L{block}MLP"] - b_out
    assert set(table.index) == set(expected)
    for name, write in expected.items():
        length = float(write.detach().double() @ u / u.norm())
        assert table.contribution[name] == pytest.approx(length, abs=1e-5), name
    assert table["head"]["L1H3"] == 3
    assert table.layer["L1H3"] == 1
    assert table.kind["L1H3"] == "head"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_models_are_attributed_too(family):
    found = attribute(folded(tiny.family(family)), TEXT, 3, 2)
    assert found.residual_error < 1e-5
    assert found.table.contribution.abs().max() > 0


def test_writes_that_do_not_sum_are_refused():
    config = GraniteConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, residual_multiplier=0.3,
    )  # fmt: skip
    model = tiny.wrap(tiny.randomised(GraniteForCausalLM(config)), "bridge")
    with pytest.raises(NotSupportedError, match=r"writes of heads and MLPs miss the residual stream by .* of its norm"):
        attribute(model, TEXT, 3, 1)


def test_the_planted_mlp_and_neuron_are_found(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    text = planted_defect.texts[5]
    found = attribute(model, text, position=5, layer=planted.EXPLOSION)
    assert found.table.iloc[int(found.table.contribution.argmax())].component == f"L{planted.EXPLOSION}MLP"
    assert found.table.share.max() > 0.95
    neurons = attribute_neurons(model, found, planted.EXPLOSION)
    assert int(neurons.table.contribution.argmax()) == 3
    assert neurons.table.share.max() > 0.95
    # who undoes it: the decay block writes against the direction
    after = attribute(model, text, 5, planted.DECAY, planted_defect.direction)
    least = after.table.iloc[int(after.table.contribution.argmin())]
    assert (least.component, after.table.share.sum()) == (f"L{planted.DECAY}MLP", pytest.approx(1, rel=1e-4))
    assert least.contribution < -0.8 * found.total
    assert int(attribute_neurons(model, after, planted.DECAY).table.contribution.argmin()) == 5


def test_the_default_block_is_that_of_the_largest_norm(planted_defect):
    model = tiny.wrap(planted_defect.hf_model, "auto")
    cache = cache_of(model, planted_defect.texts[5])
    norms = [float(cache[f"blocks.{i}.hook_resid_post"][0, 5].norm()) for i in range(planted.N_LAYERS)]
    assert attribute(model, planted_defect.texts[5], 5).layer == norms.index(max(norms))


def test_neurons_sum_to_their_mlp_and_sources_to_their_head(tiny_model):
    found = attribute(tiny_model, TEXT, 4, 2)
    contribution = found.table.set_index("component").contribution
    cache = cache_of(tiny_model)
    for layer in range(3):
        neurons = attribute_neurons(tiny_model, found, layer)
        assert neurons.table.contribution.sum() == pytest.approx(contribution[f"L{layer}MLP"], rel=1e-4, abs=1e-6)
        assert neurons.residual_error < 1e-6
        W_out = block_writes(tiny_model, layer).W_out
        post = cache[f"blocks.{layer}.mlp.hook_post"][0, 4]
        expected = post[7].double() * (W_out[7].double() @ found.direction)
        assert neurons.table.contribution[7] == pytest.approx(float(expected), abs=1e-6)
        for head in range(4):
            sources = attribute_sources(tiny_model, found, layer, head)
            assert len(sources.table) == 5
            assert sources.table.contribution.sum() == pytest.approx(contribution[f"L{layer}H{head}"], abs=1e-5)
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, 4, :5]
            assert sources.table.attention.tolist() == pytest.approx(pattern.tolist(), abs=1e-6)


def test_under_grouped_queries_a_source_reads_its_own_value_head():
    """Heads 2 and 3 share the second value head: with that one silent, they write nothing, heads 0 and 1 do."""
    hf_model = tiny.llama()
    with torch.no_grad():
        hf_model.model.layers[1].self_attn.v_proj.weight[8:] = 0
    for backend in tiny.BACKENDS:
        model = tiny.wrap(hf_model, backend)
        found = attribute(model, TEXT, 4, 1)
        lengths = [attribute_sources(model, found, 1, head).table.contribution.abs().max() for head in range(4)]
        assert lengths[2:] == [0, 0]
        assert min(lengths[:2]) > 1e-4


def test_a_cache_gives_the_same_without_a_run(tiny_model):
    cache = cache_of(tiny_model)
    own, from_cache = attribute(tiny_model, TEXT, 3), attribute(tiny_model, TEXT, 3, cache=cache)
    torch.testing.assert_close(
        torch.tensor(own.table.contribution), torch.tensor(from_cache.table.contribution), rtol=1e-4, atol=1e-6
    )
    cache.remove_batch_dim()
    again = attribute(tiny_model, TEXT, 3, 1, cache=cache)
    assert again.total == pytest.approx(attribute(tiny_model, TEXT, 3, 1).total, rel=1e-5)
    with tiny_model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: 0 * x)]):  # nothing is run
        neurons = attribute_neurons(tiny_model, again, 1, cache=cache)
        sources = attribute_sources(tiny_model, again, 1, 2, cache=cache)
    assert neurons.total == pytest.approx(attribute_neurons(tiny_model, again, 1).total, rel=1e-4)
    assert sources.total == pytest.approx(attribute_sources(tiny_model, again, 1, 2).total, rel=1e-4)


def test_unusable_caches_are_named(tiny_llama):
    cache = cache_of(tiny_llama)
    partial = {name: value for name, value in cache.items() if name != "blocks.1.attn.hook_z"}
    with pytest.raises(InputError, match=r"the cache lacks 'blocks\.1\.attn\.hook_z': make it with model\.run_with_"):
        attribute(tiny_llama, TEXT, 3, 2, cache=partial)
    with pytest.raises(InputError, match="the cache is of another text or model"):
        attribute(tiny_llama, TEXT.flip(0), 3, 2, cache=cache)
    with pytest.raises(InputError, match="the cache holds 2 texts of 6 tokens: expected one of 4 or more"):
        attribute(tiny_llama, TEXT, 3, 2, cache=tiny_llama.run_with_cache(TEXT.expand(2, -1))[1])
    with pytest.raises(InputError, match="the cache holds 1 texts of 2 tokens: expected one of 4 or more"):
        attribute(tiny_llama, TEXT, 3, 2, cache=cache_of(tiny_llama, TEXT[:2]))


def test_text_and_tokens_mean_the_same(tiny_llama):
    by_text = attribute(tiny_llama, "w0 w11 w12", -1, 1, prepend_bos=True)
    assert by_text.tokens == ("<s>", "w0", "w11", "w12")
    by_tokens = attribute(tiny_llama, torch.tensor([[1, 3, 14, 15]]), 3, 1)
    assert by_text.total == pytest.approx(by_tokens.total)
    assert by_text.position == 3


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99))
def test_contributions_are_odd_in_the_direction_and_ignore_its_length(scale, sign, seed):
    model = _shared()
    u = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    one, other = (attribute(model, TEXT, 2, 2, v).table.contribution for v in (u, sign * scale * u))
    torch.testing.assert_close(torch.tensor(one) * sign, torch.tensor(other), rtol=1e-4, atol=1e-5)


def _shared(models=[]):  # noqa: B006 - hypothesis wants one model for all examples
    if not models:
        models.append(tiny.wrap(tiny.llama(), "auto"))
    return models[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": 6}, "position 6 does not exist: the text has 6 tokens"),
        ({"position": -7}, "position -7 does not exist"),
        ({"layer": 3}, "block 3 does not exist: the model has blocks 0 to 2"),
        ({"layer": -1}, "block -1 does not exist"),
        ({"direction": torch.zeros(32)}, "expected 32 finite numbers, not all 0"),
        ({"direction": torch.ones(31)}, r"direction of shape \(31,\): expected 32"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, options, message):
    with pytest.raises(InputError, match=message):
        tiny.unchecked(attribute)(tiny_llama, TEXT, **options)


def test_bad_texts_are_named(tiny_llama):
    with pytest.raises(InputError, match="expected one text, not 2"):
        attribute(tiny_llama, TEXT.reshape(2, 3))
    with pytest.raises(InputError, match="the text has 70 tokens: expected 1 to 64"):
        attribute(tiny_llama, TEXT[:1].expand(70))
    with pytest.raises(InputError, match="the text has 0 tokens"):
        attribute(tiny_llama, "", prepend_bos=False)


def test_drilling_stays_within_the_attribution(tiny_llama):
    found = attribute(tiny_llama, TEXT, 3, 1)
    with pytest.raises(InputError, match="L2MLP writes behind block 1, whose stream was attributed"):
        attribute_neurons(tiny_llama, found, 2)
    with pytest.raises(InputError, match="L1H4 does not exist: block 1 has heads 0 to 3"):
        attribute_sources(tiny_llama, found, 1, 4)


def test_a_stream_that_is_not_finite_is_an_error(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        attribute(tiny_llama, TEXT, 3, 2)


def test_half_precision_carries_its_error():
    from sd_lens import load_model

    model = load_model(tiny.llama(), device="cpu", dtype=torch.bfloat16)
    found = attribute(model, TEXT, 3, 2)
    assert 1e-6 < found.residual_error < 0.05


def test_results_print_in_one_line_and_are_frozen(tiny_llama):
    found = attribute(tiny_llama, TEXT, 3, 1)
    assert "not verified by ablation yet" in str(found)
    assert "\n" not in str(found)
    assert "NeuronAttribution of L1MLP" in str(attribute_neurons(tiny_llama, found, 1))
    assert "SourceAttribution of L1H0" in str(attribute_sources(tiny_llama, found, 1, 0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.total = 1.0


def test_a_cache_that_shares_only_the_first_token_is_refused(tiny_llama):
    other = TEXT.clone()
    other[2] = 44
    with pytest.raises(InputError, match="the cache is of another text or model"):
        attribute(tiny_llama, TEXT, 3, 2, cache=cache_of(tiny_llama, other))


def test_shares_of_parts_are_of_the_attributed_length(tiny_llama):
    u = torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = attribute(tiny_llama, TEXT, 3, 2, u)
    assert abs(found.total) < 0.9 * found.norm
    for table in (attribute_neurons(tiny_llama, found, 1).table, attribute_sources(tiny_llama, found, 1, 0).table):
        assert table.share.tolist() == pytest.approx((table.contribution / found.total).tolist())


def test_the_largest_contribution_is_named_whatever_its_sign(tiny_llama):
    found = attribute(tiny_llama, TEXT, 3, 2)
    table = found.table.assign(contribution=[-99.0] + [1.0] * (len(found.table) - 1), share=0.5)
    assert "mostly embed (50.0 %)" in str(dataclasses.replace(found, table=table))


def test_weights_that_cannot_be_attributed_are_named(tiny_llama):
    layer = tiny_llama.blocks[0]
    stub = types.SimpleNamespace(cfg=tiny_llama.cfg, blocks=[types.SimpleNamespace(attn=layer.attn)])
    with pytest.raises(NotSupportedError, match="block 0 has not both attention and MLP"):
        block_writes(stub, 0)
    integers = types.SimpleNamespace(W_O=torch.ones(4, 8, 32, dtype=torch.int8))
    stub.blocks = [types.SimpleNamespace(attn=integers, mlp=layer.mlp)]
    with pytest.raises(NotSupportedError, match="block 0 has no floating-point W_O per head"):
        block_writes(stub, 0)
