"""`load_model`: names, folders, GGUF files, models in memory, and the packaged one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sd_lens.errors import CacheError, InputError, ModelLoadError
from sd_lens.models.packaged import PACKAGED_NAME, packaged_folder
from sd_lens.models.wrapping import Backend, first_line, wrapped


def load_model(
    source: Any,
    *,
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a model into TransformerLens, unprocessed: its residual stream equals Hugging Face's.

    Nothing is folded or centred. Weights are read from safetensors or GGUF, never from pickles.

    Args:
        source: `"smollm2-135m"`, the packaged model; a folder in Hugging Face's layout; a `.gguf` file; a
            TransformerLens or hub name; or a transformers model in memory, which is
            set to `dtype` and evaluation in place (and wrapped in place by the bridge).
        backend: `"hooked_transformer"`, `"bridge"`, or `"auto"`: HookedTransformer where the installed
            TransformerLens has it and knows the architecture, else the bridge.
        device: CUDA if there is one, else the CPU, by default.
        dtype: of the weights.
        tokenizer: of a model in memory; without one, only token ids can be run.
        trust_remote_code: let transformers run code that comes with the model.
        revision: branch, tag or commit of a hub name, such as a checkpoint of its training.

    Returns:
        A `HookedTransformer` or `TransformerBridge`. Its `cfg.default_prepend_bos` is what the tokenizer
        itself does.

    Raises:
        ModelLoadError: if the source is missing, damaged, unknown or without tokenizer.
        CacheError: if the packaged model cannot be fetched or its cache is damaged.
        InputError: for an unknown backend, device, a source of another kind, or a revision of what has none.

    Example:
        >>> model = load_model("smollm2-135m")  # doctest: +SKIP
    """
    target = _device(device)
    if revision is not None and not _may_be_hub_name(source):
        raise InputError(f"revision={revision!r}: only a hub name has revisions")
    if not isinstance(source, str | Path):
        if not (hasattr(source, "config") and hasattr(source, "state_dict")):
            raise InputError(
                f"cannot load a model from {type(source).__name__}: expected a name, a folder, a .gguf file "
                "or a transformers model"
            )
        name = str(getattr(source.config, "_name_or_path", "") or type(source).__name__)
        return wrapped(source.to(dtype).eval(), tokenizer, name, backend=backend, device=target)
    name = str(source)
    if name == PACKAGED_NAME:
        folder = packaged_folder(_dequantise)
        try:
            hf_model, tokenizer = _from_folder(folder, dtype, trust_remote_code)
        except ModelLoadError as error:
            raise CacheError(f"the cached model in {folder} is damaged: delete it and load again") from error
    elif name.endswith(".gguf"):
        hf_model, tokenizer = _from_gguf(Path(name).expanduser(), dtype)
    elif Path(name).expanduser().is_dir():
        hf_model, tokenizer = _from_folder(Path(name).expanduser(), dtype, trust_remote_code)
    elif Path(name).expanduser().is_file():
        raise ModelLoadError(f"{name} is a file that is not .gguf: expected a folder in Hugging Face's layout")
    elif isinstance(source, Path) or name.startswith((".", "~", os.sep)):
        raise ModelLoadError(f"there is no folder {name}")
    else:
        hf_model, tokenizer = _from_hub(_official_name(name), dtype, trust_remote_code, revision)
        name = name if revision is None else f"{name}@{revision}"
    return wrapped(hf_model, tokenizer, name, backend=backend, device=target)


def _may_be_hub_name(source: Any) -> bool:
    is_ours = source == PACKAGED_NAME or str(source).endswith(".gguf")
    return isinstance(source, str) and not is_ours and not Path(source).expanduser().exists()


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.zeros(1, device=target)
    except Exception as error:
        raise InputError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error
    return target


def _official_name(name: str) -> str:
    """The hub's name for one of TransformerLens's short names, such as `gpt2-small`."""
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((official for official, aliases in MODEL_ALIASES.items() if name in aliases), name)


def _from_folder(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} is not a model in Hugging Face's layout: it has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise ModelLoadError(f"{folder} holds no *.safetensors weights (pickled ones are not read)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelLoadError(
            f"{folder} has no tokenizer: put tokenizer.json beside the weights, or pass the loaded model itself"
        )
    return _read(str(folder), dtype, trust_remote_code=trust_remote_code, local_files_only=True)


def _from_hub(name: str, dtype: torch.dtype, trust_remote_code: bool, revision: str | None) -> tuple[Any, Any]:
    return _read(name, dtype, trust_remote_code=trust_remote_code, revision=revision or "main")


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise ModelLoadError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelLoadError("reading GGUF files needs one more package: pip install 'sd_lens[gguf]'") from error
    hf_model, tokenizer = _read(str(path.parent), dtype, gguf_file=path.name)
    # Its weights are plain tensors now; the mark of their origin would keep them from being saved or wrapped.
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(hf_model.config, attribute):
            delattr(hf_model.config, attribute)
    return hf_model, tokenizer


def _read(name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def attempt(what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            damaged = " (is the file cut short or damaged?)" if "gguf_file" in options else ""
            raise ModelLoadError(
                f"cannot load the {what} of {options.get('gguf_file', name)}{damaged}: {first_line(error)}"
            ) from error

    tokenizer = attempt("tokenizer", lambda: AutoTokenizer.from_pretrained(name, **options))
    weights = {} if "gguf_file" in options else {"use_safetensors": True}
    hf_model = attempt("weights", lambda: AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **weights, **options))
    return hf_model.eval(), tokenizer


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a Hugging Face folder with float32 safetensors."""
    from safetensors.torch import save_file

    hf_model, tokenizer = _from_gguf(gguf, torch.float32)
    shared = set(getattr(hf_model, "_tied_weights_keys", None) or ())
    tied = bool(getattr(hf_model.config, "tie_word_embeddings", False))
    weights = {
        name: tensor.contiguous() for name, tensor in hf_model.state_dict().items() if not (tied and name in shared)
    }
    hf_model.config.architectures = [type(hf_model).__name__]
    hf_model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
