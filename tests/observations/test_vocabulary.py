import pytest
import torch

from sd_lens.errors import InputError
from sd_lens.observations.vocabulary import chosen_tokens, embedding_norms, is_untrained, random_embeddings
from tests import tiny


def test_embedding_norms_are_those_of_the_stream_that_enters_block_0(tiny_model):
    expected = []
    for token in range(tiny.VOCABULARY):
        _, cache = tiny_model.run_with_cache(torch.tensor([[token]]))
        expected.append(cache["blocks.0.hook_resid_pre"][0, 0].double().norm())
    torch.testing.assert_close(embedding_norms(tiny_model), torch.stack(expected), rtol=1e-6, atol=0)


def test_short_embeddings_are_untrained():
    hf_model = tiny.llama()
    with torch.no_grad():
        hf_model.model.embed_tokens.weight[9] *= 0.05
    assert is_untrained(embedding_norms(tiny.wrap(hf_model, "bridge"))).nonzero()[:, 0].tolist() == [9]


def test_random_embeddings_have_the_length_and_follow_the_seed():
    streams = random_embeddings(50, 32, 3.0, torch.float32, seed=1)
    torch.testing.assert_close(streams.norm(dim=1), torch.full((50,), 3.0))
    assert torch.equal(streams, random_embeddings(50, 32, 3.0, torch.float32, seed=1))
    assert not torch.equal(streams, random_embeddings(50, 32, 3.0, torch.float32, seed=2))


def test_tokens_are_chosen_once_and_checked(tiny_llama):
    assert chosen_tokens(tiny_llama, None).tolist() == list(range(tiny.VOCABULARY))
    assert chosen_tokens(tiny_llama, torch.tensor([5, 3, 5])).tolist() == [3, 5]
    for wrong in ([], [-1], [tiny.VOCABULARY]):
        with pytest.raises(InputError, match="expected at least one token id from 0 to 59"):
            chosen_tokens(tiny_llama, torch.tensor(wrong, dtype=torch.long))
