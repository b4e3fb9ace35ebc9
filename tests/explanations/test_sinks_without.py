import dataclasses

import pytest
import torch

from sd_lens import ablated, attention_sinks, sinks_without
from sd_lens.errors import InputError
from tests import planted, tiny
from tests.models.test_hooks import assert_unchanged, state


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_the_planted_sink_lives_on_what_the_explosion_writes_along_the_direction(backend):
    defect = planted.sink()
    model = tiny.wrap(defect.hf_model, backend)
    texts = torch.stack([text.roll(-int((text == planted.TOKEN).nonzero()[0])) for text in defect.texts])
    found = sinks_without(model, texts, planted.EXPLOSION, defect.direction, progress=False)
    assert found.components == (f"L{planted.EXPLOSION}MLP",)
    assert (found.before.sink_rate, found.after.sink_rate, found.remaining) == (1 / 24, 0, 0)
    assert float(found.after.on_first[planted.SINK_LAYER, planted.SINK_HEAD]) < 0.2
    assert "sink rate 4.2 % -> 0.0 %" in str(found)
    # It is this direction, this block and this token that matter.
    other = torch.randn(planted.WIDTH, generator=torch.Generator().manual_seed(3))
    other -= (other @ defect.direction) * defect.direction
    for layers, direction, positions in (
        (planted.EXPLOSION, other, None),
        ([0, 1, planted.SINK_LAYER], defect.direction, None),
        (planted.EXPLOSION, defect.direction, range(1, 12)),
    ):
        kept = sinks_without(model, texts, layers, direction, positions=positions, progress=False)
        assert (kept.after.sink_rate, kept.remaining) == (1 / 24, 1)


def test_it_is_what_the_two_measurements_say(tiny_model):
    texts = [torch.tensor([3, 14, 15, 9, 26, 5]), torch.tensor([8, 9, 7])]
    u = torch.randn(32, generator=torch.Generator().manual_seed(1))
    before = state(tiny_model)
    found = sinks_without(tiny_model, iter(texts), [0, 1], u, ["9"], progress=False)
    assert_unchanged(before, state(tiny_model))
    torch.testing.assert_close(
        found.before.received, attention_sinks(tiny_model, texts, progress=False).received, equal_nan=True
    )
    with ablated(tiny_model, ["L0MLP", "L1MLP"], "direction", direction=u):
        after = attention_sinks(tiny_model, texts, ["9"], progress=False)
    torch.testing.assert_close(found.after.received, after.received, equal_nan=True)
    torch.testing.assert_close(found.after.watched_value_norm, after.watched_value_norm)
    nobody = dataclasses.replace(found, before=dataclasses.replace(found.before, received=0 * found.before.received))
    assert "no head had a sink" in str(nobody)
    table = found.to_dataframe()
    assert len(table) == 12
    assert table.on_first_after.tolist() == after.on_first.flatten().tolist()
    assert found.by_layer().on_first_before.tolist() == pytest.approx(found.before.on_first.mean(dim=1).tolist())


@pytest.mark.parametrize(
    ("layers", "direction", "message"),
    [
        (3, torch.ones(32), "block 3 does not exist: the model has blocks 0 to 2"),
        ([], torch.ones(32), "layers is empty"),
        (1, torch.zeros(32), "expected 32 finite numbers, not all 0"),
        (1, None, "mode='direction' needs a direction"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, layers, direction, message):
    with pytest.raises(InputError, match=message):
        tiny.unchecked(sinks_without)(tiny_llama, torch.tensor([3, 4, 5]), layers, direction, progress=False)
