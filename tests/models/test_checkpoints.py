"""Singular defects straight from a folder, against those of the same model in memory."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd_lens import singular_defects
from sd_lens.errors import InputError, ModelLoadError, NotSupportedError
from sd_lens.explanations import defects
from sd_lens.models.checkpoints import open_checkpoint
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


def assert_equal(found, expected):
    assert (found.layers, found.convention) == (expected.layers, expected.convention)
    for part in ("block", "attention", "ffn"):
        for field in ("left", "values", "right", "gap"):
            one, other = getattr(getattr(found, part), field), getattr(getattr(expected, part), field)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_folder_gives_what_the_loaded_model_gives(name, shard, tmp_path):
    hf_model = tiny.ARCHITECTURES[name]()
    hf_model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).is_file() == (shard == "20KB")
    assert_equal(
        singular_defects(tmp_path, progress=False), singular_defects(tiny.wrap(hf_model, "bridge"), progress=False)
    )


def test_names_without_their_first_part_are_known(tmp_path):
    """As in the published GPT-2."""
    hf_model = tiny.gpt2()
    hf_model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path)
    assert_equal(
        singular_defects(tmp_path, progress=False), singular_defects(tiny.wrap(hf_model, "bridge"), progress=False)
    )


def test_a_string_and_some_layers_will_do(folder):
    found = singular_defects(str(folder), layers=[2, 0], progress=False)
    assert (found.layers, found.model_name) == ((2, 0), "llama")
    everything = singular_defects(folder, progress=False)
    assert torch.equal(found.block.left, everything.block.left[[2, 0]])


def test_the_stored_dtype_is_kept(tmp_path):
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path)
    for i, block in enumerate(open_checkpoint(tmp_path).blocks([0, 2])):
        assert block.layer == (0, 2)[i]
        assert {block.W_V.dtype, block.W_O.dtype, block.W_in.dtype, block.mlp_norm.gain.dtype} == {torch.bfloat16}


def test_blocks_are_read_one_after_the_other(folder, monkeypatch):
    events = []
    read, analyse = defects.open_checkpoint, defects.block_parts

    def watched(source):
        checkpoint = read(source)
        inner = type(checkpoint)._block
        monkeypatch.setattr(
            type(checkpoint), "_block", lambda self, layer, names: events.append("read") or inner(self, layer, names)
        )
        return checkpoint

    monkeypatch.setattr(defects, "open_checkpoint", watched)
    monkeypatch.setattr(defects, "block_parts", lambda *a, **k: events.append("analysed") or analyse(*a, **k))
    singular_defects(folder, progress=False)
    assert events == ["read", "analysed"] * 3


@pytest.mark.parametrize(("layers", "message"), [([3], "block 3 does not exist: the model has blocks 0 to 2"),
                                                 ([], "layers is empty")])  # fmt: skip
def test_layers_are_checked_before_any_weight_is_read(folder, layers, message):
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(InputError, match=message):
        singular_defects(folder, layers, progress=False)


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def remove_weights(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def transpose(folder):
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    with safe_open(shard, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    save_file(tensors | {name: tensors[name].T.contiguous()}, shard)


DAMAGE = {
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "cannot read the config.json": lambda folder: (folder / "config.json").write_text("{"),
    "holds neither model.safetensors nor": remove_weights,
    "has no model-00001-of-.*fetch the missing shard": lambda folder: first_shard(folder).unlink(),
    "index.json is damaged": lambda folder: (folder / INDEX).write_text("{}"),
    "has no tensor model.layers.1.mlp.up_proj.weight": lambda folder: rewrite_index(
        folder, lambda names: names.pop("model.layers.1.mlp.up_proj.weight")
    ),
    "block 0 in .* does not fit its config.json": transpose,
    "cannot read the weights in": lambda folder: [path.write_bytes(b"no") for path in folder.glob("*.safetensors")],
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_folders_are_named_as_such(message, folder):
    DAMAGE[message](folder)
    with pytest.raises(ModelLoadError, match=message):
        singular_defects(folder, progress=False)


@pytest.mark.parametrize("name", ["smollm2-135m", "/nowhere/to/be/found", "gpt2"])
def test_only_folders_are_read(name):
    with pytest.raises(ModelLoadError, match="expected a folder in Hugging Face's layout or a loaded model"):
        singular_defects(name, progress=False)


def test_architectures_and_quantised_weights_that_are_not_covered(tmp_path, folder):
    tiny.mixtral().save_pretrained(tmp_path / "mixtral")
    with pytest.raises(NotSupportedError, match="not supported yet: MixtralForCausalLM straight from a folder; load"):
        singular_defects(tmp_path / "mixtral", progress=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(NotSupportedError, match="quantised weights"):
        singular_defects(folder, progress=False)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(NotSupportedError, match="not causal decoders"):
        singular_defects(folder, progress=False)
