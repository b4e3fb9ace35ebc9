import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from sd_lens import explosion_in_context, explosion_path, explosion_subspace, figures
from tests import planted, tiny


@pytest.fixture(scope="module")
def model():
    return tiny.wrap(planted.llama().hf_model, "auto", with_tokenizer=True)


@pytest.fixture(scope="module")
def path(model):
    return explosion_path(model, planted.EXPLOSION, progress=False)


@pytest.fixture(scope="module")
def subspace(model):
    return explosion_subspace(model, planted.EXPLOSION, progress=False)


def test_the_scatter_has_every_token_of_a_small_vocabulary(path):
    figure = figures.vocabulary_scatter(path)
    explodes, ordinary = figure.data
    assert (len(explodes.x), len(ordinary.x)) == (1, 59)
    assert explodes.y[0] == path.table.initial[0]
    assert explodes.text[0] == "w4"
    assert "drawn" not in figure.layout.title.text
    json.loads(figure.to_json())


def test_a_large_vocabulary_is_thinned_and_the_title_says_so(path):
    n = 10_000
    table = pd.DataFrame(
        {"token": ["<i>"] * n, "initial": 5.0, "non_initial": np.linspace(9, 1, n), "explodes": np.arange(n) < 10}
    )  # fmt: skip
    figure = figures.vocabulary_scatter(replace(path, table=table, untrained=table.head(0)))
    explodes, ordinary = figure.data
    assert (len(explodes.x), len(ordinary.x)) == (10, 2990)
    assert ordinary.x[-1] == 1.0
    assert explodes.text[0] == "&lt;i&gt;"
    assert "(3,000 of 10,000 drawn)" in figure.layout.title.text


def test_contexts_are_drawn_beside_the_path(model, path):
    found = explosion_in_context(model, path, planted.llama().texts, n_tokens=3, progress=False)
    named, others, on_path = figures.context_norms(found).data
    assert list(named.y) + list(others.y) == found.table["median"].tolist()
    assert list(on_path.y) == found.table.non_initial.tolist()
    assert named.y[0] + named.error_y.array[0] == pytest.approx(found.table.highest[0])
    assert named.y[0] - named.error_y.arrayminus[0] == pytest.approx(found.table.lowest[0])


def test_curves_are_those_of_the_result(subspace):
    outputs, opposite = figures.subspace_curve(subspace).data
    assert list(outputs.y) == subspace.outputs.tolist()
    assert list(opposite.y) == subspace.opposite.tolist()
    assert list(outputs.x) == list(range(1, 65))
    kept, removed = figures.subspace_dimensions(subspace).data
    assert list(kept.x) == list(subspace.n_dimensions)
    assert (list(kept.y), list(removed.y)) == (subspace.kept.tolist(), subspace.removed.tolist())


def test_distributions_hold_every_trained_token(subspace):
    for bars, column in zip(figures.coefficient_distributions(subspace).data, ("initial", "second"), strict=True):
        assert sum(bars.y) == pytest.approx(1)
        center = sum(x * y for x, y in zip(bars.x, bars.y, strict=True))
        assert center == pytest.approx(subspace.table[column].mean(), abs=bars.width / 2)


def test_sources_are_the_medians(subspace):
    parts = {bars.name: list(bars.y) for bars in figures.coefficient_sources(subspace).data}
    assert parts["attention's write"] == subspace.sources.attention.tolist()
    assert len(parts) == 3
