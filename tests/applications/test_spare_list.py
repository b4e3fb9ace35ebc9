import json
import re

import pytest

from sd_lens import spare_list
from sd_lens.applications.spare_list import FORMATS
from sd_lens.errors import InputError
from tests import planted, tiny
from tests.oracles.quantized import linear_modules


@pytest.fixture
def many_blocks():
    """Blocks 2 and 12, whose names begin alike."""
    return tiny.llama(num_hidden_layers=13)


@pytest.mark.parametrize("pair", tiny.BOOTING, ids="-".join)
def test_names_are_those_of_transformers_modules(pair):
    name, backend = pair
    hf_model = tiny.ARCHITECTURES[name]()
    modules = linear_modules(hf_model)
    found = spare_list(tiny.wrap(tiny.ARCHITECTURES[name](), backend), [1])
    (module,) = found.modules
    block = hf_model.get_submodule(module)
    # The last linear layer of the block, which reads what the wide MLP gives.
    assert module == [name for name in modules if ".1." in name][-1]
    assert found.n_parameters == block.weight.numel()
    assert found.parameter_share == block.weight.numel() / sum(m.weight.numel() for m in modules.values())


def test_auto_names_the_modules_of_explosion_and_decay():
    found = spare_list(tiny.wrap(planted.exploding_when_initial().hf_model, "auto"))
    assert found.layers == (planted.EXPLOSION, planted.DECAY)
    assert found.modules == tuple(f"transformer.h.{layer}.mlp.c_proj" for layer in found.layers)
    assert str(found).startswith("SpareList: transformer.h.2.mlp.c_proj, transformer.h.4.mlp.c_proj (")


def spared_by_transformers(hf_model, patterns):
    from transformers.quantizers.quantizers_utils import should_convert_module

    return {name for name in linear_modules(hf_model) if not should_convert_module(name, patterns)}


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "transformers"])
def test_transformers_quantizers_spare_just_these(many_blocks, quantizer):
    """By the configuration and the module matching that loading with bitsandbytes uses."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import HfQuantizer

    found = spare_list(tiny.wrap(many_blocks, "auto"), [2, 11])
    (patterns,) = found.arguments(quantizer).values()
    if quantizer == "bitsandbytes":
        patterns = BitsAndBytesConfig(load_in_8bit=True, **found.arguments(quantizer)).llm_int8_skip_modules
    hf_model = tiny.llama(num_hidden_layers=13)
    wanted = HfQuantizer.get_modules_to_not_convert(hf_model, patterns)
    assert spared_by_transformers(hf_model, wanted) == set(found.modules)
    # A list takes the place of the default, which would have spared the unembedding.
    assert "lm_head" in wanted
    assert hf_model.get_submodule("lm_head") is hf_model.get_output_embeddings()


def test_llm_compressors_ignore_list_is_read_by_its_own_library(many_blocks):
    pytest.importorskip("compressed_tensors", reason="needs Python 3.11")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    found = spare_list(tiny.wrap(many_blocks, "auto"), [2, 11])
    hf_model = tiny.llama(num_hidden_layers=13)
    eight_bits = {"num_bits": 8, "strategy": "tensor", "symmetric": True}
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": eight_bits, "input_activations": eight_bits}},
        **found.arguments("llm-compressor"),
    )
    apply_quantization_config(hf_model, config)
    quantized = {name for name, module in hf_model.named_modules() if hasattr(module, "quantization_scheme")}
    assert quantized == set(linear_modules(hf_model)) - set(found.modules)
    assert len(found.modules) == 2


def test_gptqmodels_patterns_leave_out_just_these(many_blocks):
    """Its rule: keys that begin with -: are regular expressions, matched from the start, of modules to leave out."""
    found = spare_list(tiny.wrap(many_blocks, "auto"), [2, 11])
    patterns = [key.removeprefix("-:") for key in found.arguments("gptqmodel")["dynamic"]]
    names = linear_modules(tiny.llama(num_hidden_layers=13))
    assert {name for name in names if any(re.match(p, name) for p in patterns)} == set(found.modules)


def test_every_format_is_json_and_another_is_named(tiny_llama):
    found = spare_list(tiny_llama, [0])
    for quantizer in FORMATS:
        assert "model.layers.0" in json.dumps(found.arguments(quantizer)).replace("\\", "")
    with pytest.raises(InputError, match=r"unknown quantizer 'awq'; expected one of \('bitsandbytes',"):
        found.arguments("awq")


def test_nothing_is_spared_by_an_empty_list(tiny_llama):
    found = spare_list(tiny_llama, [])
    assert (found.modules, found.n_parameters, found.parameter_share) == ((), 0, 0)
    assert "nothing" in str(found)


def test_the_share_is_of_all_linear_layers(tiny_llama):
    weights = sum(m.weight.numel() for m in linear_modules(tiny.llama()).values())
    assert spare_list(tiny_llama, [0, 1, 2]).parameter_share == pytest.approx(3 * 48 * 32 / weights)
    assert isinstance(spare_list(tiny_llama, [0]).n_parameters, int)
