import builtins
import importlib
import json
import shutil

import pytest
import torch
import transformers

from sd_lens import load_model
from sd_lens.errors import CacheError, InputError, ModelLoadError
from sd_lens.models import wrapping
from tests import tiny

TOKENS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture
def folder(tmp_path):
    """A tiny model as a Hugging Face folder, with its tokenizer."""
    where = tmp_path / "tiny-llama"
    tiny.llama().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


def logits(model):
    with torch.no_grad():
        return model(TOKENS)


def test_a_folder_loads_to_the_same_logits(folder, backend):
    model = load_model(folder, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), tiny.llama()(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert model.to_tokens("w0 w1", prepend_bos=False).tolist() == [[3, 4]]
    assert model.cfg.model_name == str(folder)
    assert type(model).__name__ == {"bridge": "TransformerBridge"}.get(backend, "HookedTransformer")


def test_auto_prefers_hooked_transformer_and_falls_back_to_the_bridge(monkeypatch):
    assert type(tiny.wrap(tiny.llama(), "auto")).__name__ == (
        "HookedTransformer" if "hooked_transformer" in tiny.BACKENDS else "TransformerBridge"
    )
    # HookedTransformer ignores GPT-2's n_inner, so it cannot hold this model
    assert type(tiny.wrap(tiny.gpt2(n_inner=48), "auto")).__name__ == "TransformerBridge"


@pytest.mark.skipif("hooked_transformer" not in tiny.BACKENDS, reason="needs TransformerLens 3")
def test_a_wrong_conversion_is_noticed(monkeypatch):
    monkeypatch.setattr(wrapping, "_largest_difference", lambda *_: 0.02)
    with pytest.raises(ModelLoadError, match=r"converts this LlamaForCausalLM wrongly: .* 2\.0e-02"):
        tiny.wrap(tiny.llama(), "hooked_transformer")
    load_model(tiny.llama(), backend="hooked_transformer", dtype=torch.bfloat16)  # rounding alone may do that
    monkeypatch.setattr(wrapping, "_largest_difference", lambda *_: 0.06)
    with pytest.raises(ModelLoadError, match="wrongly"):
        load_model(tiny.llama(), backend="hooked_transformer", dtype=torch.bfloat16)


def test_the_difference_of_two_models_is_seen(backend):
    model = tiny.wrap(tiny.llama(seed=1), backend)
    assert wrapping._largest_difference(tiny.llama(seed=1), model) < 1e-5
    assert wrapping._largest_difference(tiny.llama(seed=2), model) > 0.1


@pytest.mark.skipif("hooked_transformer" in tiny.BACKENDS, reason="needs TransformerLens 4")
def test_hooked_transformer_is_missed_in_a_sentence():
    with pytest.raises(ModelLoadError, match="has no HookedTransformer .* use the bridge"):
        tiny.wrap(tiny.llama(), "hooked_transformer")


@pytest.mark.parametrize("prepends", [False, True])
def test_the_tokenizers_own_habit_is_kept(backend, prepends):
    tokenizer = tiny.tokenizer()
    if prepends:
        from tokenizers.processors import TemplateProcessing

        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model = load_model(tiny.llama(), backend=backend, tokenizer=tokenizer)
    assert model.cfg.default_prepend_bos is prepends
    assert model.to_tokens("w2").tolist() == ([[1, 5]] if prepends else [[5]])


def test_dtype_and_half_precision(backend):
    model = load_model(tiny.llama(), backend=backend, dtype=torch.bfloat16)
    assert model.blocks[0].mlp.W_in.dtype == torch.bfloat16


def test_a_hub_name_and_a_short_name_load_from_the_hubs_cache(tmp_path, monkeypatch, backend):
    """The hub's code path for real, offline: a cache laid out as the hub's client lays it out."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "0123"
    tiny.gpt2().save_pretrained(snapshot)
    tiny.tokenizer().save_pretrained(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for module in (transformers.utils.hub,):
        for name in ("TRANSFORMERS_CACHE", "HF_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path))
    with torch.no_grad():
        expected = tiny.gpt2()(TOKENS).logits
    from sd_lens.models.loading import _official_name

    official = _official_name("gpt2-small")
    assert official in ("gpt2", "openai-community/gpt2")
    if official == "gpt2":
        shutil.copytree(tmp_path / "models--openai-community--gpt2", tmp_path / "models--gpt2")
    for name in ("openai-community/gpt2", "gpt2-small"):
        torch.testing.assert_close(logits(load_model(name, backend=backend)), expected, rtol=1e-4, atol=1e-4)

    early = snapshot.parent / "4567"
    tiny.gpt2(seed=1).save_pretrained(early)
    tiny.tokenizer().save_pretrained(early)
    (snapshot.parent.parent / "refs" / "step1000").write_text("4567")
    with torch.no_grad():
        expected = tiny.gpt2(seed=1)(TOKENS).logits
    model = load_model("openai-community/gpt2", revision="step1000", backend=backend)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.cfg.model_name == "openai-community/gpt2@step1000"


def test_only_hub_names_have_revisions(folder):
    for source in (folder, str(folder), "smollm2-135m", "model.gguf", tiny.llama()):
        with pytest.raises(InputError, match="revision='main': only a hub name has revisions"):
            load_model(source, revision="main")


def test_without_network_a_hub_name_is_one_sentence():
    with pytest.raises(ModelLoadError, match="cannot load the tokenizer of nobody/nothing"):
        load_model("nobody/nothing")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "not a model in Hugging Face's layout: it has no config.json"),
        ("model.safetensors", r"holds no \*\.safetensors weights \(pickled ones are not read\)"),
        ("tokenizer", "has no tokenizer: put tokenizer.json beside the weights"),
    ],
)
def test_incomplete_folders_say_what_is_missing(folder, remove, message):
    for file in folder.glob(f"{remove}*"):
        file.unlink()
    with pytest.raises(ModelLoadError, match=message):
        load_model(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny.llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickled ones are not read"):
        load_model(folder)


def test_damaged_folders_are_one_sentence(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="cannot load the weights of"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    with pytest.raises(ModelLoadError, match="cannot load the .* of"):
        load_model(folder)


def test_remote_code_is_refused_unless_asked_for(folder):
    config = json.loads((folder / "config.json").read_text())
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "mine.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ModelLoadError, match="cannot load the"):
        load_model(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "there is no folder ./nowhere"),
        ("nowhere.gguf", "there is no file nowhere.gguf"),
    ],
)
def test_missing_files_are_named(source, message):
    with pytest.raises(ModelLoadError, match=message):
        load_model(source)


def test_files_that_are_not_gguf_or_cut_short_are_named(tmp_path):
    text = tmp_path / "model.gguf"
    text.write_text("hello")
    with pytest.raises(ModelLoadError, match="is not a GGUF file: it does not begin with the letters GGUF"):
        load_model(text)
    text.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelLoadError, match=r"cannot load the tokenizer of model\.gguf"):
        load_model(text)


def test_the_gguf_extra_is_named_when_missing(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    original = builtins.__import__

    def without_gguf(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ModelLoadError, match=r"pip install 'sd_lens\[gguf\]'"):
        load_model(path)


def test_wrong_arguments_say_what_is_expected():
    load, hf_model = tiny.unchecked(load_model), tiny.llama()
    with pytest.raises(InputError, match="cannot load a model from int: expected a name"):
        load(3)
    with pytest.raises(InputError, match="device 'cuda:99' cannot be used here"):
        load(hf_model, device="cuda:99")
    with pytest.raises(InputError, match="unknown backend 'jax'; expected one of"):
        tiny.unchecked(wrapping.wrapped)(hf_model, None, "x", backend="jax", device=torch.device("cpu"))


def test_pickled_weights_of_a_hub_model_are_not_read(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--pickled" / "snapshots" / "0123"
    tiny.llama().save_pretrained(snapshot)
    tiny.tokenizer().save_pretrained(snapshot)
    (snapshot / "model.safetensors").unlink()
    torch.save(tiny.llama().state_dict(), snapshot / "pytorch_model.bin")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="cannot load the weights of me/pickled"):
        load_model("me/pickled")


def test_a_cached_model_that_cannot_be_read_is_a_damaged_cache(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    loading = importlib.import_module("sd_lens.models.loading")
    monkeypatch.setattr(loading, "packaged_folder", lambda *_: tmp_path)
    with pytest.raises(CacheError, match="is damaged: delete it and load again"):
        load_model("smollm2-135m")


def test_a_model_in_training_mode_is_set_to_evaluation(backend):
    model = load_model(tiny.gpt2().train(), backend=backend)
    assert torch.equal(logits(model), logits(model))


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    for source in (path, str(path)):
        with pytest.raises(ModelLoadError, match=r"weights\.bin is a file that is not \.gguf: expected a folder"):
            load_model(source)
