"""How a signature comes about: checkpoints of a training run against the last of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from sd_lens.applications.signatures import Signature, signature
from sd_lens.errors import InputError
from sd_lens.linear.angles import acute_angles
from sd_lens.models.loading import load_model
from sd_lens.observations.texts import Texts


@dataclass(frozen=True, eq=False)
class SignatureTrajectory:
    """The signatures of the checkpoints of a training run, in its order.

    Attributes:
        names: of the checkpoints.
        signatures: of each.
        angles: degrees, acute, between each direction and the last checkpoint's; NaN where either has none.
    """

    names: tuple[str, ...]
    signatures: tuple[Signature, ...] = field(repr=False)
    angles: Float64[Tensor, " checkpoint"]

    def __str__(self) -> str:
        first, last = self.signatures[0], self.signatures[-1]
        directed = [name for name, s in zip(self.names, self.signatures, strict=True) if s.direction is not None]
        return (
            f"SignatureTrajectory of {len(self.names)} checkpoints: norms up to {first.norm_ratio:.4g} times the "
            f"ordinary at {self.names[0]}, {last.norm_ratio:.4g} times at {self.names[-1]}; "
            + (f"first direction at {directed[0]}" if directed else "no direction at any")
        )

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row per checkpoint: name, angle to the last, norm ratio, explosion and decay blocks."""
        return pd.DataFrame(
            {
                "checkpoint": self.names,
                "angle": self.angles.numpy(),
                "norm_ratio": [s.norm_ratio for s in self.signatures],
                "explosion_layers": [s.explosion_layers for s in self.signatures],
                "decay_layers": [s.decay_layers for s in self.signatures],
            }
        )


def signature_trajectory(
    checkpoints: Mapping[str, Any] | Iterable[tuple[str, Any] | str | Path],
    texts: Texts | None = None,
    *,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = True,
) -> SignatureTrajectory:
    """The signatures of a training run's checkpoints, and how far each is from the last.

    Args:
        checkpoints: folders, or (name, checkpoint) pairs, in the order of training. A checkpoint is a model, or what
            `load_model` takes. Read one after the other, so that a generator needs the memory of one model:
            `((r, load_model("EleutherAI/pythia-70m", revision=r)) for r in revisions)`.
        texts: as for `signature`; without them everything comes from the weights alone.
        prepend_bos: as for `signature`.
        batch_tokens: as for `signature`.
        seed: as for `signature`.
        progress: show progress bars.

    Raises:
        InputError: without a checkpoint, or for checkpoints of different width.
        ModelLoadError: as `load_model`.
        NotSupportedError: as `signature`.
        NumericalError: as `signature`.
    """
    if texts is not None and not isinstance(texts, str | Tensor):
        texts = list(texts)  # read once for each checkpoint
    found = []
    for each in checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints:
        name, checkpoint = (Path(each).name, each) if isinstance(each, str | Path) else each
        model = checkpoint if hasattr(checkpoint, "blocks") else load_model(checkpoint)
        signed = signature(
            model, texts, prepend_bos=prepend_bos, batch_tokens=batch_tokens, seed=seed, progress=progress
        )
        found.append((str(name), signed))
        del each, checkpoint, model  # the generator makes the next one now
    if not found:
        raise InputError("a trajectory needs at least one checkpoint")
    names, signatures = zip(*found, strict=True)
    widths = sorted({s.d_model for s in signatures})
    if len(widths) > 1:
        raise InputError(f"checkpoints of widths {', '.join(map(str, widths))} are not of one training run")
    last = signatures[-1].direction
    angles = [
        math.nan if last is None or s.direction is None else float(acute_angles(s.direction[None], last))
        for s in signatures
    ]
    return SignatureTrajectory(names, signatures, torch.tensor(angles, dtype=torch.float64))
