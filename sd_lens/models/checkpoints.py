"""The blocks of a checkpoint on disk, one in memory at a time.

A skeleton of the architecture with a single block, all on the meta device, takes the tensors of the block that is
wanted; the bridge around it gives the same view as around a whole model.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_lens.errors import ModelLoadError, NotSupportedError
from sd_lens.models.blocks import MIXTURES, block_weights, check_architecture
from sd_lens.models.views import BlockWeights
from sd_lens.models.wrapping import bridged, first_line

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder in Hugging Face's layout whose weights stay on disk.

    Attributes:
        folder: where it is.
        config: its transformers configuration.
        files: which file each tensor is in.
    """

    folder: Path
    config: Any
    files: dict[str, Path]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return int(self.config.num_hidden_layers)

    def blocks(self, layers: Sequence[int]) -> Iterator[BlockWeights]:
        """The views of some blocks in the stored dtype, each read when it is asked for.

        A view maps the file; its memory is free again once the view is dropped. That every tensor is there is checked
        before the first is read.

        Raises:
            ModelLoadError: if a tensor of these blocks is missing, has another shape than config.json says, or
                its file is damaged.
            NotSupportedError: as `block_weights`.
        """
        prefix, names = _block_parameters(_skeleton(self.config))
        located = [self._located(prefix, layer, names) for layer in layers]
        return (self._block(layer, names) for layer, names in zip(layers, located, strict=True))

    def _located(self, prefix: str, layer: int, names: Sequence[str]) -> dict[str, str]:
        """The stored names of a block's parameters."""
        return {name: self._stored_name(f"{prefix}.{layer}.{name}") for name in names}

    def _stored_name(self, name: str) -> str:
        """What the files call a parameter: some published ones, such as GPT-2's, leave the first part out."""
        for stored in (name, name.partition(".")[2]):
            if stored in self.files:
                return stored
        raise ModelLoadError(f"{self.folder} has no tensor {name}, which its config.json asks for")

    def _block(self, layer: int, names: dict[str, str]) -> BlockWeights:
        skeleton = _skeleton(self.config)
        try:
            _only_block(skeleton)[1].load_state_dict(self._read(names), assign=True, strict=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ModelLoadError(f"block {layer} in {self.folder} does not fit its config.json: {reason}") from error
        view = replace(block_weights(bridged(skeleton, None, self.name), 0), layer=layer)
        del skeleton
        gc.collect()  # the bridge refers to itself in circles, and may hold copies
        return view

    def _read(self, names: dict[str, str]) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        with ExitStack() as stack:
            try:
                opened = {
                    path: stack.enter_context(safe_open(path, framework="pt"))
                    for path in {self.files[stored] for stored in names.values()}
                }
                return {name: opened[self.files[stored]].get_tensor(stored) for name, stored in names.items()}
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(f"cannot read the weights in {self.folder}: {first_line(error)}") from error


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """A model's folder in Hugging Face's layout; no weights are read.

    Args:
        folder: holds config.json and model.safetensors, or shards and their index.

    Raises:
        ModelLoadError: if the folder, its configuration, its weights or one of its shards is missing or damaged.
        NotSupportedError: for an architecture that is not in `SUPPORTED`, mixtures of experts, or quantised weights.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ModelLoadError(
            f"there is no folder {folder}: expected a folder in Hugging Face's layout or a loaded model"
        )
    config = _config(path)
    _check_supported(config)
    return Checkpoint(path, config, _files(path))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} is not a model in Hugging Face's layout: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelLoadError(f"cannot read the config.json of {folder}: {first_line(error)}") from error


def _check_supported(config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "quantization_config", None) is not None:
        raise NotSupportedError("not supported yet: quantised weights; dequantise them first")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotSupportedError("not supported yet: models that are not causal decoders")
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    check_architecture(architecture)
    if architecture in MIXTURES:  # stored expert by expert, under names of their own
        raise NotSupportedError(f"not supported yet: {architecture} straight from a folder; load the model first")


def _files(folder: Path) -> dict[str, Path]:
    """Which file each tensor is in."""
    from safetensors import SafetensorError, safe_open

    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    if not (folder / _WHOLE).is_file():
        raise ModelLoadError(f"{folder} holds neither {_WHOLE} nor {_INDEX} (pickled weights are not read)")
    try:
        with safe_open(folder / _WHOLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / _WHOLE)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"cannot read {folder / _WHOLE}: {first_line(error)}") from error


def _indexed_files(folder: Path) -> dict[str, Path]:
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        files = {name: folder / shard for name, shard in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{folder / _INDEX} is damaged: {first_line(error)}") from error
    for shard in sorted(set(files.values())):
        if not shard.is_file():
            raise ModelLoadError(f"{folder} has no {shard.name}, which {_INDEX} names: fetch the missing shard")
    return files


def _skeleton(config: Any) -> nn.Module:
    """The model with a single block, its parameters on the meta device."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.requires_grad_(False)


def _only_block(skeleton: nn.Module) -> tuple[str, nn.Module]:
    """The name of the list of blocks, and the block in it."""
    return next((name, module[0]) for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList))


def _block_parameters(skeleton: nn.Module) -> tuple[str, list[str]]:
    """The name of the list of blocks, and those of a block's parameters."""
    prefix, block = _only_block(skeleton)
    return prefix, [name for name, _ in block.named_parameters()]
