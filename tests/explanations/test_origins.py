from dataclasses import replace

import pandas as pd
import pytest

from sd_lens import attribute_corpus, find_high_norm_tokens
from sd_lens.explanations.origins import norm_origins
from sd_lens.figures.style import shown_number
from sd_lens.report.origins import origin_figures, origin_sentences
from tests import planted, tiny


@pytest.fixture(scope="module", params=[planted.llama, planted.gpt2], ids=["llama", "gpt2"])
def planted_origins(request, backend):
    defect = request.param()
    model, texts = tiny.wrap(defect.hf_model, backend), defect.texts
    found = find_high_norm_tokens(model, texts, progress=False)
    return model, found, norm_origins(model, found, list(texts[:26]), progress=False)


def test_the_planted_mlps_and_neurons_make_and_undo_the_norm(planted_origins):
    """The token stands in front of texts 0, 12 and 24, and elsewhere in the others."""
    _, _, origins = planted_origins
    assert [(o.kind, o.event, o.layer) for o in origins] == [
        ("initial", "explosion", planted.EXPLOSION), ("initial", "decay", planted.DECAY),
        ("non-initial", "explosion", planted.EXPLOSION), ("non-initial", "decay", planted.DECAY),
    ]  # fmt: skip
    for origin in origins:
        assert origin.component == f"L{origin.layer}MLP"
        assert origin.attribution.n_tokens == (3 if origin.kind == "initial" else 23)
        explodes = origin.event == "explosion"
        assert origin.neurons.neuron[0] == (3 if explodes else 5)
        assert origin.neurons.share[0] == pytest.approx(origin.share, rel=0.02)
        assert origin.share > 0.9 if explodes else origin.share == pytest.approx(-0.9, abs=0.05)
        assert (origin.ablation is not None) == explodes
    assert origins[0].ablation.components == (f"L{planted.EXPLOSION}N3",)
    norm = origins[0].ablation.after.watched_norm[planted.EXPLOSION]
    assert norm < 0.1 * origins[0].ablation.before.watched_norm[planted.EXPLOSION]


def test_the_share_of_a_decay_is_that_of_the_length_in_front_of_the_block(planted_origins):
    model, found, origins = planted_origins
    decay = origins[1]
    direction = found.layer_directions[planted.DECAY - 1]
    rows = [t for t in planted_texts(found) if t in (0, 12, 24)]
    before = attribute_corpus(
        model, [planted.llama().texts[t] for t in rows], planted.DECAY - 1, 0, direction, progress=False
    )
    taken = decay.attribution.table.set_index("component").contribution[decay.component]
    assert decay.share == pytest.approx(taken / before.total, rel=1e-3)


def planted_texts(found):
    return found.table.text.unique().tolist()


def test_the_sentences_carry_the_numbers(planted_origins):
    _, _, origins = planted_origins
    sentences = origin_sentences(origins)
    text = " ".join(sentences)
    first, ablation = origins[0], origins[0].ablation
    assert f"is written by L2MLP ({100 * first.share:.1f} %), in it by neuron 3 (" in text
    assert f"L4MLP, which takes away {-100 * origins[1].share:.1f} % of their length in front of the block" in text
    perplexities = shown_number(ablation.before.perplexity), shown_number(ablation.after.perplexity)
    assert "the perplexity from {} to {}".format(*perplexities) in text
    assert sum("at these tokens (zero) has 100 % of the effect that its contribution says" in s for s in sentences) == 4
    assert f"rank correlation of {first.attribution.faithfulness.rank_correlation:.2f}" in text
    assert sum("Zeroing that block's neuron 3 alone" in s for s in sentences) == 2


def test_the_figures_are_of_the_largest_explosion(planted_origins):
    _, _, origins = planted_origins
    shown = origin_figures(origins)
    assert len(shown) == 3
    assert "after block 2: means over" in shown[0][0]
    assert origin_figures([o for o in origins if o.event == "decay"]) == []


def test_without_high_norm_tokens_there_is_nothing_to_explain(tiny_llama):
    texts = planted.llama().texts[:4, :8]
    found = find_high_norm_tokens(tiny_llama, texts, progress=False)
    assert norm_origins(tiny_llama, found, list(texts), progress=False) == []


def test_only_tokens_of_the_given_texts_count(planted_origins):
    model, found, _ = planted_origins
    few = norm_origins(model, found, list(planted.llama().texts[:12]), progress=False)
    assert [o.attribution.n_tokens for o in few] == [1, 1, 11, 11]  # text 12 has a high-norm token as well


def test_the_ablation_follows_the_origins_own_tokens(planted_origins):
    _, _, origins = planted_origins
    for origin in (origins[0], origins[2]):
        before = origin.ablation.before
        assert float(before.watched_norm[planted.EXPLOSION]) == pytest.approx(origin.attribution.norm, rel=0.05)
        assert float(before.other_norm[planted.EXPLOSION]) < 0.2 * origin.attribution.norm or origin.kind == "initial"


def test_neurons_are_named_until_most_is_told_and_tokens_are_escaped(planted_origins):
    _, _, origins = planted_origins
    neurons = pd.DataFrame({"neuron": [7, 8, 9, 10], "share": [0.6, 0.35, 0.03, 0.01]})
    unverified = replace(origins[0].attribution, faithfulness=None)
    told = replace(origins[0], attribution=unverified, component="L2<b>", share=1.0, neurons=neurons)
    (sentence, *_) = origin_sentences([told])
    assert "L2&lt;b&gt; (100.0 %), in it by neurons 7 (60.0 %) and 8 (35.0 %)." in sentence
    (sentence, *_) = origin_sentences([replace(told, neurons=neurons.assign(share=[0.4, 0.2, 0.2, 0.2]))])
    assert "in it by neurons 7 (40.0 %), 8 (20.0 %) and 9 (20.0 %)." in sentence
