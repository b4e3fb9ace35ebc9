import gc
import math
import weakref

import pytest
import torch

from sd_lens import signature, signature_trajectory
from sd_lens.errors import InputError, ModelLoadError
from sd_lens.linear.angles import acute_angles
from tests import planted, tiny


@torch.no_grad()
def between(start, end, share):
    """The planted model as far on its way from a random one."""
    for parameter, first, last in zip(
        end.parameters(), start.parameters(), planted.llama().hf_model.parameters(), strict=True
    ):
        parameter.copy_((1 - share) * first + share * last)
    return end


def checkpoints(shares):
    for share in shares:
        start = tiny.randomised(planted.llama(9).hf_model, 1, scale=0.02)
        yield f"step {share}", tiny.wrap(between(start, planted.llama().hf_model, share), "auto")


def test_checkpoints_are_compared_with_the_last():
    texts = planted.llama().texts
    found = signature_trajectory(checkpoints([0.0, 0.8, 1.0]), iter([texts]), progress=False)
    assert found.names == ("step 0.0", "step 0.8", "step 1.0")
    assert found.signatures[0].direction is None
    assert math.isnan(found.angles[0])
    last = signature(tiny.wrap(planted.llama().hf_model, "auto"), texts, progress=False)
    assert acute_angles(last.direction[None], found.signatures[2].direction).item() < 1e-3
    assert found.angles[1] == acute_angles(found.signatures[1].direction[None], last.direction)
    assert 0 < found.angles[1] < 20
    assert found.angles[2] == 0
    table = found.to_dataframe()
    assert list(table) == ["checkpoint", "angle", "norm_ratio", "explosion_layers", "decay_layers"]
    assert table.norm_ratio.is_monotonic_increasing
    assert table.explosion_layers.tolist() == [(), (2,), (2,)]
    assert str(found).endswith("first direction at step 0.8")


def test_folders_are_loaded_one_after_the_other(tmp_path):
    for name in ("first", "last"):
        planted.llama().hf_model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    found = signature_trajectory(
        {"first": tmp_path / "first", "last": str(tmp_path / "last")}, planted.llama().texts, progress=False
    )
    assert found.angles.tolist() == [0, 0]
    folders = signature_trajectory([tmp_path / "first", str(tmp_path / "last")], planted.llama().texts, progress=False)
    assert folders.names == ("first", "last")
    with pytest.raises(ModelLoadError, match="there is no folder"):
        signature_trajectory({"gone": tmp_path / "gone"}, progress=False)


def test_one_checkpoint_is_in_memory_at_a_time():
    alive = weakref.WeakSet()

    def training():
        for step in range(3):
            gc.collect()  # wrappers refer to themselves in circles
            assert not alive
            model = tiny.wrap(tiny.llama(step), "auto")
            alive.add(model)
            yield str(step), model
            del model

    assert len(signature_trajectory(training(), progress=False).names) == 3


def test_a_checkpoint_may_be_a_transformers_model():
    found = signature_trajectory([("last", tiny.llama())], progress=False)
    assert found.signatures[0].d_model == 32


def test_bad_checkpoints_are_named(tiny_llama):
    with pytest.raises(InputError, match="a trajectory needs at least one checkpoint"):
        signature_trajectory([], progress=False)
    wide = tiny.wrap(tiny.llama(hidden_size=64, head_dim=16), "auto")
    with pytest.raises(InputError, match="checkpoints of widths 32, 64 are not of one training run"):
        signature_trajectory({"a": tiny_llama, "b": wide}, progress=False)
