"""How far a changed model's predictions are from the original's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def summed_divergence(
    reference: Float[Tensor, "pos d_vocab"], logits: Float[Tensor, "pos d_vocab"]
) -> Float[Tensor, ""]:
    """The Kullback-Leibler divergence of predictions from those of a reference, summed over tokens, in nats.

    It is by how much the changed model's loss would exceed the original's on texts drawn from the original; unlike the
    difference of losses on a few texts, it is never negative.
    """
    expected = torch.log_softmax(reference.float(), dim=-1)
    terms = expected.exp() * (expected - torch.log_softmax(logits.float(), dim=-1))
    return terms.sum(dim=-1).double().sum().cpu()
