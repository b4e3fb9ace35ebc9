"""The signature of SmolLM2-135M: small, the same in every wrapper and from both sources, and not easily lost."""

import copy

import pytest
import torch

from sd_lens import Signature, default_texts, lineage, load_model, signature
from sd_lens.models.loading import _dequantise, _from_folder
from sd_lens.models.packaged import packaged_folder
from tests import tiny

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def from_weights(smollm2):
    return signature(smollm2, progress=False)


@pytest.fixture(scope="module")
def hf_model():
    return _from_folder(packaged_folder(_dequantise), torch.float32, False)[0]


def compared(one, other):
    return next(lineage({"one": one, "other": other}).table.itertuples())


def test_it_takes_less_than_eight_kilobytes(from_weights, tmp_path):
    from_weights.save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_size < 8_000
    row = compared(Signature.load(tmp_path / "s.safetensors"), from_weights)
    assert (row.angle, row.shared, row.spectral_distance) == (0, 24, 0)


def test_texts_show_what_the_weights_foretell(smollm2, from_weights):
    row = compared(from_weights, signature(smollm2, default_texts()[:5], progress=False))
    assert row.angle < 1
    assert row.log10_p < -30
    assert row.verdict == "related"


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_every_wrapper_has_the_same(from_weights, backend):
    row = compared(from_weights, signature(load_model("smollm2-135m", backend=backend), progress=False))
    assert row.angle < 0.05
    assert row.spectral_distance < 1e-3


@torch.no_grad()
def test_rounding_to_four_bits_leaves_it_and_other_entries_do_not(hf_model, from_weights):
    rounded, shuffled = copy.deepcopy(hf_model), copy.deepcopy(hf_model)
    generator = torch.Generator().manual_seed(0)
    for here, there in zip(rounded.model.layers.parameters(), shuffled.model.layers.parameters(), strict=True):
        if here.ndim == 2:
            parts = here.view(len(here), -1, 32)
            step = parts.abs().amax(-1, keepdim=True) / 7
            here.copy_((torch.round(parts / step) * step).view_as(here))
            there.copy_(there.flatten()[torch.randperm(there.numel(), generator=generator)].view_as(there))
    row = compared(from_weights, signature(load_model(rounded, backend="bridge", device="cpu"), progress=False))
    assert row.angle < 8
    assert row.verdict == "related"
    none = signature(load_model(shuffled, backend="bridge", device="cpu"), progress=False)
    assert none.direction is None
    assert compared(from_weights, none).verdict == "not comparable"
