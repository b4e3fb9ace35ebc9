import copy
import math

import pytest
import torch

from sd_lens import Signature, find_high_norm_tokens, forecast, signature, singular_spectra
from sd_lens.errors import InputError
from sd_lens.linear.angles import acute_angles
from sd_lens.storage import load_result, save_result
from tests import planted, tiny


@pytest.fixture
def found():
    defect = planted.llama()
    return signature(tiny.wrap(defect.hf_model, "auto"), defect.texts, progress=False)


def test_from_texts_it_is_what_they_showed(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    found = signature(model, planted_defect.texts, progress=False)
    observed = find_high_norm_tokens(model, planted_defect.texts, progress=False)
    assert torch.equal(found.direction, observed.direction.float())
    assert acute_angles(found.direction[None], planted_defect.direction).item() < 3
    assert (found.explosion_layers, found.decay_layers) == ((planted.EXPLOSION,), (planted.DECAY,))
    assert found.norm_ratio == float((observed.scan.maximum / observed.scan.ordinary_median).max())
    spectra = singular_spectra(model, convention="pre-gain", progress=False)
    torch.testing.assert_close(found.spectrum, spectra.values.float())
    assert torch.equal(signature(model, observed, progress=False).direction, found.direction)
    assert (found.source, found.d_model) == ("texts", planted.WIDTH)
    assert "from texts: d_model 64, explosion blocks (2,), decay blocks (4,), norms up to" in str(found)


def test_from_weights_it_is_the_forecast(backend):
    defect = planted.exploding_when_initial()
    model = tiny.wrap(defect.hf_model, backend)
    found, forecasted = signature(model, progress=False), forecast(model, progress=False)
    assert torch.equal(found.direction, forecasted.direction.float())
    assert signature(model, forecasted, progress=False).source == found.source == "weights"
    assert acute_angles(found.direction[None], defect.direction).item() < 10
    assert found.explosion_layers == (planted.EXPLOSION,)
    assert found.norm_ratio == float((forecasted.norms / forecasted.ordinary_norms).max())
    assert found.source == "weights"


@pytest.mark.skipif(len(tiny.BACKENDS) < 2, reason="this TransformerLens has one wrapper")
def test_both_wrappers_have_one_signature(planted_defect):
    one, other = (
        signature(tiny.wrap(copy.deepcopy(planted_defect.hf_model), backend), planted_defect.texts, progress=False)
        for backend in tiny.BACKENDS
    )
    assert acute_angles(one.direction[None], other.direction).item() < 0.01
    torch.testing.assert_close(one.spectrum, other.spectrum, rtol=1e-3, atol=1e-5)


def test_what_another_model_showed_is_refused(tiny_llama):
    defect = planted.llama()
    foreign = find_high_norm_tokens(tiny.wrap(defect.hf_model, "auto"), defect.texts, progress=False)
    with pytest.raises(InputError, match="the direction has 64 entries: it is of another model"):
        signature(tiny_llama, foreign, progress=False)


@pytest.mark.parametrize("texts", [None, torch.arange(40).view(4, 10)])
def test_a_random_model_has_no_direction_and_a_spectrum_all_the_same(backend, texts):
    found = signature(tiny.wrap(tiny.llama(), backend), texts, progress=False)
    assert found.direction is None
    assert found.explosion_layers == ()
    assert found.spectrum.shape == (3, 8)
    assert str(found).endswith("d_model 32, no high-norm tokens and so no direction")


def test_it_comes_back_from_its_file(found, tmp_path):
    found.save(tmp_path / "s.safetensors")
    again = Signature.load(tmp_path / "s.safetensors")
    assert torch.equal(again.direction, found.direction)
    assert torch.equal(again.spectrum, found.spectrum)
    assert str(again) == str(found)
    for name in ("explosion_layers", "decay_layers", "norm_ratio", "source", "model_name", "d_model"):
        assert getattr(again, name) == getattr(found, name)


def test_one_without_direction_comes_back_too(tmp_path):
    found = signature(tiny.wrap(tiny.llama(), "auto"), progress=False)
    found.save(tmp_path / "s")
    assert Signature.load(tmp_path / "s").direction is None


def test_damaged_and_foreign_files_are_named(found, tmp_path):
    save_result(tmp_path / "other", {"a": torch.ones(1)}, {"kind": "SingularDefects"})
    with pytest.raises(InputError, match="other does not hold Signature; it holds SingularDefects"):
        Signature.load(tmp_path / "other")
    save_result(tmp_path / "empty", {"a": torch.ones(1)}, {"kind": "Signature"})
    with pytest.raises(InputError, match="empty holds a Signature without 'spectrum': it is damaged"):
        Signature.load(tmp_path / "empty")
    found.save(tmp_path / "s")
    tensors, metadata = load_result(tmp_path / "s", "Signature")
    for change, message in (
        ({"explosion_layers": 5}, "holds a Signature with 'int' object is not iterable: it is damaged"),
        ({"d_model": 32}, "holds a Signature of another width than it says, or with NaN: it is damaged"),
    ):
        save_result(tmp_path / "damaged", tensors, metadata | change)
        with pytest.raises(InputError, match=f"damaged {message}"):
            Signature.load(tmp_path / "damaged")
    save_result(tmp_path / "nan", tensors | {"spectrum": tensors["spectrum"] * math.nan}, metadata)
    with pytest.raises(InputError, match="nan holds a Signature of another width than it says, or with NaN"):
        Signature.load(tmp_path / "nan")
    tiny.unchecked(save_result)(tmp_path / "list", tensors, [1])
    with pytest.raises(InputError, match="list does not hold Signature; it holds no sd_lens result"):
        Signature.load(tmp_path / "list")
    with pytest.raises(InputError, match="cannot write"):
        found.save(tmp_path / "nowhere" / "s")
