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
        (["report", "x.gguf", "--compare", "none.safetensors"], "sd-lens: there is no file none.safetensors\n"),
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
    [
        [],
        ["report"],
        ["signature"],
        ["lineage"],
        ["report", "m", "--backend", "jax"],
        ["report", "m", "--threshold", "high"],
        ["spare", "m", "--layers", "a"],
        ["look"],
    ],
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
    for words in (
        "report",
        "signature",
        "lineage",
        "examples:",
        "sd-lens report smollm2-135m",
        "exit codes: 0 done, 1",
    ):
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
    assert run("report", "m", "--trust-remote-code", "--revision", "step1") == 0
    assert asked[0] == (
        ("m",),
        {"backend": "bridge", "device": "cpu", "dtype": torch.bfloat16, "trust_remote_code": False, "revision": None},
    )
    assert asked[1] == (
        ("m",),
        {"backend": "auto", "device": None, "dtype": torch.float32, "trust_remote_code": True, "revision": "step1"},
    )
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


def test_signatures_are_written_and_compared(folder, texts, tmp_path, capsys):
    first, second, untrained = (tmp_path / name for name in ("first.safetensors", "second.safetensors", "none"))
    assert run("signature", folder, "--texts", texts, "-o", first, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Signature of {folder} from texts: d_model 64, explosion blocks (2,)")
    assert printed.rstrip().endswith(f"The signature is in {first}")
    assert run("signature", folder, "--texts", texts, "--out", second, "--backend", "bridge") == 0
    tiny.llama(hidden_size=64, head_dim=16).save_pretrained(tmp_path / "random")
    tiny.tokenizer().save_pretrained(tmp_path / "random")
    assert run("signature", tmp_path / "random", "-o", untrained) == 0
    assert "from weights: d_model 64, no high-norm tokens and so no direction" in capsys.readouterr().out
    assert run("lineage", first, second, untrained, "--false-positive-rate", 0.01) == 0
    lines = capsys.readouterr().out.splitlines()
    words = ["first", "second", "angle", "threshold", "shared", "required", "log10_p", "spectral_distance", "verdict"]
    assert lines[0].split() == words
    assert lines[1].split()[:3] == ["first", "second", "0.00"]
    assert lines[1].endswith(" related")
    assert lines[2].split() == ["first", "none", *"------", "not", "comparable"]
    assert lines[-1] == ("Lineage of 3 models: 1 of 3 pairs related, 2 not comparable; groups first, second; none")


def test_files_of_one_name_are_told_apart_by_their_paths(folder, texts, tmp_path, capsys):
    files = [tmp_path / name / "s.safetensors" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        assert run("signature", folder, "--texts", texts, "-o", file) == 0
    capsys.readouterr()
    assert run("lineage", *files) == 0
    assert f"groups {files[0]}, {files[1]}" in capsys.readouterr().out


def test_signatures_of_two_widths_are_not_comparable(tmp_path, capsys):
    from tests.applications.test_lineage import made, peaked

    for width in (32, 64):
        made(peaked(width, 0)).save(tmp_path / str(width))
    assert run("lineage", tmp_path / "32", tmp_path / "64") == 0
    assert "0 of 1 pairs related, 1 not comparable; groups 32; 64" in capsys.readouterr().out


def test_names_without_ending_are_used_if_they_tell_all_files_apart():
    assert cli._names(["x/a.b", "c.d"]) == {"a": "x/a.b", "c": "c.d"}
    assert cli._names(["a.b", "a.c", "a.b.c"]) == {"a.b": "a.b", "a.c": "a.c", "a.b.c": "a.b.c"}


def test_bad_signature_files_are_one_sentence(folder, tmp_path, capsys):
    from tests.applications.test_lineage import made, peaked

    good, other, text = tmp_path / "good", tmp_path / "other", tmp_path / "text"
    for file in (good, other):
        made(peaked(32, 0)).save(file)
    text.write_text("not a signature")
    for arguments, message in (
        (("lineage", good), "a lineage needs two signatures or more, not 1"),
        (("lineage", good, good), "is given twice"),
        (("lineage", good, f"{tmp_path}/./good"), "is given twice"),
        (("lineage", good, text), "text is not a safetensors file of sd_lens, or is damaged"),
        (("lineage", good, tmp_path / "gone"), "there is no file"),
        (("lineage", good, folder / "model.safetensors"), "does not hold Signature; it holds no sd_lens result"),
        (("lineage", good, other, "--false-positive-rate", 2), "false_positive_rate=2.0: expected a number between"),
        (("signature", folder, "--revision", "main"), "revision='main': only a hub name has revisions"),
        (("signature", folder, "-o", tmp_path / "none" / "s"), "cannot write"),
    ):
        assert run(*arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err.splitlines()[-1]
