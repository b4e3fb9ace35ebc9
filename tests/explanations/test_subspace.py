"""The explosion subspace: planted, and against the running model."""

import pytest
import torch

from sd_lens import explosion_subspace
from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import neuron_map
from sd_lens.linear.lone_token import mlp_output
from sd_lens.models.blocks import block_weights
from tests import planted, tiny
from tests.explanations.test_explosion import attention_carries

LAYER = 1


def coefficients_of_runs(model, layer, v1, front=None):
    """A slow twin: the norm's own output in front of the MLP, token by token."""
    block = block_weights(model, layer)
    found = []
    for token in range(tiny.VOCABULARY):
        row = [token] if front is None else [front[token], token]
        _, cache = model.run_with_cache(torch.tensor([row]))
        read = cache[f"blocks.{layer}.ln2.hook_normalized"][0, -1].double()
        read = read if block.mlp_norm.gain is None else read * block.mlp_norm.gain.double()
        read = read if block.mlp_norm.bias is None else read + block.mlp_norm.bias.double()
        found.append(read @ v1.double())
    return torch.stack(found)


def test_coefficients_are_those_of_the_running_model(tiny_model):
    found = explosion_subspace(tiny_model, LAYER, batch_tokens=7, progress=False)
    expected = coefficients_of_runs(tiny_model, LAYER, found.v1)
    torch.testing.assert_close(torch.tensor(found.table.initial.to_numpy()), expected, rtol=1e-4, atol=1e-5)
    for place in ("initial", "second"):
        parts = [found.table[f"{place}_{part}"] for part in ("token", "attention", "norm")]
        assert sum(parts).to_numpy() == pytest.approx(found.table[place].to_numpy(), abs=1e-9)


def test_the_second_position_is_behind_a_token(tiny_llama):
    """With one token to stand in front, the slow twin knows which."""
    hf_model = tiny.llama()
    with torch.no_grad():
        hf_model.model.embed_tokens.weight[torch.arange(tiny.VOCABULARY) != 5] *= 1e-3  # only token 5 is trained
    model = tiny.wrap(hf_model, "bridge")
    found = explosion_subspace(model, LAYER, progress=False)
    expected = coefficients_of_runs(model, LAYER, found.v1, front=[5] * tiny.VOCABULARY)
    torch.testing.assert_close(torch.tensor(found.table.second.to_numpy()), expected, rtol=1e-4, atol=1e-5)
    assert found.table.untrained.sum() == tiny.VOCABULARY - 1


def test_outputs_are_what_the_mlp_writes_for_the_singular_vectors(tiny_model):
    block = block_weights(tiny_model, LAYER)
    found = explosion_subspace(tiny_model, LAYER, progress=False)
    _, s, Vh = torch.linalg.svd(neuron_map(block).dense().double())
    torch.testing.assert_close(found.values, s, rtol=1e-4, atol=1e-5)
    assert abs(float(found.v1.double() @ Vh[0])) == pytest.approx(1, abs=1e-4)
    written = [mlp_output(block, sign * found.scale * found.v1[None]).norm() for sign in (1, -1)]
    assert float(found.outputs[0]) == pytest.approx(float(written[0]), rel=1e-3)
    assert float(found.opposite[0]) == pytest.approx(float(written[1]), rel=1e-3)
    assert bool((found.outputs >= found.opposite).all())


def test_whole_inputs_give_what_the_running_model_writes(tiny_model):
    found = explosion_subspace(tiny_model, LAYER, progress=False)
    norms = []
    for token in range(tiny.VOCABULARY):
        _, cache = tiny_model.run_with_cache(torch.tensor([[token]]))
        norms.append(cache[f"blocks.{LAYER}.hook_mlp_out"][0, 0].double().norm())
    assert found.n_dimensions[-1] == 32
    assert float(found.kept[-1]) == pytest.approx(float(torch.stack(norms).quantile(0.5)), rel=1e-4)


def test_a_planted_input_direction_is_found_with_its_sign_and_what_carries_tokens_there(backend):
    model = tiny.wrap(attention_carries(), backend)
    found = explosion_subspace(model, 2, progress=False)
    assert float(found.v1[0]) > 0.99  # channel 0, and its positive side
    assert float(found.outputs[0]) > 10 * float(found.outputs[1])
    assert float(found.outputs[0]) > 10 * float(found.opposite[0])
    assert (found.n_sufficient, found.n_necessary) == (1, 1)
    assert found.sources.coefficient["initial"] > 1
    # Block 1's attention wrote it: it is in the stream in front of block 2, not in what block 2's attention writes.
    assert found.sources.token["initial"] > 0.9 * found.sources.coefficient["initial"]


def test_the_explosion_of_one_token_is_its_coefficient(backend):
    model = tiny.wrap(planted.llama().hf_model, backend)
    table = explosion_subspace(model, planted.EXPLOSION, progress=False).table.set_index("token_id")
    assert table.initial.idxmax() == table.second.idxmax() == planted.TOKEN


def test_what_cannot_be_done_is_said(tiny_llama):
    with pytest.raises(InputError, match="block -1 does not exist"):
        explosion_subspace(tiny_llama, -1)
    with pytest.raises(InputError, match="batch_tokens=0: expected at least 1"):
        explosion_subspace(tiny_llama, 0, batch_tokens=0)
    hf_model = tiny.llama()
    with torch.no_grad():
        hf_model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="block 1 is not finite"):
        explosion_subspace(tiny.wrap(hf_model, "bridge"), LAYER, progress=False)
