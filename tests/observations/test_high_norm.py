import itertools
import math

import pytest
import torch

from sd_lens import find_high_norm_tokens
from sd_lens.errors import InputError
from sd_lens.linear.angles import acute_angles
from sd_lens.models.hooks import residual_stream_points, run_with_hooks
from sd_lens.observations.accumulators import DirectionSums
from sd_lens.observations.high_norm import token_group
from sd_lens.observations.histograms import CUTS
from tests import planted, tiny


def states_above(model, texts, threshold):
    """`{layer: [n, d_model]}`: all states above a threshold, by brute force."""
    seen = {}
    points = residual_stream_points(model.cfg.n_layers)
    run_with_hooks(model, texts, {n: lambda x, n=n: seen.__setitem__(n, x.double()) for n in points})
    layers = list(seen.values())[1:]
    return {layer: x[x.norm(dim=-1) > threshold[layer]] for layer, x in enumerate(layers)}


def find(model, texts, threshold="auto", **options):
    return find_high_norm_tokens(model, texts, threshold, progress=False, **options)


def test_the_planted_defect_is_found(planted_defect, backend):
    found = find(tiny.wrap(planted_defect.hf_model, backend), planted_defect.texts)
    assert found.explosion_layers == (planted.EXPLOSION,)
    assert found.decay_layers == (planted.DECAY,)
    assert acute_angles(found.direction[None], planted_defect.direction).item() < 1
    assert set(found.table.token) == {str(planted.TOKEN)}
    assert set(found.table.layer) <= set(range(planted.EXPLOSION, planted.N_LAYERS))
    at_explosion = found.table[found.table.layer == planted.EXPLOSION]
    assert len(at_explosion) == 40
    assert (at_explosion.position == at_explosion.text % 12).all()
    assert found.initial.n_tokens == 4
    assert found.non_initial.n_tokens == 36
    assert found.pairwise_angle < 20
    assert f"explosion blocks ({planted.EXPLOSION},)" in str(found)


def test_an_ordinary_model_has_none(tiny_model):
    texts = torch.randint(3, tiny.VOCABULARY, (20, 15), generator=torch.Generator().manual_seed(0))
    found = find(tiny_model, texts)
    assert found.direction is None
    assert found.pairwise_angle is None
    assert found.table.empty
    assert list(found.table.columns) == ["text", "position", "token", "layer", "norm"]
    assert found.explosion_layers == found.decay_layers == ()
    assert found.threshold.isinf().all()
    assert str(found) == "HighNormTokens: none found in 300 tokens of 20 texts"


@pytest.mark.parametrize("threshold", ["auto", 40.0])
def test_direction_and_angle_equal_brute_force(threshold):
    defect = planted.llama()
    model = tiny.wrap(defect.hf_model, "auto")
    found = find(model, defect.texts, threshold, batch_tokens=60)
    by_layer = states_above(model, defect.texts, found.threshold.tolist())
    states = torch.cat(list(by_layer.values()))
    assert found.n_states == len(states) == len(found.table)
    mean = states.mean(dim=0)
    torch.testing.assert_close(found.direction, mean / mean.norm(), rtol=1e-4, atol=1e-6)
    for layer, direction in found.layer_directions.items():
        mean = by_layer[layer].mean(dim=0)
        torch.testing.assert_close(direction, mean / mean.norm(), rtol=1e-4, atol=1e-6)
    units = states / states.norm(dim=1, keepdim=True)
    cosines = [float(a @ b) for a, b in itertools.combinations(units[::3], 2)]
    everything = (units.sum(dim=0).square().sum() - len(units)) / (len(units) * (len(units) - 1))
    assert found.pairwise_angle == pytest.approx(math.degrees(math.acos(everything)), abs=0.05)
    assert found.pairwise_angle == pytest.approx(math.degrees(math.acos(sum(cosines) / len(cosines))), abs=2)


def test_results_do_not_depend_on_the_batches():
    defect = planted.llama()
    model = tiny.wrap(defect.hf_model, "auto")
    small, large = (find(model, defect.texts, batch_tokens=n) for n in (12, 4096))
    assert torch.equal(small.threshold, large.threshold)
    assert small.table.drop(columns="norm").equals(large.table.drop(columns="norm"))
    torch.testing.assert_close(small.direction, large.direction)
    assert small.explosion_layers == large.explosion_layers


def test_a_float_threshold_is_taken_as_it_is(tiny_model):
    texts = torch.randint(3, tiny.VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(0))
    found = find(tiny_model, texts, 1e-6)
    assert len(found.table) == found.n_states == 45 * tiny_model.cfg.n_layers
    assert (found.threshold == 1e-6).all()
    assert find(tiny_model, texts, 1e9).table.empty


def test_one_token_prompts_need_a_number(tiny_model):
    prompts = torch.arange(3, 13)[:, None]
    with pytest.raises(InputError, match="every text has a single token.*a number as threshold"):
        find(tiny_model, prompts)
    assert find(tiny_model, prompts, 1e-6).initial.n_tokens == 10


@pytest.mark.parametrize("bad", ["high", -1.0, 0, math.nan, math.inf])
def test_other_thresholds_are_named(tiny_model, bad):
    with pytest.raises(InputError, match="expected 'auto' or a positive number"):
        tiny.unchecked(find_high_norm_tokens)(tiny_model, torch.tensor([3, 4]), bad)


def test_a_full_table_warns_and_the_direction_still_covers_all():
    defect = planted.llama()
    model = tiny.wrap(defect.hf_model, "auto")
    whole = find(model, defect.texts)
    with pytest.warns(UserWarning, match=r"holds \d+ of \d+ high-norm states: more than max_tokens=5 tokens"):
        cut = find(model, defect.texts, max_tokens=5)
    assert len(cut.table) < len(whole.table)
    assert cut.n_states == whole.n_states
    torch.testing.assert_close(cut.direction, whole.direction)


def group(norms, high, ordinary_growth=None):
    """The group of tokens with these norms (`[token][point]`), high where the norm exceeds `high`."""
    t = torch.tensor(norms, dtype=torch.float64).T
    growth = torch.ones(len(t) - 1, dtype=torch.float64) if ordinary_growth is None else ordinary_growth
    return token_group(t, t > high, growth)


def test_explosion_is_doubling_beyond_ordinary_growth_into_high_norm():
    assert group([[1, 1.9, 100, 150]], 50).explosion_layers == (1,)
    assert group([[1, 40, 60, 60]], 50).explosion_layers == ()  # high, but it did not double
    assert group([[1, 40, 49, 49]], 50).explosion_layers == ()  # never high
    ordinary = torch.tensor([30.0, 1.0, 1.0], dtype=torch.float64)
    assert group([[2, 60, 120, 120]], 50, ordinary).explosion_layers == (1,)  # in block 0 all norms grow thirtyfold


def test_decay_is_losing_a_third_of_a_high_norm():
    assert group([[1, 90, 61, 40, 1]], 50).decay_layers == (2,)  # 0.68 is no decay, and 40 was not high
    assert group([[1, 90, 60, 60, 60]], 50).decay_layers == (1,)


def test_a_layer_needs_half_of_the_tokens():
    one, other = [1, 100, 100, 10], [1, 1, 100, 100]
    assert group([one, other], 50).explosion_layers == (0, 1)
    assert group([one, other, other], 50).explosion_layers == (1,)
    assert group([one, other, other], 50).decay_layers == ()


def test_group_curves_are_of_the_stream_after_each_block():
    found = group([[1, 100, 7], [3, 300, 5], [2, 200, 9]], 50)
    assert found.maximum.tolist() == [300, 9]
    assert found.median.tolist() == [200, 7]
    torch.testing.assert_close(found.growth, torch.tensor([100, 9 / 200], dtype=torch.float64))


@pytest.mark.parametrize("cut", CUTS[:: len(CUTS) // 97].tolist() + CUTS[360:400].tolist())
def test_sums_above_a_cut_hold_every_state_above_it(cut):
    norms = torch.tensor([0.5, 0.97, 1.03, 2.0], dtype=torch.float64) * cut
    sums = DirectionSums(CUTS)
    sums.add(0, norms[:, None], norms)
    count, total = sums.above(0, cut)
    assert count == 2
    torch.testing.assert_close(total[0, 0], norms[2:].sum())
