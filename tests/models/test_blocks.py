import types

import pytest
import torch
import transformers

from sd_lens.errors import InputError, NotSupportedError
from sd_lens.models.blocks import block_weights
from tests import tiny


def test_view_holds_the_hugging_face_weights(backend):
    hf_model = tiny.llama()
    layer = hf_model.model.layers[1]
    expected = {
        "W_in": layer.mlp.up_proj.weight.T.clone(),
        "W_gate": layer.mlp.gate_proj.weight.T.clone(),
        "W_out": layer.mlp.down_proj.weight.T.clone(),
        "W_V": layer.self_attn.v_proj.weight.view(2, 8, 32).mT.clone(),
        "W_O": layer.self_attn.o_proj.weight.T.reshape(4, 8, 32).clone(),
    }
    gains = layer.input_layernorm.weight.clone(), layer.post_attention_layernorm.weight.clone()
    block = block_weights(tiny.wrap(hf_model, backend), 1)
    for name, tensor in expected.items():
        assert torch.equal(getattr(block, name), tensor), name
    assert torch.equal(block.attention_norm.gain, gains[0])
    assert torch.equal(block.mlp_norm.gain, gains[1])
    assert (block.attention_norm.kind, block.attention_norm.bias) == ("rms", None)
    assert (block.act_fn, block.layer, block.d_model) == ("silu", 1, 32)


def test_gpt2_has_biases_and_no_gate(backend):
    hf_model = tiny.gpt2()
    layer = hf_model.transformer.h[2]
    b_in, b_norm, W_in = layer.mlp.c_fc.bias.clone(), layer.ln_2.bias.clone(), layer.mlp.c_fc.weight.clone()
    block = block_weights(tiny.wrap(hf_model, backend), 2)
    assert block.W_gate is None
    assert torch.equal(block.b_in, b_in)
    assert torch.equal(block.W_in, W_in)
    assert torch.equal(block.mlp_norm.bias, b_norm)
    assert (block.mlp_norm.kind, block.act_fn) == ("layer", "gelu_new")


@pytest.mark.parametrize("layer", [-1, 3])
def test_missing_blocks_are_named(tiny_model, layer):
    with pytest.raises(InputError, match=rf"block {layer} does not exist: the model has blocks 0 to 2"):
        block_weights(tiny_model, layer)


def unsupported(model, **changes):
    """The same model with its configuration or blocks changed."""
    cfg = types.SimpleNamespace(**{**vars(model.cfg), **changes.pop("cfg", {})})
    cfg.n_layers, cfg.n_key_value_heads = model.cfg.n_layers, model.cfg.n_key_value_heads
    block = types.SimpleNamespace(**{name: getattr(model.blocks[0], name) for name in ("ln1", "ln2", "attn", "mlp")})
    for name, value in changes.items():
        delattr(block, name) if value is None else setattr(block, name, value)
    return types.SimpleNamespace(cfg=cfg, blocks=[block])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ln1_post": object()}, "ln1_post without a gain"),
        ({"ln2": None}, "without a norm before"),
        ({"mlp": types.SimpleNamespace(W_gate=None)}, "MLPs without W_in and W_out"),
        ({"cfg": {"normalization_type": "DyT"}}, "normalization 'DyT'"),
    ],
)
def test_other_architectures_say_not_supported_yet(backend, changes, sentence):
    model = unsupported(tiny.wrap(tiny.llama(), backend), **changes)
    with pytest.raises(NotSupportedError, match=f"not supported yet: .*{sentence}"):
        block_weights(model, 0)


@pytest.mark.parametrize("family", ["Granite", "Olmo2", "Cohere", "Olmoe"])
def test_real_models_of_other_architectures_are_refused(family):
    options = {
        "Granite": {"residual_multiplier": 0.1},
        "Olmo2": {},
        "Cohere": {"logit_scale": 0.1},
        "Olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    }[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, **options,
    )  # fmt: skip
    hf_model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with pytest.raises(NotSupportedError, match="not supported yet: "):
        block_weights(tiny.wrap(hf_model, "bridge"), 0)


@pytest.mark.parametrize(
    ("hf_model", "sentence"),
    [
        (lambda: tiny.opt(do_layer_norm_before=False), "norms behind the residual sum"),
        (lambda: tiny.mpt(attn_config=transformers.models.mpt.configuration_mpt.MptAttentionConfig(clip_qkv=0.1)),
         "clipped queries, keys and values"),
    ],
    ids=["OPT-350m", "clipped MPT"],
)  # fmt: skip
def test_variants_that_the_linear_maps_do_not_cover_are_refused(hf_model, sentence):
    with pytest.raises(NotSupportedError, match=f"not supported yet: {sentence}"):
        block_weights(tiny.wrap(hf_model(), "bridge"), 0)
