import html
from dataclasses import replace

import pytest
import torch

import sd_lens.report.writing as writing
from sd_lens import explosion_in_context, explosion_path, explosion_subspace, find_high_norm_tokens
from sd_lens.figures.style import shown_number
from sd_lens.report.explosions import Explosion, explosion_figures, explosion_sentences
from tests import planted, tiny


@pytest.fixture(scope="module")
def model():
    return tiny.wrap(planted.llama().hf_model, "auto", with_tokenizer=True)


@pytest.fixture(scope="module")
def explosion(model):
    path = explosion_path(model, planted.EXPLOSION, progress=False)
    context = explosion_in_context(model, path, planted.llama().texts, n_tokens=1, progress=False)
    return Explosion(
        planted.EXPLOSION, explosion_subspace(model, planted.EXPLOSION, progress=False), path, context
    )  # fmt: skip


def test_sentences_carry_the_results_numbers(explosion):
    paths, texts, subspace = explosion_sentences([explosion])
    cut = shown_number(explosion.path.threshold)
    assert paths.startswith(
        f"As the only token of a text, 1.67 % of 60 tokens of the vocabulary have a norm above {cut}"
    )
    assert paths.endswith("without attention 1 of the tokens, first 'w4'.")
    assert "the 1 tokens with the largest norms without attention explode in 100 % of 8 contexts" in texts
    assert texts.endswith("others in 0 %.")
    assert f"writes {shown_number(float(explosion.subspace.outputs[0]))} for its leading" in subspace
    assert len(explosion_figures([explosion])) == 6


def test_where_no_lone_token_explodes_the_page_says_so(explosion, model, monkeypatch):
    lonely = Explosion(2, explosion.subspace, None, None, "no gap < here")
    paths, _ = explosion_sentences([lonely])
    assert paths == html.escape("Lone tokens do not show the explosion of block 2: no gap < here.")
    assert len(explosion_figures([lonely])) == 4
    assert explosion_figures([]) == explosion_sentences([]) == []
    found = find_high_norm_tokens(model, planted.llama().texts, progress=False)

    def refuse(*_, **__):
        return explosion_path(tiny.wrap(tiny.llama(), "bridge"), 1, progress=False)

    monkeypatch.setattr(writing, "explosion_path", refuse)
    (made,) = writing._explosions(model, found, [torch.tensor([3, 4])], False)
    assert made.path is None
    assert made.missing.startswith("no norm explodes after block 1")


def test_tokens_are_escaped(explosion):
    table = explosion.path.table.assign(token="<b>")
    hostile = replace(explosion, path=replace(explosion.path, table=table))
    assert "'&lt;b&gt;'" in explosion_sentences([hostile])[0]
