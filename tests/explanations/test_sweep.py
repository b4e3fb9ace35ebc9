import json

import pandas as pd
import pytest
import torch

from sd_lens import ablate, sweep_ablations
from sd_lens.errors import InputError, NumericalError
from sd_lens.explanations import ablation
from tests import tiny

TEXTS = [torch.tensor([3, 14, 15, 9, 26, 5]), torch.tensor([8, 9, 7])]


@pytest.fixture
def count_runs(monkeypatch):
    runs = []
    behaviour = ablation.Experiment.behaviour

    def counted(self, *arguments):
        runs.append(arguments[1:2])
        return behaviour(self, *arguments)

    monkeypatch.setattr(ablation.Experiment, "behaviour", counted)
    return runs


@pytest.mark.parametrize("mode", ["zero", "mean", "resample", "direction"])
def test_a_sweep_is_one_ablation_after_the_other(tiny_model, mode):
    options = {"direction": torch.arange(32.0)} if mode == "direction" else {}
    found = sweep_ablations(tiny_model, TEXTS, mode, layer=1, progress=False, **options)
    assert found.table.component.tolist()[:6] == ["L0H0", "L0H1", "L0H2", "L0H3", "L0MLP", "L1H0"]
    assert len(found.table) == 15
    changes = found.changes().set_index("component")
    for component in ("L0H2", "L1MLP", "L2H0"):
        one = ablate(tiny_model, TEXTS, component, mode, progress=False, **options)
        assert changes.norm[component] == pytest.approx(float(one.after.watched_norm[1]), rel=1e-6)
        assert changes.loss[component] == pytest.approx(one.after.loss, rel=1e-6)
        assert changes.sink[component] == pytest.approx(float(one.after.sinks.mean()), rel=1e-6)
        assert changes.loss_change[component] == pytest.approx(one.after.loss - one.before.loss, abs=1e-6)
        assert changes.norm_change[component] == pytest.approx(
            float(one.after.watched_norm[1] / one.before.watched_norm[1]) - 1, abs=1e-6
        )
    assert changes.norm_change["L2H0"] == 0  # behind the block
    assert f"AblationSweep ({mode}) of 15 components" in str(found)


def test_an_interrupted_sweep_goes_on_where_it_ended(tiny_llama, tmp_path, monkeypatch, count_runs):
    path = tmp_path / "sweep.json"
    whole = sweep_ablations(tiny_llama, TEXTS, "resample", progress=False)
    del count_runs[:]
    behaviour = ablation.Experiment.behaviour

    def interrupted(self, *arguments):
        if len(count_runs) == 5:
            raise KeyboardInterrupt
        return behaviour(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ablation.Experiment, "behaviour", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep_ablations(tiny_llama, TEXTS, "resample", resume=path, progress=False)
    assert len(json.loads(path.read_text())["rows"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
    del count_runs[:]
    resumed = sweep_ablations(tiny_llama, TEXTS, "resample", resume=path, progress=False)
    assert len(count_runs) == 1 + 15 - 4
    assert resumed.table.loss.tolist() == pytest.approx(whole.table.loss.tolist(), rel=1e-12)
    del count_runs[:]
    assert sweep_ablations(tiny_llama, TEXTS, "resample", resume=path, progress=False).table.equals(resumed.table)
    assert len(count_runs) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mode": "mean"}, "mode"),
        ({"layer": 0}, "layer"),
        ({"texts": TEXTS[:1]}, "texts"),
        ({"max_length": 3}, "max_length"),
        ({"watch": 1}, "watch"),
        ({"where": ["w6"]}, "where"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_sweep_of_other_settings_is_not_resumed(tiny_llama, tmp_path, options, name):
    path = tmp_path / "sweep.json"
    arguments = {"texts": TEXTS, "mode": "zero", "components": ["L0H0"], "resume": path, "progress": False}
    sweep_ablations(tiny_llama, **arguments)
    with pytest.raises(InputError, match=f"is a sweep with another {name}: delete it"):
        sweep_ablations(tiny_llama, **(arguments | options))


def test_a_sweep_of_another_model_is_not_resumed(tiny_llama, tmp_path):
    path = tmp_path / "sweep.json"
    sweep_ablations(tiny_llama, TEXTS, components=["L0H0"], resume=path, progress=False)
    other = tiny.wrap(tiny.llama(seed=1), "auto")
    with pytest.raises(InputError, match="is a sweep with another"):
        sweep_ablations(other, TEXTS, components=["L0H0"], resume=path, progress=False)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"settings": {}}',
        '{"settings": 3, "rows": {}}',
        '{"settings": {}, "rows": [1]}',
        '{"settings": {}, "rows": {"L0H0": {"norm": 1.0}}}',
    ],
)
def test_damaged_files_are_named(tiny_llama, tmp_path, content):
    path = tmp_path / "sweep.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"sweep\.json is not a sweep to resume, or is damaged: delete it"):
        sweep_ablations(tiny_llama, TEXTS, resume=path, progress=False)
    assert path.read_text() == content


def test_bad_arguments_are_named(tiny_llama, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        sweep_ablations(
            tiny_llama, TEXTS, components=["L0H0"], resume=tmp_path / "nowhere" / "sweep.json", progress=False
        )
    with pytest.raises(InputError, match="block 3 does not exist"):
        sweep_ablations(tiny_llama, TEXTS, layer=3, progress=False)
    with pytest.raises(InputError, match="mode='direction' needs a direction"):
        sweep_ablations(tiny_llama, TEXTS, "direction", progress=False)


def test_what_is_not_finite_stops_the_sweep(tiny_llama):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_out[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="not finite"):
        sweep_ablations(tiny_llama, TEXTS, progress=False)


def test_a_sweep_with_one_setting_more_is_not_resumed(tiny_llama, tmp_path):
    path = tmp_path / "sweep.json"
    sweep_ablations(tiny_llama, TEXTS, components=["L0H0"], resume=path, progress=False)
    content = json.loads(path.read_text())
    content["settings"]["colour"] = "red"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is a sweep with another colour"):
        sweep_ablations(tiny_llama, TEXTS, components=["L0H0"], resume=path, progress=False)
    with pytest.raises(InputError, match="cannot resume from .*: it is not a file"):
        sweep_ablations(tiny_llama, TEXTS, components=["L0H0"], resume=tmp_path, progress=False)


def test_the_order_of_tokens_and_components_does_not_matter_to_a_resumed_sweep(tiny_llama, tmp_path):
    path = tmp_path / "sweep.json"
    first = sweep_ablations(
        tiny_llama, TEXTS, components=["L0H0", "L1H1"], where=["w6", "w5"], resume=path, progress=False
    )
    again = sweep_ablations(
        tiny_llama, TEXTS, components=["L1H1", "L0H0"], where=["w5", "w6"], resume=path, progress=False
    )
    assert first.table.loss.tolist() == again.table.loss.tolist()[::-1]


def test_neurons_have_a_column_of_their_own(tiny_llama):
    table = sweep_ablations(tiny_llama, TEXTS, components=["L0H2", "L0N5"], progress=False).table
    assert table["head"].tolist() == [2, None] or table["head"].isna().tolist() == [False, True]
    assert table.neuron.isna().tolist() == [True, False]
    assert table.neuron[1] == 5


def test_texts_of_one_token_are_swept_without_a_loss(tiny_llama):
    found = sweep_ablations(tiny_llama, torch.tensor([[3], [4]]), progress=False)
    assert "no text has a next token to predict" in str(found)


def test_tables_are_checked_before_anything_runs(tiny_llama):
    with pytest.raises(InputError, match="no column 'position'"):
        sweep_ablations(tiny_llama, TEXTS, where=pd.DataFrame({"text": [0]}), progress=False)
