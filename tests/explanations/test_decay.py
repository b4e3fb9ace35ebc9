import pytest
import torch

from sd_lens import defect_eigenvalues
from sd_lens.errors import InputError
from sd_lens.linear.approximations import attention_map, block_map, ffn_map
from sd_lens.models.blocks import block_weights
from tests import planted, tiny


def test_eigenvalues_are_those_of_the_dense_residual_step(tiny_model):
    u = torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = defect_eigenvalues(tiny_model, u, progress=False)
    for layer in range(3):
        block = block_weights(tiny_model, layer)
        R = block_map(attention_map(block), ffn_map(block)).dense().double() - torch.eye(32, dtype=torch.float64)
        values = torch.linalg.eigvals(R)
        assert (values - found.eigenvalue[layer]).abs().min() < 1e-5 * max(1, float(values.abs().max()))
        expected = float(u.double() @ R @ u.double() / u.double().square().sum())
        assert float(found.rayleigh[layer]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert 0 <= float(found.angle[layer]) <= 90


@pytest.mark.parametrize(("bias", "sign"), [(0.0, -1), (-4.0, 1)])
def test_a_planted_decay_is_near_and_its_sign_is_the_fits(backend, bias, sign):
    """The neuron writes against the direction that it reads. Where gelu's mean slope is negative, the fit is wrong."""
    defect = planted.gpt2()
    with torch.no_grad():
        defect.hf_model.transformer.h[planted.DECAY].mlp.c_fc.bias[5] = bias
    found = defect_eigenvalues(tiny.wrap(defect.hf_model, backend), defect.direction, progress=False)
    assert float(found.angle[planted.DECAY]) < 2
    assert sign * float(found.eigenvalue[planted.DECAY].real) > 1
    assert float(found.rayleigh[planted.DECAY]) == pytest.approx(float(found.eigenvalue[planted.DECAY].real), rel=0.05)
    assert int(found.angle.argmin()) == planted.DECAY
    assert f"nearest eigenvector in block {planted.DECAY}" in str(found)


def test_layers_and_table(tiny_llama):
    found = defect_eigenvalues(tiny_llama, torch.ones(32), [2, 0], progress=False)
    table = found.to_dataframe()
    assert table.layer.tolist() == [2, 0]
    assert table.eigenvalue.tolist() == found.eigenvalue.real.tolist()
    whole = defect_eigenvalues(tiny_llama, torch.ones(32), progress=False)
    assert table.rayleigh.tolist() == pytest.approx([float(whole.rayleigh[2]), float(whole.rayleigh[0])])


def test_bad_arguments_are_named(tiny_llama):
    with pytest.raises(InputError, match="layers is empty"):
        defect_eigenvalues(tiny_llama, torch.ones(32), [], progress=False)
    with pytest.raises(InputError, match="expected a square map and a direction of its width"):
        defect_eigenvalues(tiny_llama, torch.zeros(32), progress=False)
    with pytest.raises(InputError, match="unknown part 'imaginary'"):
        tiny.unchecked(defect_eigenvalues)(tiny_llama, torch.ones(32), part="imaginary", progress=False)
