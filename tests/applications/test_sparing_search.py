import pytest
import torch

from sd_lens import QuantizationScheme, search_spared_layers
from sd_lens.errors import InputError, NumericalError
from tests import planted, tiny
from tests.oracles.quantized import linear_modules, quantized

TEXTS = [torch.tensor([3, 14, 15, 9, 26, 5]), torch.tensor([9, 8, 7, 7])]


def divergence(expected, logits):
    """Nats per token, in a plain loop."""
    total, n = 0.0, 0
    for p, q in zip(expected, logits, strict=True):
        for a, b in zip(torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1), strict=True):
            total, n = total + float((a.exp() * (a - b)).sum()), n + 1
    return total / n


def logits_of(hf_model):
    with torch.no_grad():
        return [hf_model(text[None]).logits[0] for text in TEXTS]


def by_hand(hf_model, scheme, steps):
    """Every W_out alone; and the greedy search, written on transformers' modules."""
    full, names = logits_of(hf_model), list(linear_modules(hf_model))
    down = [name for name in names if name.endswith("down_proj")]

    def with_skipped(skip):
        with quantized(hf_model, scheme, skip=skip):
            return divergence(full, logits_of(hf_model))

    alone = [with_skipped([other for other in names if other != name]) for name in down]
    spared, path = [], [with_skipped([])]
    for _ in range(steps):
        tried = {layer: with_skipped([down[i] for i in (*spared, layer)]) for layer in range(3) if layer not in spared}
        spared.append(min(tried, key=tried.get))
        path.append(tried[spared[-1]])
    return alone, spared, path


@pytest.mark.parametrize("scheme", [QuantizationScheme(), QuantizationScheme(5, 5, "channel", "token")], ids=str)
def test_divergences_and_steps_are_those_found_by_hand(backend, scheme):
    hf_model = tiny.llama()
    alone, spared, path = by_hand(hf_model, scheme, 3)
    found = search_spared_layers(tiny.wrap(tiny.llama(), backend), TEXTS, scheme, steps=3, progress=False)
    assert found.n_tokens == 10
    assert found.table.alone.tolist() == pytest.approx(alone, rel=0.05)
    assert found.steps.divergence.tolist() == pytest.approx(path, rel=0.05)
    assert found.added == tuple(spared)
    assert found.steps.n_spared.tolist() == [0, 1, 2, 3]
    assert found.measured_order == tuple(sorted(range(3), key=lambda layer: -alone[layer]))


@pytest.fixture(scope="module")
def planted_search():
    hf_model, texts = planted.llama_with_outliers()
    return search_spared_layers(tiny.wrap(hf_model, "auto"), texts, steps=2, progress=False)


def test_planted_blocks_suffer_most_as_forecast_and_are_spared_first(planted_search):
    both = planted.OUTLIERS
    assert planted_search.measured_order[:2] == planted_search.forecast_order[:2] == planted_search.added == both
    assert planted_search.agreement(2) == 1
    for n in (0, -1, 7):
        with pytest.raises(InputError, match=f"n={n}: expected 1 to 6, the model's blocks"):
            planted_search.agreement(n)
    assert planted_search.steps.divergence.is_monotonic_decreasing
    # What is left is the rounding of everything else.
    assert planted_search.steps.divergence.iloc[-1] < 0.1 * planted_search.steps.divergence.iloc[0]
    assert "rounding hurts most in blocks" in str(planted_search)


def test_ranks_are_of_what_stands_beside_them(planted_search):
    table = planted_search.to_dataframe()
    for column in ("forecast", "alone"):
        ranked = table.sort_values(f"{column}_rank")
        assert ranked[f"{column}_rank"].tolist() == list(range(1, planted.N_LAYERS + 1))
        assert ranked[column].is_monotonic_decreasing
    differences = (table.forecast_rank - table.alone_rank) ** 2
    n = len(table)
    assert planted_search.rank_correlation == pytest.approx(1 - 6 * differences.sum() / (n * (n**2 - 1)))


def test_the_model_is_the_same_afterwards_and_each_alone_needs_no_steps(tiny_llama):
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    found = search_spared_layers(tiny_llama, TEXTS, steps=0, progress=False)
    assert found.added == ()
    assert len(found.steps) == 0
    assert all(torch.equal(p, before[name]) for name, p in tiny_llama.named_parameters())
    cut = search_spared_layers(tiny_llama, TEXTS, steps=0, max_length=3, progress=False)
    assert cut.n_tokens == 6
    assert cut.table.alone.tolist() != found.table.alone.tolist()


def test_bad_arguments_are_named(tiny_llama):
    with pytest.raises(InputError, match="steps=4: expected 0 to 3, the model's blocks"):
        search_spared_layers(tiny_llama, TEXTS, steps=4)
    with pytest.raises(InputError, match="the scheme rounds no activations"):
        search_spared_layers(tiny_llama, TEXTS, QuantizationScheme(8, None), steps=0)
    with pytest.raises(InputError, match="there are no texts"):
        search_spared_layers(tiny_llama, [], steps=0, progress=False)


def test_what_is_not_finite_is_named(tiny_llama):
    with torch.no_grad():
        tiny_llama.unembed.b_U[0] = torch.nan
    with pytest.raises(NumericalError, match="the divergence of text 0 is nan"):
        search_spared_layers(tiny_llama, TEXTS, steps=0, progress=False)
