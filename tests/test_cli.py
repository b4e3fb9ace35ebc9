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
