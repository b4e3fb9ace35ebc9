import pytest
import torch
from safetensors.torch import save_file

from sd_lens.errors import InputError
from sd_lens.storage import load_result, save_result, written_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    with written_whole(tmp_path / "a") as temporary:
        temporary.write_text("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot write .*nowhere"), written_whole(tmp_path / "nowhere" / "x"):
        raise AssertionError("not reached")


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="cannot write .*taken"), written_whole(tmp_path / "taken"):
        pass


def test_results_come_back_with_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.float64)}
    save_result(tmp_path / "r", tensors, {"kind": "Thing", "layers": [1, 2]})
    found, metadata = load_result(tmp_path / "r", "Thing")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert metadata == {"kind": "Thing", "layers": [1, 2]}


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_result(tmp_path / "none", "Thing")
    (tmp_path / "text").write_text("hello, this is not safetensors")
    with pytest.raises(InputError, match="is not a safetensors file of sd_lens, or is damaged"):
        load_result(tmp_path / "text", "Thing")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(InputError, match="does not hold Thing; it holds no sd_lens result"):
        load_result(tmp_path / "foreign", "Thing")
