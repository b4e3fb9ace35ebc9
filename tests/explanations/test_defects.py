import dataclasses
import importlib
import math

import pytest
import torch

from sd_lens import SingularDefects, find_high_norm_tokens, singular_defects
from sd_lens.errors import InputError, NumericalError, SmallGapWarning
from sd_lens.linear.approximations import attention_map, block_map, ffn_map
from sd_lens.linear.maps import identity_like
from sd_lens.linear.spectra import leading_triples
from sd_lens.models.blocks import block_weights
from sd_lens.storage import save_result
from tests import planted, tiny

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")


def test_the_planted_defect_is_predicted_from_the_weights_alone(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    defects = singular_defects(model, progress=False)
    angles = defects.angles_to(planted_defect.direction)
    assert angles[[planted.EXPLOSION, planted.DECAY]].max() < 1
    assert defects.block.gap[planted.EXPLOSION] > 5
    elsewhere = [angles[i] for i in range(planted.N_LAYERS) if i not in (planted.EXPLOSION, planted.DECAY)]
    assert min(elsewhere) > 30
    # ... and what the weights predict is what running the model shows
    found = find_high_norm_tokens(model, planted_defect.texts, progress=False)
    assert defects.angles_to(found.direction)[planted.EXPLOSION] < 1.5


def test_triples_equal_the_dense_svd_of_each_map(tiny_model):
    defects = singular_defects(tiny_model, progress=False)
    for layer in range(tiny_model.cfg.n_layers):
        block = block_weights(tiny_model, layer)
        A, F = attention_map(block), ffn_map(block)
        for part, M in (("attention", A), ("ffn", F), ("block", block_map(A, F))):
            triples = getattr(defects, part)
            U, s, Vh = torch.linalg.svd(M.dense().double())
            assert triples.values[layer].item() == pytest.approx(s[0].item(), rel=1e-5)
            assert triples.gap[layer].item() == pytest.approx((s[0] / s[1]).item(), rel=1e-2)
            assert abs(float(triples.left[layer].double() @ U[:, 0])) == pytest.approx(1, abs=1e-6)
            assert abs(float(triples.right[layer].double() @ Vh[0])) == pytest.approx(1, abs=1e-6)


def test_triples_of_the_residual_steps_equal_the_dense_svd(tiny_model):
    block = block_weights(tiny_model, 1)
    for M in (attention_map(block), ffn_map(block)):
        step = identity_like(M) + M
        triples = leading_triples(step, k=2, tol=1e-5)
        U, s, Vh = torch.linalg.svd(step.dense().double())
        torch.testing.assert_close(triples.values, s[:2], rtol=1e-5, atol=0)
        for i in range(2):
            assert abs(float(triples.left[:, i].double() @ U[:, i])) == pytest.approx(1, abs=1e-5)
            assert abs(float(triples.right[:, i].double() @ Vh[i])) == pytest.approx(1, abs=1e-5)


def test_both_backends_agree(tiny_hf):
    state = {name: tensor.clone() for name, tensor in tiny_hf.state_dict().items()}
    results = []
    for backend in tiny.BACKENDS:
        tiny_hf = type(tiny_hf)(tiny_hf.config)
        tiny_hf.load_state_dict(state)
        results.append(singular_defects(tiny.wrap(tiny_hf.eval(), backend), progress=False))
    for other in results[1:]:
        torch.testing.assert_close(results[0].block.left, other.block.left, atol=1e-3, rtol=0)
        torch.testing.assert_close(results[0].block.values, other.block.values, rtol=1e-5, atol=0)


def folded(model):
    """The same model with its norms folded into the weights, in the wrapper's own way."""
    if hasattr(model, "enable_compatibility_mode"):
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    return model


def test_a_folded_model_gives_the_pre_gain_convention(backend):
    """RMSNorm: folding changes where the gain sits, and nothing of the residual stream."""
    unfolded = singular_defects(tiny.wrap(tiny.llama(), backend), convention="pre-gain", progress=False)
    after = singular_defects(folded(tiny.wrap(tiny.llama(), backend)), progress=False)
    assert (unfolded.convention, after.convention) == ("pre-gain", "pre-gain")
    for part in ("block", "ffn", "attention"):
        one, other = getattr(unfolded, part), getattr(after, part)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=0)
        torch.testing.assert_close(one.left, other.left, atol=5e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_and_centred_models_are_analysed_too(family, backend):
    model = folded(tiny.wrap(getattr(tiny, family)(), backend))
    defects = singular_defects(model, progress=False)
    assert torch.isfinite(defects.block.left).all()
    assert defects.convention == "pre-gain"
    found = find_high_norm_tokens(model, torch.arange(3, 33).view(3, 10), progress=False)
    assert found.scan.n_tokens == 30


def test_sampled_linearization_is_near_the_closed_form(tiny_model):
    closed = singular_defects(tiny_model, progress=False)
    sampled = singular_defects(tiny_model, linearization="sampled", n_samples=50_000, seed=1, progress=False)
    again = singular_defects(tiny_model, linearization="sampled", n_samples=50_000, seed=1, progress=False)
    assert torch.equal(sampled.block.values, again.block.values)
    assert sampled.linearization == "sampled"
    torch.testing.assert_close(sampled.ffn.values, closed.ffn.values, rtol=0.05, atol=0)
    assert not torch.equal(sampled.ffn.values, closed.ffn.values)
    torch.testing.assert_close(sampled.attention.values, closed.attention.values, rtol=1e-5, atol=0)


def test_layers_can_be_chosen(tiny_model):
    everything = singular_defects(tiny_model, progress=False)
    some = singular_defects(tiny_model, layers=[2, 0], progress=False)
    assert some.layers == (2, 0)
    torch.testing.assert_close(some.block.left, everything.block.left[[2, 0]])
    for bad, message in (([3], "block 3 does not exist"), ([], "layers is empty")):
        with pytest.raises(InputError, match=message):
            singular_defects(tiny_model, layers=bad, progress=False)


def test_save_and_load_are_exact(tiny_model, tmp_path):
    defects = singular_defects(tiny_model, layers=[1, 2], progress=False)
    defects.save(tmp_path / "d.safetensors")
    loaded = SingularDefects.load(tmp_path / "d.safetensors")
    assert str(loaded) == str(defects)
    for part in ("block", "attention", "ffn"):
        for field in dataclasses.fields(getattr(defects, part)):
            assert torch.equal(getattr(getattr(defects, part), field.name), getattr(getattr(loaded, part), field.name))
    assert (loaded.layers, loaded.model_name, loaded.convention) == (
        defects.layers, defects.model_name, defects.convention,
    )  # fmt: skip
    with pytest.raises(InputError, match="there is no file"):
        SingularDefects.load(tmp_path / "none")


def test_the_table_holds_values_and_gaps(tiny_model):
    defects = singular_defects(tiny_model, progress=False)
    table = defects.to_dataframe()
    assert table.layer.tolist() == [0, 1, 2]
    for part in ("block", "attention", "ffn"):
        assert table[f"{part}_value"].tolist() == getattr(defects, part).values.tolist()
        assert table[f"{part}_gap"].tolist() == getattr(defects, part).gap.tolist()


def test_a_small_gap_warns_and_names_the_block():
    hf_model = tiny.llama()
    with torch.no_grad():
        layer = hf_model.model.layers[1]
        layer.mlp.down_proj.weight.zero_()  # L = I + A
        layer.self_attn.o_proj.weight.mul_(1e-4)  # ... and A is next to nothing: all singular values are near 1
    model = tiny.wrap(hf_model, "auto")
    with pytest.warns(SmallGapWarning, match=r"gap s1/s2 below 1\.05 in block 1 \(1\.00\d\)"):
        defects = singular_defects(model, layers=[1], progress=False)
    assert defects.ffn.values.item() == 0
    assert defects.ffn.gap.item() == 1
    assert math.isclose(defects.block.values.item(), 1, rel_tol=1e-2)


def test_nan_weights_are_an_error(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].attn.W_O[0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or inf"):
        singular_defects(tiny_llama, progress=False)


def test_unsupported_blocks_are_reported_before_any_work(tiny_llama, monkeypatch):
    defects = importlib.import_module("sd_lens.explanations.defects")
    monkeypatch.setattr(defects, "leading_triples", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(InputError, match="block 7 does not exist"):
        singular_defects(tiny_llama, layers=[0, 7], progress=False)


def test_the_papers_variant_drops_the_centring_in_both_maps(backend):
    model = tiny.wrap(tiny.gpt2(), backend)
    plain = singular_defects(model, centered=False, progress=False)
    for layer in range(3):
        block = block_weights(model, layer)
        A, F = attention_map(block, centered=False), ffn_map(block, centered=False)
        for part, M in (("attention", A), ("ffn", F), ("block", block_map(A, F))):
            s = torch.linalg.svdvals(M.dense().double())[0].item()
            assert getattr(plain, part).values[layer].item() == pytest.approx(s, rel=1e-5)
    # Centred maps cannot see the mean of their input, the others do.
    centred = singular_defects(model, progress=False)
    for part in ("attention", "ffn", "block"):
        assert getattr(plain, part).right.sum(dim=1).abs().max() > 0.05
    for part in ("attention", "ffn"):
        assert getattr(centred, part).right.sum(dim=1).abs().max() < 1e-4


def test_a_file_without_some_of_the_tensors_is_named(tmp_path):
    path = tmp_path / "d.safetensors"
    save_result(path, {"block.left": torch.ones(1, 2)}, {"kind": "SingularDefects", "layers": [0]})
    with pytest.raises(InputError, match=r"SingularDefects without 'block\.values': it is damaged"):
        SingularDefects.load(path)


def test_results_can_be_compared_and_kept_in_sets(tiny_llama):
    one, other = (singular_defects(tiny_llama, [0], progress=False) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2
