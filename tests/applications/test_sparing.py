import numpy as np
import pandas as pd
import pytest

from sd_lens import forecast
from sd_lens.applications.sparing import layers_to_spare, random_controls
from sd_lens.errors import InputError
from tests import planted, tiny


def test_an_analysis_an_automatic_one_and_a_list_name_the_same_blocks():
    model = tiny.wrap(planted.exploding_when_initial().hf_model, "auto")
    both = (planted.EXPLOSION, planted.DECAY)
    assert layers_to_spare(model, "auto") == layers_to_spare(model, forecast(model, progress=False)) == both
    assert layers_to_spare(model, (layer for layer in reversed(both))) == both
    assert layers_to_spare(model, []) == ()
    for numbers in (np.array(both), pd.Series(both)):
        assert tiny.unchecked(layers_to_spare)(model, numbers) == both


@pytest.mark.parametrize(
    ("spare", "message"),
    [
        (1, "spare=1: expected 'auto', blocks, or the result of"),
        (None, "spare=None: expected 'auto', blocks, or the result of"),
        (["2"], "spare: '2' is not a block; blocks are numbered from 0"),
        ([1.0], "spare: 1.0 is not a block"),
    ],
)
def test_what_names_no_blocks_is_said(tiny_llama, spare, message):
    with pytest.raises(InputError, match=message):
        tiny.unchecked(layers_to_spare)(tiny_llama, spare)


@pytest.mark.parametrize(("n_controls", "expected"), [(3, 3), (0, 0), (100, 6)])
def test_controls_are_different_sets_of_other_blocks(n_controls, expected):
    controls = random_controls(6, (2, 4), n_controls, seed=1)
    assert len(controls) == len(set(controls)) == expected
    for control in controls:
        assert len(control) == 2
        assert list(control) == sorted(set(control))
        assert not {2, 4} & set(control)
    assert controls == random_controls(6, (2, 4), n_controls, seed=1)


def test_controls_depend_on_the_seed_and_may_not_exist():
    assert random_controls(30, (2, 11), 5, seed=0) != random_controls(30, (2, 11), 5, seed=1)
    assert random_controls(3, (0, 1), 5) == []
    assert random_controls(3, (), 5) == []
