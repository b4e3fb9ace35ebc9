import pytest
import torch

from sd_lens import explosion_in_context, explosion_path
from sd_lens.errors import InputError
from tests import planted, tiny


@pytest.fixture
def model(planted_defect, backend):
    return tiny.wrap(planted_defect.hf_model, backend)


def test_the_planted_token_explodes_in_every_context_and_others_in_none(model, planted_defect):
    path = explosion_path(model, planted.EXPLOSION, 1000.0, progress=False)
    texts = planted_defect.texts[:6, 1:]
    found = explosion_in_context(model, path, texts, n_tokens=1, progress=False)
    named, other = found.table.iloc[0], found.table.iloc[1]
    assert (named.token_id, named.named, named.share, other.share) == (planted.TOKEN, True, 1.0, 0.0)
    assert (found.named_rate, found.other_rate, found.n_contexts) == (1.0, 0.0, 6)
    assert named.lowest > path.threshold > other.highest


def test_norms_are_those_of_the_texts_run_one_by_one(model, planted_defect):
    """With texts of one token there is one position to choose."""
    path = explosion_path(model, planted.EXPLOSION, 1000.0, progress=False)
    texts = planted_defect.texts[:3, 3:4]
    found = explosion_in_context(model, path, texts, n_tokens=4, progress=False)
    for row in found.table.itertuples():
        norms = []
        for text in texts:
            _, cache = model.run_with_cache(torch.tensor([[int(text[0]), row.token_id]]))
            norms.append(float(cache[f"blocks.{planted.EXPLOSION}.hook_resid_post"][0, 1].double().norm()))
        assert [row.lowest, row.median, row.highest] == pytest.approx(sorted(norms), rel=1e-5)


def test_positions_and_other_tokens_follow_the_seed(tiny_llama):
    path = explosion_path(tiny_llama, 1, 3.0, progress=False)
    texts = torch.arange(3, 43).reshape(2, 20)
    same, again, other = (
        explosion_in_context(tiny_llama, path, texts, n_tokens=3, seed=seed, progress=False).table for seed in (0, 0, 1)
    )
    assert same.equals(again)
    assert not same.equals(other)


def test_what_cannot_be_done_is_said(tiny_llama):
    path = explosion_path(tiny_llama, 1, 3.0, progress=False)
    with pytest.raises(InputError, match="n_tokens=0: expected at least 1"):
        explosion_in_context(tiny_llama, path, "w1", n_tokens=0)
    with pytest.raises(InputError, match="needs texts of at least one token"):
        explosion_in_context(tiny_llama, path, [])
    without = tiny.wrap(tiny.llama(), "bridge")
    with pytest.raises(InputError, match="the model has no tokenizer: pass token ids"):
        explosion_in_context(without, path, "w1 w2")
    with pytest.raises(InputError, match="the path is of another model"):
        explosion_in_context(tiny.wrap(tiny.opt(), "bridge"), explosion_path(without, 2, 3.0, progress=False), "w1")
