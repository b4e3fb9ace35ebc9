import pytest
import torch

from sd_lens import singular_defects, singular_spectra
from sd_lens.errors import InputError
from sd_lens.linear.approximations import attention_map, block_map, ffn_map
from sd_lens.models.blocks import block_weights
from tests import planted, tiny


@pytest.mark.parametrize("k", [2, 8, 32])
def test_values_are_those_of_the_dense_maps(tiny_model, k):
    found = singular_spectra(tiny_model, k=k, progress=False)
    assert found.values.dtype == torch.float64
    for layer in range(3):
        block = block_weights(tiny_model, layer)
        L = block_map(attention_map(block), ffn_map(block)).dense().double()
        scale = float(torch.linalg.matrix_norm(L, 2))
        expected = torch.linalg.svdvals(L)[:k]
        torch.testing.assert_close(found.values[layer], expected, rtol=1e-4, atol=1e-5 * scale)
        assert float(found.gap[layer]) == pytest.approx(float(expected[0] / expected[1]), rel=1e-4)


@pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")
def test_the_first_value_is_that_of_the_defects(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    found, defects = singular_spectra(model, progress=False), singular_defects(model, progress=False)
    torch.testing.assert_close(found.values[:, 0], defects.block.values, rtol=1e-4, atol=0)
    assert found.gap[planted.EXPLOSION] > 2
    assert int(found.values[:, 0].argmax()) == planted.EXPLOSION
    assert str(found).startswith(f"SingularSpectra of {found.model_name}, 6 blocks (gaussian), 8 values each")


def test_layers_and_table(tiny_llama):
    found = singular_spectra(tiny_llama, [2, 0], k=3, progress=False)
    table = found.to_dataframe()
    assert list(table) == ["layer", "s1", "s2", "s3"]
    assert table.layer.tolist() == [2, 0]
    whole = singular_spectra(tiny_llama, k=3, progress=False)
    torch.testing.assert_close(found.values, whole.values[[2, 0]])


def test_bad_arguments_are_named(tiny_llama):
    with pytest.raises(InputError, match="k=33: a 32 x 32 map has 1 to 32 singular triples"):
        singular_spectra(tiny_llama, k=33, progress=False)
    with pytest.raises(InputError, match="k=1: expected 2 or more values"):
        singular_spectra(tiny_llama, k=1, progress=False)
    with pytest.raises(InputError, match="block 9 does not exist"):
        singular_spectra(tiny_llama, [9], progress=False)
