"""Quantization written directly on a transformers model: a hook and a rounded weight for each linear layer."""

from contextlib import contextmanager

import torch
from transformers.pytorch_utils import Conv1D

from sd_lens import QuantizationScheme

W8A8 = QuantizationScheme()


def nearest_multiple(x, bits, axis):
    """Rounded to 2^bits - 1 levels around 0; one step for all, or one along an axis."""
    largest = x.abs().max() if axis is None else x.abs().amax(axis, keepdim=True)
    step = (largest / (2 ** (bits - 1) - 1)).clamp_min(1e-30)
    return torch.round(x / step) * step


def linear_modules(hf_model):
    """Name and module of every linear layer but the unembedding."""
    head = hf_model.get_output_embeddings()
    return {
        name: module
        for name, module in hf_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


@contextmanager
def quantized(hf_model, scheme=W8A8, skip=(), factors=None):
    """`factors`: by module name, what its input is divided by and its weights are multiplied with."""
    handles, stored = [], {}
    for name, module in linear_modules(hf_model).items():
        if name in skip:
            continue
        by_rows = isinstance(module, Conv1D)
        weight, s = module.weight.data, (factors or {}).get(name)
        stored[name] = weight
        if s is not None:
            weight = weight * (s[:, None] if by_rows else s)
        if scheme.weight_bits is not None:
            axis = None if scheme.weights == "tensor" else (0 if by_rows else 1)
            weight = nearest_multiple(weight, scheme.weight_bits, axis)
        module.weight.data = weight

        def hook(_, args, s=s):
            x = args[0] if s is None else args[0] / s
            if scheme.activation_bits is not None:
                x = nearest_multiple(x, scheme.activation_bits, None if scheme.activations == "tensor" else -1)
            return (x, *args[1:])

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in stored.items():
            hf_model.get_submodule(name).weight.data = weight
