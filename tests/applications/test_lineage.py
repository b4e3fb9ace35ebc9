import copy
import math

import pytest
import torch

from sd_lens import Signature, lineage, load_model, signature
from sd_lens.errors import InputError
from sd_lens.linear.largest_channels import channels_beyond_chance, log10_chance_of_sharing
from sd_lens.linear.random_angles import chance_angle
from tests import planted
from tests.linear.test_largest_channels import in_random_channels

READING = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def made(direction, *, spectrum=None, name="m", d_model=None):
    spectrum = torch.rand(3, 8) + 1 if spectrum is None else spectrum
    return Signature(
        direction=direction, spectrum=spectrum, explosion_layers=(), decay_layers=(), norm_ratio=9.0, source="texts",
        model_name=name, d_model=len(direction) if d_model is None else d_model,
    )  # fmt: skip


def peaked(width, seed):
    """A direction that is nearly one channel, the first; the others are random."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    direction[0] = 8 * direction[1:].norm()
    return direction / direction.norm()


@torch.no_grad()
def fine_tuned(hf_model, texts, steps=20):
    """A copy that a few steps of AdamW have brought nearer to the texts."""
    model = copy.deepcopy(hf_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            model(texts, labels=texts).loss.backward()
            optimizer.step()
    assert model(texts, labels=texts).loss < hf_model(texts, labels=texts).loss - 0.1
    return model.eval()


@torch.no_grad()
def permuted(hf_model, order):
    """The same Llama with its channels in another order."""
    model = copy.deepcopy(hf_model)
    for name, parameter in model.named_parameters():
        reads = any(part in name for part in READING)
        parameter.copy_(parameter[:, order] if reads else parameter[order])
    return model


def signed(hf_model, texts):
    return signature(load_model(hf_model, device="cpu", dtype=hf_model.dtype), texts, progress=False)


def test_fine_tunes_stay_with_their_base_and_other_models_apart():
    bases = {seed: planted.llama(seed) for seed in (0, 1)}
    signatures = {}
    for seed, base in bases.items():
        signatures[f"base {seed}"] = signed(base.hf_model, base.texts)
        signatures[f"tuned {seed}"] = signed(fine_tuned(base.hf_model, base.texts), base.texts)
    found = lineage(signatures)
    assert found.groups == (("base 0", "tuned 0"), ("base 1", "tuned 1"))
    kin = found.table[found.table["first"].str[-1] == found.table["second"].str[-1]]
    assert (kin.verdict == "related").all()
    assert kin.angle.max() < 10
    others = found.table.drop(kin.index)
    assert (others.verdict == "unrelated").all()
    assert others.angle.min() > 60
    assert str(found) == (
        "Lineage of 4 models: 2 of 6 pairs related, 0 not comparable; groups base 0, tuned 0; base 1, tuned 1"
    )


def test_a_permutation_of_channels_defeats_the_angle_and_not_the_spectrum():
    defect = planted.llama()
    hf_model = defect.hf_model.double()
    order = torch.randperm(planted.WIDTH, generator=torch.Generator().manual_seed(1))
    other = permuted(hf_model, order)
    with torch.no_grad():
        torch.testing.assert_close(other(defect.texts).logits, hf_model(defect.texts).logits)
    one, two = signed(hf_model, defect.texts), signed(other, defect.texts)
    torch.testing.assert_close(two.spectrum, one.spectrum, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two.direction, one.direction[order], rtol=1e-3, atol=1e-5)
    (row,) = lineage({"one": one, "two": two}).table.itertuples()
    assert row.angle > 60
    assert row.spectral_distance < 1e-5
    assert row.verdict == "equal spectra"
    assert lineage({"one": one, "two": two}).groups == (("one",), ("two",))  # no error rate, so no group


def test_independent_models_of_one_recipe_have_no_equal_spectra():
    signatures = [signed(planted.llama(seed).hf_model, planted.llama(seed).texts) for seed in range(4)]
    assert set(lineage(signatures).table.verdict) == {"unrelated"}


def test_a_small_angle_is_not_explained_by_the_spectra():
    """One-channel directions a few degrees apart, with equal spectra: nothing says that channels were permuted."""
    one, other = peaked(576, 0), peaked(576, 1)
    spectrum = torch.rand(3, 8)
    (row,) = lineage({"a": made(one, spectrum=spectrum), "b": made(other, spectrum=spectrum)}).table.itertuples()
    assert row.verdict == "undecided"


def test_one_common_channel_makes_a_small_angle_and_no_relation():
    """What the angle to uniform directions would call impossible happens once in 576 times."""
    one, other = peaked(576, 0), peaked(576, 1)
    (row,) = lineage({"one": made(one), "other": made(other)}).table.itertuples()
    assert row.angle < 12 < row.threshold
    assert row.shared < row.required
    assert row.verdict == "undecided"


def test_chance_is_shared_out_among_the_comparisons():
    generator = torch.Generator().manual_seed(0)
    four = {str(i): made(torch.randn(64, generator=generator)) for i in range(4)}
    found = lineage(four, false_positive_rate=0.03)
    assert found.n_comparisons == 6
    assert found.table.threshold.unique() == pytest.approx([chance_angle(math.log10(0.005), 64)])
    assert found.table.required.unique().tolist() == [channels_beyond_chance(math.log10(0.005), 64)]
    for row in found.table.itertuples():
        assert row.log10_p == log10_chance_of_sharing(int(row.shared), 64)


def test_unrelated_models_are_called_related_no_more_often_than_allowed():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=generator) ** 5  # few channels hold nearly all of it
    mistaken = 0
    for _ in range(60):
        found = lineage([made(in_random_channels(base, generator)) for _ in range(4)], false_positive_rate=0.2)
        mistaken += (found.table.verdict == "related").any()
    assert 0 < mistaken <= 60 * 0.2 + 3 * math.sqrt(60 * 0.2 * 0.8)


def test_what_cannot_be_compared_is_said_and_never_linked():
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    spectrum = torch.ones(3, 8)
    found = lineage(
        {
            "a": made(direction, spectrum=spectrum),
            "b": made(-direction, spectrum=torch.ones(5, 8)),
            "wide": made(torch.ones(100), spectrum=spectrum),
            "none": made(None, spectrum=spectrum, d_model=64),
        }
    )
    verdicts = {(row.first, row.second): row.verdict for row in found.table.itertuples()}
    assert verdicts.pop(("a", "b")) == "related"
    assert set(verdicts.values()) == {"not comparable"}
    assert found.groups == (("a", "b"), ("wide",), ("none",))
    assert found.n_comparisons == 1
    assert [found.names[i] for i in found.order] == ["a", "b", "wide", "none"]
    assert len(found.merges) == 1
    assert torch.isnan(found.angles[0, 2:]).all()
    assert torch.isnan(found.angles[3]).all()
    assert found.table.spectral_distance.isna().all()  # five blocks and three
    assert found.table[["shared", "required"]].isna().sum().tolist() == [5, 5]


def test_signatures_without_names_have_those_of_their_models():
    generator = torch.Generator().manual_seed(0)
    found = lineage(made(torch.randn(64, generator=generator), name=name) for name in ("gpt2", "gpt2", "other"))
    assert found.names == ("gpt2", "gpt2 (2)", "other")
    assert found.to_dataframe().equals(found.table)
    assert found.angles.diagonal().tolist() == [0, 0, 0]
    assert torch.equal(found.angles, found.angles.T)


def test_bad_arguments_are_named():
    one = made(torch.ones(64))
    with pytest.raises(InputError, match="a lineage needs two signatures or more, not 1"):
        lineage([one])
    with pytest.raises(InputError, match="false_positive_rate=1.0: expected a number between 0 and 1"):
        lineage([one, one], false_positive_rate=1.0)
