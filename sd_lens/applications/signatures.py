"""A model's signature: the direction of its high-norm tokens and its blocks' singular values, in a few kilobytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from sd_lens.errors import InputError
from sd_lens.explanations.forecast import Forecast, forecast
from sd_lens.explanations.spectra import singular_spectra
from sd_lens.observations.high_norm import HighNormTokens, find_high_norm_tokens
from sd_lens.observations.texts import Texts
from sd_lens.storage import load_result, save_result

Source = Literal["texts", "weights"]

_N_VALUES = 8


@dataclass(frozen=True, eq=False)
class Signature:
    """What tells a model and its descendants from others; blocks are 0-based.

    Attributes:
        direction: `[d_model]`, unit: where its high-norm tokens point. None if it has none.
        spectrum: the leading singular values of every block's map L, largest first, at most eight; of the pre-gain
            convention, so that neither folding the norms nor permuting or rotating the channels changes them.
        explosion_layers: blocks in which norms explode.
        decay_layers: blocks in which they decay.
        norm_ratio: the largest norm (of a forecast: the median one of the tokens that explode) against the median of
            ordinary ones, where it is largest of all blocks.
        source: `"texts"`, if the direction is the mean of what texts showed, or `"weights"`, if it is a forecast.
        model_name: as TransformerLens calls the model.
        d_model: width of the residual stream.
    """

    direction: Float32[Tensor, " d_model"] | None = field(repr=False)
    spectrum: Float32[Tensor, "layer k"] = field(repr=False)
    explosion_layers: tuple[int, ...]
    decay_layers: tuple[int, ...]
    norm_ratio: float
    source: Source
    model_name: str
    d_model: int

    def __str__(self) -> str:
        start = f"Signature of {self.model_name} from {self.source}: d_model {self.d_model}"
        if self.direction is None:
            return f"{start}, no high-norm tokens and so no direction"
        return (
            f"{start}, explosion blocks {self.explosion_layers}, decay blocks {self.decay_layers}, "
            f"norms up to {self.norm_ratio:,.4g} times the ordinary"
        )

    __repr__ = __str__

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with JSON metadata.

        Raises:
            InputError: if `path` cannot be written.
        """
        tensors = {"spectrum": self.spectrum} | ({} if self.direction is None else {"direction": self.direction})
        save_result(
            path,
            tensors,
            {
                "kind": "Signature",
                "explosion_layers": self.explosion_layers,
                "decay_layers": self.decay_layers,
                "norm_ratio": self.norm_ratio,
                "source": self.source,
                "model_name": self.model_name,
                "d_model": self.d_model,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Signature:
        """Read what `save` wrote.

        Raises:
            InputError: if the file is missing, damaged, or holds something else.
        """
        tensors, metadata = load_result(path, "Signature")
        try:
            found = cls(
                direction=tensors.get("direction"),
                spectrum=tensors["spectrum"],
                explosion_layers=tuple(metadata["explosion_layers"]),
                decay_layers=tuple(metadata["decay_layers"]),
                norm_ratio=metadata["norm_ratio"],
                source=metadata["source"],
                model_name=metadata["model_name"],
                d_model=metadata["d_model"],
            )
        except KeyError as error:
            raise InputError(f"{path} holds a Signature without {error}: it is damaged") from error
        except TypeError as error:
            raise InputError(f"{path} holds a Signature with {error}: it is damaged") from error
        direction = torch.zeros(found.d_model) if found.direction is None else found.direction
        is_finite = all(bool(tensor.isfinite().all()) for tensor in (direction, found.spectrum))
        if direction.shape != (found.d_model,) or not is_finite:
            raise InputError(f"{path} holds a Signature of another width than it says, or with NaN: it is damaged")
        return found


def signature(
    model: Any,
    texts: Texts | HighNormTokens | Forecast | None = None,
    *,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = True,
) -> Signature:
    """A model's signature, from its weights alone or from what it does with texts.

    A model without high-norm tokens, such as an untrained one, has no direction: `lineage` compares it with nothing.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, folded or not.
        texts: the direction is the mean of the high-norm states in them (`find_high_norm_tokens`). Without texts it
            is forecast by random embeddings (`forecast`). The result of either function serves too.
        prepend_bos: put a beginning-of-sequence token in front of texts; None for the model's habit.
        batch_tokens: tokens of texts run at a time.
        seed: of the random embeddings, and of the singular values' iteration.
        progress: show a progress bar.

    Raises:
        InputError: for texts that cannot be used, or what was found in a model of another width.
        NotSupportedError: for an architecture or activation that is not covered, mixtures of experts among them.
        NumericalError: for weights or activations that are not finite.

    Source: Wang et al. 2025 (the direction as a signature of a model and its fine-tunes).
    """
    if isinstance(texts, (HighNormTokens, Forecast)):
        found = texts
    elif texts is None:
        found = forecast(model, scores=False, seed=seed, progress=progress)
    else:
        found = find_high_norm_tokens(
            model, texts, prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress
        )
    if found.direction is not None and len(found.direction) != model.cfg.d_model:
        raise InputError(f"the direction has {len(found.direction)} entries: it is of another model")
    source, ratios = _norm_ratios(found)
    spectra = singular_spectra(
        model, k=min(_N_VALUES, model.cfg.d_model), convention="pre-gain", seed=seed, progress=progress
    )
    return Signature(
        direction=None if found.direction is None else found.direction.float(),
        spectrum=spectra.values.float(),
        explosion_layers=found.explosion_layers,
        decay_layers=found.decay_layers,
        norm_ratio=float(ratios.max()),
        source=source,
        model_name=spectra.model_name,
        d_model=model.cfg.d_model,
    )


def _norm_ratios(found: HighNormTokens | Forecast) -> tuple[Source, Float64[Tensor, " layer"]]:
    """Where the norms come from, and high ones against ordinary ones after each block."""
    if isinstance(found, Forecast):
        return "weights", found.norms / found.ordinary_norms
    return "texts", found.scan.maximum / found.scan.ordinary_median
