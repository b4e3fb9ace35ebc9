import json
import subprocess
import sys

import pytest

from sd_lens import cli
from tests import planted, tiny

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "model"
    planted.llama().hf_model.save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    words = [[f"w{(i * 7 + j * 3) % 50 + 5}" for j in range(12)] for i in range(20)]
    for i, row in enumerate(words):
        row[i % 12] = "w4"  # the planted token
    path.write_text("\n\n".join(" ".join(row) for row in words))
    return path


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def test_a_report_ends_with_zero_sentences_and_where_it_lies(folder, texts, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert run("report", folder, "--texts", texts, "--out", out, "--backend", "bridge", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "The norm explodes in block 2 and decays in block 4 (0-based)." in printed
    assert printed.rstrip().endswith(f"The report is in {out}")
    assert "TransformerBridge, torch.float32, cpu" in out.read_text(encoding="utf-8")


def test_options_reach_the_report(folder, texts, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert run("report", folder, "--texts", texts, "--out", out, "--prepend-bos", "--threshold", 50) == 0
    assert "with a beginning-of-sequence token in front; the tokens at position 0 were '<s>' (20x)." in (
        capsys.readouterr().out
    )
    assert "<td>threshold</td><td>50.0</td>" in out.read_text().replace(' class="number"', "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "./nowhere"], "sd-lens: there is no folder ./nowhere\n"),
        (["report", "x.gguf"], "sd-lens: there is no file x.gguf\n"),
        (["report", "x.gguf", "--texts", "none.txt"], "sd-lens: cannot read the texts of none.txt: "),
        (["report", "./nowhere", "--device", "cuda:77"], "sd-lens: device 'cuda:77' cannot be used here: "),
    ],
)  # fmt: skip
def test_our_errors_are_one_sentence_and_exit_code_one(arguments, message, capsys):
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["report"], ["report", "m", "--backend", "jax"], ["report", "m", "--threshold", "high"], ["look"]],
)
def test_wrong_usage_is_exit_code_two(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "usage: sd-lens" in capsys.readouterr().err


def test_an_interrupt_writes_nothing(folder, texts, tmp_path, monkeypatch, capsys):
    import sd_lens.report.writing as writing

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "find_high_norm_tokens", interrupted)
    assert run("report", folder, "--texts", texts, "--out", tmp_path / "out.html") == 1
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_help_reads_well_and_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "sd_lens.cli", "--help"], capture_output=True, text=True, check=True)
    for words in ("report", "examples:", "sd-lens report smollm2-135m", "exit codes: 0 done, 1"):
        assert words in done.stdout
    from importlib.metadata import entry_points

    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "sd-lens"]
    assert script.load() is not None


def test_model_options_reach_load_model(monkeypatch, tmp_path, capsys):
    import torch

    import sd_lens

    asked = []
    monkeypatch.setattr(sd_lens, "load_model", lambda *a, **k: asked.append((a, k)) or "a model")
    monkeypatch.setattr(sd_lens, "write_report", lambda *_, **__: ["a sentence"])
    assert run("report", "m", "--backend", "bridge", "--dtype", "bfloat16", "--device", "cpu") == 0
    assert run("report", "m", "--trust-remote-code") == 0
    assert asked[0] == (
        ("m",),
        {"backend": "bridge", "device": "cpu", "dtype": torch.bfloat16, "trust_remote_code": False},
    )
    assert asked[1] == (("m",), {"backend": "auto", "device": None, "dtype": torch.float32, "trust_remote_code": True})
    assert "a sentence" in capsys.readouterr().out


@pytest.fixture
def exploding_folder(tmp_path):
    where = tmp_path / "exploding"
    planted.exploding_when_initial().hf_model.save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


def test_spare_names_modules_by_the_weights_alone(exploding_folder, capsys):
    assert run("spare", exploding_folder, "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert printed.out == "transformer.h.2.mlp.c_proj\ntransformer.h.4.mlp.c_proj\n"
    assert printed.err.count("note: Forecast of") == 1


def test_spare_prints_what_a_quantizer_takes(exploding_folder, backend, capsys):
    modules = ["transformer.h.1.mlp.c_proj", "transformer.h.5.mlp.c_proj", "lm_head"]
    expected = {
        "bitsandbytes": {"llm_int8_skip_modules": modules},
        "transformers": {"modules_to_not_convert": modules},
        "llm-compressor": {"ignore": modules},
        "gptqmodel": {"dynamic": {rf"-:^transformer\.h\.{layer}\.mlp\.c_proj$": {} for layer in (1, 5)}},
    }
    for quantizer, arguments in expected.items():
        assert run("spare", exploding_folder, "--layers", "5,1", "--format", quantizer, "--backend", backend) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out) == arguments
        assert "note: " not in printed.err.replace("note: the", "")


def test_spare_can_look_at_texts(folder, texts, capsys):
    assert run("spare", folder, "--texts", texts) == 0
    printed = capsys.readouterr()
    assert printed.out == "model.layers.2.mlp.down_proj\nmodel.layers.4.mlp.down_proj\n"
    assert "HighNormTokens: " in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "6"], "sd-lens: block 6 does not exist: the model has blocks 0 to 5\n"),
        ([], "sd-lens: there is nothing to spare: no block explodes or decays; name the blocks to spare\n"),
        (["--texts", "none.txt"], "sd-lens: cannot read the texts of none.txt: "),
    ],
)
def test_what_cannot_be_spared_is_one_sentence(tmp_path, options, message, capsys):
    where = tmp_path / "flat"
    tiny.llama(num_hidden_layers=6).save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    assert run("spare", where, *options) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines(keepends=True)[-1].startswith(message)


def test_experts_cannot_be_spared(tmp_path, capsys):
    where = tmp_path / "experts"
    tiny.mixtral().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    assert run("spare", where, "--layers", "0") == 1
    assert "sd-lens: not supported yet: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["spare"], ["spare", "m", "--format", "awq"], ["spare", "m", "--layers", "one"],
     ["spare", "m", "--layers", "1", "--texts", "t.txt"]],
)  # fmt: skip
def test_wrong_usage_of_spare_is_exit_code_two(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "usage: sd-lens spare" in capsys.readouterr().err
