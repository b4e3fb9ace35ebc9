from dataclasses import replace

import pytest
import torch

from sd_lens import RouterWeighted, capture_router_weights, defect_eigenvalues, singular_defects, singular_spectra
from sd_lens.errors import InputError, NumericalError
from sd_lens.linear.approximations import attention_map, block_parts, ffn_map
from sd_lens.models.blocks import block_view, block_weights
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::sd_lens.errors.SmallGapWarning")
TEXTS = torch.randint(3, tiny.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
LAYER = 1


@pytest.fixture(params=tiny.BOOTING_MIXTURES, ids=lambda p: f"{p[0]}-{p[1]}")
def model(request):
    name, backend = request.param
    return tiny.wrap(tiny.MIXTURES[name](), backend)


def as_one_mlp(block, weights):
    """The dense block that a mixture with fixed weights is: all neurons beside each other."""
    return replace(
        block.experts[0],
        W_in=torch.cat([expert.W_in for expert in block.experts], dim=1),
        W_gate=torch.cat([expert.W_gate for expert in block.experts], dim=1),
        W_out=torch.cat([float(w) * expert.W_out for w, expert in zip(weights, block.experts, strict=True)]),
    )


def test_the_mean_is_the_closed_form_of_all_neurons_in_one_mlp(model):
    weights = capture_router_weights(model, TEXTS, [LAYER], progress=False)
    block = block_view(model, LAYER)
    A, F = weights.maps(block)
    dense = as_one_mlp(block, weights.weights[0])
    torch.testing.assert_close(F.dense(), ffn_map(dense).dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A.dense(), attention_map(dense).dense())
    x, y = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    assert float(y @ (F @ x)) == pytest.approx(float((F.T @ y) @ x), rel=1e-4, abs=1e-4)


def test_what_takes_a_linearization_is_the_dense_algebra_of_its_map(model):
    """Singular triples, values and eigenpairs alike; dense blocks have their Gaussian map."""
    weights = capture_router_weights(model, TEXTS, progress=False)
    eye = torch.eye(32, dtype=torch.float64)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    found = singular_defects(model, linearization=weights, tol=1e-6, progress=False)
    spectra = singular_spectra(model, linearization=weights, k=4, progress=False)
    eigenvalues = defect_eigenvalues(model, direction, linearization=weights, progress=False)
    assert {found.linearization, spectra.linearization, eigenvalues.linearization} == {"router-weighted"}
    for layer in (0, 1):
        if layer in weights.layers:
            block = block_view(model, layer)
            dense = as_one_mlp(block, weights.weights[weights.layers.index(layer)])
        else:
            dense = block_weights(model, layer)
        L = (eye + ffn_map(dense).dense().double()) @ (eye + attention_map(dense).dense().double())
        U, s, _ = torch.linalg.svd(L)
        assert float(found.block.values[layer]) == pytest.approx(float(s[0]), rel=1e-4)
        assert abs(float(found.block.left[layer].double() @ U[:, 0])) == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(spectra.values[layer], s[:4], rtol=1e-3, atol=1e-5)
        u = direction.double() / direction.double().norm()
        assert float(eigenvalues.rayleigh[layer]) == pytest.approx(float(u @ (L @ u)) - 1, rel=1e-3, abs=1e-4)


def test_all_weight_on_one_expert_is_that_expert(backend):
    block = block_view(tiny.wrap(tiny.mixtral(), backend), LAYER)
    for e, expert in enumerate(block.experts):
        alone = RouterWeighted((LAYER,), torch.eye(4, dtype=torch.float64)[[e]])
        for M, expected in zip(alone.maps(block), block_parts(expert), strict=True):
            torch.testing.assert_close(M.dense(), expected.dense())


def test_no_weight_at_all_is_no_mlp(backend):
    block = block_view(tiny.wrap(tiny.mixtral(), backend), LAYER)
    _, F = RouterWeighted((LAYER,), torch.zeros(1, 4, dtype=torch.float64)).maps(block)
    assert torch.equal(F.dense(), torch.zeros(32, 32))


def test_other_blocks_and_other_models_are_errors(backend):
    model = tiny.wrap(tiny.mixtral(), backend)
    weights = RouterWeighted((1,), torch.ones(1, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="no router weights for block 0, only for 1"):
        singular_defects(model, linearization=weights, progress=False)
    with pytest.raises(InputError, match="block 1 has 4 experts, not 3: capture this model"):
        RouterWeighted((1,), torch.ones(1, 3, dtype=torch.float64)).maps(block_view(model, 1))


def test_weights_that_are_not_finite_are_an_error():
    model = tiny.wrap(tiny.mixtral(), "bridge")
    with pytest.raises(NumericalError, match="not finite"):
        singular_defects(
            model, [1], RouterWeighted((1,), torch.full((1, 4), torch.nan, dtype=torch.float64)), progress=False
        )


def test_says_what_it_is():
    weights = RouterWeighted((1, 3), torch.tensor([[0.1, 0.2], [0.9, 0.3]], dtype=torch.float64), 12)
    assert str(weights) == (
        "RouterWeighted: 2 blocks of 2 experts over 12 tokens; largest weight 0.9 of expert 0 in block 3"
    )
    assert weights.to_dataframe().to_dict("list") == {
        "layer": [1, 1, 3, 3], "expert": [0, 1, 0, 1], "weight": [0.1, 0.2, 0.9, 0.3]
    }  # fmt: skip
