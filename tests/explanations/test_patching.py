import pytest
import torch
from transformer_lens import patching

from sd_lens import patch
from sd_lens.errors import InputError, NumericalError
from sd_lens.models.hooks import hooked
from tests import tiny

CLEAN = torch.tensor([3, 14, 15, 9, 26, 5])
CORRUPTED = torch.tensor([3, 40, 15, 22, 26, 5])


def library(model, site, metric, watch=None):
    """TransformerLens's own patching, one place at a time."""
    function = {
        "resid_pre": patching.get_act_patch_resid_pre, "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out, "z": patching.get_act_patch_attn_head_out_by_pos,
    }[site]  # fmt: skip
    with torch.no_grad(), hooked(model, watch or {}):
        clean = model.run_with_cache(CLEAN[None])[1]
        return function(model, CORRUPTED[None], clean, metric)


def difference(logits):
    return logits[0, -1, 7] - logits[0, -1, 9]


def test_values_are_those_of_transformer_lens(tiny_model):
    sites = ("resid_pre", "attn_out", "mlp_out", "z")
    found = patch(tiny_model, CLEAN, CORRUPTED, difference, sites, progress=False)
    for site in sites:
        expected = library(tiny_model, site, difference)  # heads: [layer, pos, head]
        values = torch.tensor(found.table[found.table.site == site].value.to_numpy()).reshape(expected.shape)
        torch.testing.assert_close(values.float(), expected, rtol=1e-3, atol=1e-5)
    assert found.table.restored.abs().max() > 0.5


def test_the_norm_inside_the_model_is_a_metric_too(tiny_model):
    stream = {}
    watch = {"blocks.1.hook_resid_post": lambda x: stream.__setitem__("now", x)}
    expected = library(tiny_model, "mlp_out", lambda logits: stream["now"][0, 4].norm(), watch)
    for batch_tokens in (1, 1000):
        found = patch(
            tiny_model, CLEAN, CORRUPTED, "norm", ["mlp_out"], layer=1, position=4, batch_tokens=batch_tokens,
            progress=False,
        )  # fmt: skip
        values = torch.tensor(found.table.value.to_numpy()).reshape(2, 5)  # blocks and positions that can reach it
        torch.testing.assert_close(values.float(), expected[:2, :5], rtol=1e-4, atol=1e-5)
    assert found.metric == "norm at position 4 after block 1"
    assert found.clean_value != pytest.approx(found.corrupted_value)


def test_the_whole_clean_stream_restores_everything(tiny_model):
    """At block 0 the texts differ at positions 1 and 3 only; the last position hears of it through attention."""
    u = torch.randn(32, generator=torch.Generator().manual_seed(2))
    found = patch(
        tiny_model, CLEAN, CORRUPTED, "projection", ["resid_pre"], layer=2, position=3, direction=u, progress=False
    )
    table = found.table.set_index(["layer", "position"])
    assert table.restored[2, 3] == pytest.approx(1, abs=0.5)  # what is read from other positions is still corrupted
    assert table.restored[0, 0] == table.restored[0, 2] == pytest.approx(0, abs=1e-5)
    same = patch(tiny_model, CLEAN, torch.cat([CLEAN[:3], CORRUPTED[3:]]), "norm", ["resid_pre"], position=3,
                 layer=2, progress=False).table.set_index(["layer", "position"])  # fmt: skip
    assert same.restored[0, 3] == pytest.approx(1, rel=1e-4)  # the only difference, undone
    assert same.restored[2, 3] == pytest.approx(1, rel=1e-4)


def test_attribution_patching_is_exact_where_the_metric_is_linear(tiny_model):
    """The last MLP's output enters the projection linearly; anything earlier does not."""
    u = torch.randn(32, generator=torch.Generator().manual_seed(3))
    found = patch(
        tiny_model, CLEAN, CORRUPTED, "projection", ["resid_pre", "mlp_out", "z"], layer=2, position=5, direction=u,
        progress=False,
    )  # fmt: skip
    table = found.table.set_index(["site", "layer"])
    last = table.loc[("mlp_out", 2)]
    assert last.estimate.tolist() == pytest.approx(last.restored.tolist(), rel=1e-3, abs=1e-4)
    assert last.estimate.abs().max() > 1e-3
    assert found.approximation.set_index("site").largest_error["resid_pre"] > 1e-2


def test_estimates_are_the_gradients_first_order(tiny_model):
    """Against finite differences: a thousandth of the way from the corrupted activation to the clean one."""
    found = patch(tiny_model, CLEAN, CORRUPTED, difference, ["resid_pre", "attn_out", "z"], progress=False)
    model = tiny_model.to(torch.float64)
    change = found.clean_value - found.corrupted_value
    with torch.no_grad():
        clean = model.run_with_cache(CLEAN[None])[1]
        for site, layer, position, head in (("resid_pre", 1, 3, None), ("attn_out", 0, 3, None), ("z", 1, 5, 2)):
            here = (0, position) if head is None else (0, position, head)
            point = f"blocks.{layer}.{'attn.' if site == 'z' else ''}hook_{site}"
            values = []
            for step in (-1e-3, 1e-3):

                def towards(x, hook, here=here, point=point, step=step):
                    x = x.clone()
                    x[here] += step * (clean[point][here] - x[here])
                    return x

                values.append(difference(model.run_with_hooks(CORRUPTED[None], fwd_hooks=[(point, towards)])))
            slope = float(values[1] - values[0]) / 2e-3 / change
            rows = found.table[(found.table.site == site) & (found.table.layer == layer)]
            row = rows[(rows.position == position) & (True if head is None else rows["head"] == head)]
            assert row.estimate.item() == pytest.approx(slope, rel=1e-2, abs=1e-4), site


def test_the_error_of_the_approximation_is_shown(tiny_llama):
    found = patch(tiny_llama, CLEAN, CORRUPTED, difference, progress=False)
    shown = found.approximation
    assert shown.site.tolist() == ["resid_pre", "attn_out", "mlp_out"]
    rows = found.table[found.table.site == "mlp_out"]
    assert shown.largest_error[2] == pytest.approx((rows.estimate - rows.restored).abs().max())
    assert shown.median_error[2] <= shown.largest_error[2]
    worst = 100 * shown.largest_error.max()
    assert f"attribution patching is off by up to {worst:,.0f} % of the difference" in str(found)


def test_the_default_block_is_that_of_the_largest_clean_norm(tiny_llama):
    assert "after block 2" in patch(tiny_llama, CLEAN, CORRUPTED, progress=False).metric


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupted": CORRUPTED[:5]}, "the clean text has 6 tokens and the corrupted one 5: they must match"),
        ({"sites": ["resid_mid"]}, "unknown site 'resid_mid'"),
        ({"sites": []}, "unknown site"),
        ({"position": 6}, "position 6 does not exist"),
        ({"layer": 3}, "block 3 does not exist"),
        ({"metric": "loss"}, "unknown metric 'loss'"),
        ({"metric": "projection"}, "metric='projection' needs a direction, and only that"),
        ({"direction": torch.ones(32)}, "metric='projection' needs a direction, and only that"),
        ({"metric": difference, "layer": 1}, "a metric of the logits has neither layer nor direction"),
        ({"metric": difference, "direction": torch.ones(32)}, "has neither layer nor direction"),
        ({"corrupted": CLEAN}, "for both texts: there is nothing to restore"),
        ({"position": 0}, "for both texts: there is nothing to restore"),
        ({"metric": lambda logits: logits[0, -1]}, "must return a tensor with one number"),
        ({"metric": lambda logits: logits.detach()[0, -1, 0]}, "is not differentiable"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, changes, message):
    arguments = {"clean": CLEAN, "corrupted": CORRUPTED, "progress": False} | changes
    with pytest.raises(InputError, match=message):
        tiny.unchecked(patch)(tiny_llama, **arguments)


def test_a_metric_that_is_not_finite_is_an_error(tiny_llama):
    with pytest.raises(NumericalError, match="is not finite"):
        patch(tiny_llama, CLEAN, CORRUPTED, lambda logits: logits.sum() / 0, progress=False)


def test_a_patch_that_breaks_the_metric_is_an_error(tiny_llama):
    """Finite for both texts, not in between."""
    low, high = sorted(float(difference(tiny_llama(text[None]).detach())) for text in (CLEAN, CORRUPTED))

    def metric(logits):
        value = difference(logits)
        return torch.where((value - low).abs().minimum((value - high).abs()) < 1e-6, value, value / 0)

    with pytest.raises(NumericalError, match="is not finite with some of the patches"):
        patch(tiny_llama, CLEAN, CORRUPTED, metric, progress=False)


def test_sites_count_once_and_the_best_place_is_named(tiny_llama):
    found = patch(tiny_llama, CLEAN, CORRUPTED, difference, ["mlp_out", "mlp_out"], progress=False)
    assert len(found.table) == 3 * 6
    best = found.table.iloc[int(found.table.restored.argmax())]
    assert f"mlp_out of block {best.layer} at position {best.position} restores {100 * best.restored:.1f} %" in str(
        found
    )


def test_the_default_block_is_the_clean_texts_at_the_position(planted_defect):
    """The planted token explodes; the block is its, not the last token's nor the corrupted text's."""
    from tests import planted

    model = tiny.wrap(planted_defect.hf_model, "auto")
    clean = planted_defect.texts[5]
    corrupted = clean.clone()
    corrupted[5] = 20
    found = patch(model, clean, corrupted, sites=["mlp_out"], position=5, progress=False)
    cache = model.run_with_cache(clean[None])[1]
    norms = [float(cache[f"blocks.{i}.hook_resid_post"][0, 5].norm()) for i in range(planted.N_LAYERS)]
    assert f"after block {norms.index(max(norms))}" in found.metric
    assert found.table.restored[found.table.layer == planted.EXPLOSION].max() > 0.9
