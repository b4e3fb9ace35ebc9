import math

import pytest
import torch

from sd_lens import activation_outliers
from sd_lens.errors import NotSupportedError, NumericalError
from tests import planted, tiny


def by_hand(hf_model, names, texts):
    """Inputs of some modules, text by text."""
    seen = {name: [] for name in names}
    handles = [
        hf_model.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0][0].abs()))
        for name in names
    ]
    with torch.no_grad():
        for text in texts:
            hf_model(text[None])
    for handle in handles:
        handle.remove()
    return seen


def test_figures_are_those_of_all_inputs_sorted(planted_defect, backend):
    texts = [text[: 3 + i % 10] for i, text in enumerate(planted_defect.texts)]
    is_llama = hasattr(planted_defect.hf_model, "model")
    names = [
        f"model.layers.{layer}.mlp.down_proj" if is_llama else f"transformer.h.{layer}.mlp.c_proj"
        for layer in range(planted.N_LAYERS)
    ]
    inputs = by_hand(planted_defect.hf_model, names, texts)
    model = tiny.wrap(planted_defect.hf_model, backend)
    found = activation_outliers(model, texts, batch_tokens=40, progress=False)
    assert found.n_tokens == sum(map(len, texts))
    for row, name in zip(found.table.itertuples(), names, strict=True):
        every = torch.cat([part.flatten() for part in inputs[name]])
        assert row.absmax == pytest.approx(float(every.max()), rel=1e-4)
        assert row.median == pytest.approx(float(every.median()), rel=5e-3)
        assert row.ratio == pytest.approx(row.absmax / row.median)
        assert float(inputs[name][row.text][row.position, row.neuron]) == pytest.approx(row.absmax, rel=1e-4)
        assert row.token == str(int(texts[row.text][row.position]))


def test_the_planted_neuron_stands_out_at_the_planted_token(planted_defect):
    found = activation_outliers(tiny.wrap(planted_defect.hf_model, "auto"), planted_defect.texts, progress=False)
    table = found.to_dataframe()
    worst = table.sort_values("ratio").iloc[-2:]
    assert set(worst.layer) == {planted.EXPLOSION, planted.DECAY}
    assert set(worst.token) == {str(planted.TOKEN)}
    assert set(worst.neuron) == {3, 5}
    assert "times the median in block" in str(found)
    table["ratio"] = 0
    assert found.table.ratio.min() > 0


def test_silent_neurons_have_no_ratio():
    """More than half are zero behind a relu whose bias is below everything."""
    hf_model = tiny.opt()
    with torch.no_grad():
        hf_model.model.decoder.layers[1].fc1.bias -= 3
    found = activation_outliers(tiny.wrap(hf_model, "auto"), torch.tensor([[3, 4, 5]]), progress=False)
    assert found.table["median"][1] == 0
    assert found.table.ratio[1] == math.inf


def test_what_is_not_finite_or_has_no_neurons_is_an_error(tiny_llama, backend):
    with torch.no_grad():
        tiny_llama.blocks[1].mlp.W_in[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"not finite at blocks\.1\.mlp\.hook_post"):
        activation_outliers(tiny_llama, torch.tensor([[3, 4, 5]]), progress=False)
    with pytest.raises(NotSupportedError, match="mixture of experts"):
        activation_outliers(tiny.wrap(tiny.mixtral(), backend), torch.tensor([[3, 4, 5]]), progress=False)
