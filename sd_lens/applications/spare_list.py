"""The list of modules to keep in high precision, in the forms that quantizers take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sd_lens.applications.sparing import Spare, layers_to_spare
from sd_lens.errors import InputError
from sd_lens.models.linear_layers import linear_groups

_HEAD = "lm_head"  # what quantizers leave alone by themselves, until they are given a list


def _whole(name: str) -> str:
    """A regular expression for this name and no other."""
    return f"^{re.escape(name)}$"


_FORMATS: dict[str, Callable[[tuple[str, ...]], Any]] = {
    # transformers matches with should_convert_module; a list replaces the default, so the head is named too.
    "bitsandbytes": lambda names: {"llm_int8_skip_modules": [*names, _HEAD]},
    "transformers": lambda names: {"modules_to_not_convert": [*names, _HEAD]},  # of its other quantizers
    "llm-compressor": lambda names: {"ignore": [*names, _HEAD]},
    # Keys are regular expressions matched from the start; "-:" leaves a module out. The head is not quantized anyway.
    "gptqmodel": lambda names: {"dynamic": {f"-:{_whole(name)}": {} for name in names}},
}
FORMATS = tuple(_FORMATS)
"""What `SpareList.arguments` and the command line know, besides plain names."""


@dataclass(frozen=True, eq=False)
class SpareList:
    """Modules to keep in high precision, by their names in transformers.

    Attributes:
        layers: the blocks whose `W_out` they are, 0-based.
        modules: their names, such as `model.layers.2.mlp.down_proj`.
        n_parameters: their weights.
        parameter_share: of all weights of the blocks' linear layers.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    n_parameters: int
    parameter_share: float

    def __str__(self) -> str:
        return (
            f"SpareList: {', '.join(self.modules) or 'nothing'} ({self.n_parameters:,} weights, "
            f"{100 * self.parameter_share:.2g} % of the blocks' linear weights)"
        )

    __repr__ = __str__

    def arguments(self, quantizer: str) -> dict[str, Any]:
        """The argument that makes a quantizer spare the modules, by its name.

        Args:
            quantizer: `"bitsandbytes"` (for transformers' `BitsAndBytesConfig`), `"transformers"` (for its
                `TorchAoConfig`, `QuantoConfig` and others), `"llm-compressor"` (for its modifiers) or `"gptqmodel"`
                (for its `QuantizeConfig`).

        Raises:
            InputError: for another quantizer.

        Example:
            >>> spare = SpareList((2,), ("model.layers.2.mlp.down_proj",), 884_736, 0.008)
            >>> spare.arguments("bitsandbytes")
            {'llm_int8_skip_modules': ['model.layers.2.mlp.down_proj', 'lm_head']}
        """
        if quantizer not in _FORMATS:
            raise InputError(f"unknown quantizer {quantizer!r}; expected one of {FORMATS}")
        arguments: dict[str, Any] = _FORMATS[quantizer](self.modules)
        return arguments


def spare_list(model: Any, spare: Spare = "auto") -> SpareList:
    """What to keep in high precision, by the names that the model's modules have in transformers.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        spare: as for `quantize`.

    Raises:
        InputError: as `quantize`.
        NotSupportedError: as `quantize`.
    """
    layers = layers_to_spare(model, spare)
    every = [(group, linear) for group in linear_groups(model) for linear in group.linears]
    spared = [linear for group, linear in every if group.reads == "neurons" and group.layer in layers]
    n_parameters = sum(linear.n_parameters for linear in spared)
    return SpareList(
        layers=layers,
        modules=tuple(linear.name for linear in spared),
        n_parameters=n_parameters,
        parameter_share=n_parameters / sum(linear.n_parameters for _, linear in every),
    )
