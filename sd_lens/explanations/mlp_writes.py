"""What an MLP's neurons, and single entries of its `W_out`, write along a direction: means over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sd_lens.errors import InputError, NotSupportedError, NumericalError
from sd_lens.explanations.components import Component
from sd_lens.explanations.contributions import largest_error, seen_through, unit_direction
from sd_lens.explanations.reading import at_tokens
from sd_lens.models.blocks import block_writes
from sd_lens.models.views import BlockWrites
from sd_lens.observations.selection import Where, selected
from sd_lens.observations.texts import Batch


@dataclass(frozen=True, eq=False)
class MlpWrite:
    """What an MLP's neurons write along a unit direction, means over tokens; the output bias apart.

    Attributes:
        block: the weights.
        direction: the unit direction.
        total: length along it of all neurons together.
        contribution: of each neuron.
        activation: `hook_post` of each neuron.
        entering: what meets the rows of `W_out`: `hook_post`, behind a norm over its scale.
        size: magnitude of that.
    """

    block: BlockWrites
    direction: Float64[Tensor, " d_model"]
    total: float
    contribution: Float64[Tensor, " d_mlp"]
    activation: Float64[Tensor, " d_mlp"]
    entering: Float64[Tensor, " d_mlp"]
    size: Float64[Tensor, " d_mlp"]

    def neurons(self, which: Int64[Tensor, " n"]) -> pd.DataFrame:
        """Some neurons, one a row."""
        return pd.DataFrame(
            {
                "component": pd.Series(
                    [str(Component("neuron", self.block.layer, j)) for j in which.tolist()], dtype="str"
                ),
                "neuron": which.numpy(),
                "activation": self.activation[which].numpy(),
                "contribution": self.contribution[which].numpy(),
                "share": (self.contribution[which] / self.total).numpy(),
            }
        )

    def largest_entries(self, n: int) -> pd.DataFrame:
        """The n entries of `W_out` that write most, one a row."""
        W_out = self.block.W_out
        assert W_out is not None
        gain = torch.ones_like(self.direction) if self.block.mlp_post_gain is None else self.block.mlp_post_gain
        gain = gain.double().cpu()
        sizes = W_out.float().abs() * self.size.to(W_out.device).float()[:, None] * gain.abs().to(W_out.device).float()
        size, place = sizes.flatten().topk(min(n, sizes.numel()))
        neuron, channel = place.cpu() // W_out.shape[1], place.cpu() % W_out.shape[1]
        weight = W_out[neuron, channel].double().cpu()
        contribution = self.entering[neuron] * weight * gain[channel] * self.direction[channel]
        places = zip(neuron.tolist(), channel.tolist(), strict=True)
        labels = [str(Component("weight", self.block.layer, j, c)) for j, c in places]
        return pd.DataFrame(
            {
                "component": pd.Series(labels, dtype="str"),
                "neuron": neuron.numpy(),
                "channel": channel.numpy(),
                "weight": weight.numpy(),
                "size": size.double().cpu().numpy(),
                "contribution": contribution.numpy(),
                "share": (contribution / self.total).numpy(),
            }
        )


class MlpWriteSums:
    """Sums of what an MLP's neurons do at the chosen tokens."""

    def __init__(self, model: Any, layer: int, where: Where):
        self.model = model
        self.where = where
        self.block = block_writes(model, layer)
        if self.block.W_out is None:
            raise NotSupportedError(f"not supported yet: the MLP of block {layer} has no single matrix W_out")
        self.n = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Batch) -> None:
        """Run a batch, as far as the block, and count its chosen tokens."""
        mask = selected(self.model, batch, self.where)
        if not bool(mask.any()):
            return
        prefix = f"blocks.{self.block.layer}"
        names = [f"{prefix}.mlp.hook_post", f"{prefix}.hook_mlp_out", f"{prefix}.hook_resid_post"]
        names += [f"{prefix}.ln2_post.hook_scale"] if self.block.mlp_post_gain is not None else []
        rows, positions = mask.nonzero().unbind(dim=1)
        found = at_tokens(self.model, batch.tokens, names, (rows, positions))
        post, out, stream, *scale = (found[name].cpu().double() for name in names)
        if not torch.isfinite(stream).all():
            raise NumericalError(f"the residual stream after block {self.block.layer} is not finite")
        self.dtype = found[names[0]].dtype
        entering = post / scale[0] if scale else post
        new = {
            "activation": post, "entering": entering, "size": entering.abs(), "out": out, "stream": stream,
            "norm": stream.norm(dim=1, keepdim=True),
        }  # fmt: skip
        for name, values in new.items():
            total = values.sum(dim=0)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self.n += len(post)

    def along(self, unit: Float64[Tensor, " d_model"] | None) -> MlpWrite:
        """The mean write along a unit direction, by default that of the mean stream after the block.

        Raises:
            InputError: if none of the tokens was there, or the MLP writes nothing along the direction.
            NotSupportedError: if the neurons do not sum to what the MLP writes.
        """
        if self.n == 0:
            raise InputError("the texts have none of the tokens that were asked for")
        mean = {name: total / self.n for name, total in self._sums.items()}
        u = unit_direction(mean["stream"], self.model.cfg.d_model) if unit is None else unit
        assert u is not None
        assert self.block.W_out is not None
        gain, label, norm = self.block.mlp_post_gain, f"L{self.block.layer}MLP", float(mean["norm"])
        bias = 0.0 if self.block.b_out is None else float(self.block.b_out.double().cpu() @ u)
        total = float(mean["out"] @ u) - bias
        through = u if gain is None else u * gain.double().cpu()
        contribution = (
            mean["entering"] * seen_through(self.block.W_out, through[None].to(self.block.W_out.device))[0].cpu()
        )
        error = abs(float(contribution.sum()) - total) / max(norm, torch.finfo(torch.float64).tiny)
        if not error <= largest_error(self.dtype):
            raise NotSupportedError(
                f"the neurons of {label} miss what it writes by {error:.1e} of the norm: this architecture does "
                "something else, or hooks that are active edit it"
            )
        if abs(total) <= 1e-6 * norm:
            raise InputError(
                f"{label} writes nothing along the direction at these tokens: pass another block or direction"
            )
        return MlpWrite(self.block, u, total, contribution, mean["activation"], mean["entering"], mean["size"])
