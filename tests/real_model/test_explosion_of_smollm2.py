"""How norms explode in SmolLM2-135M, on a sample of its vocabulary: docs/explosion.md."""

import pytest
import torch

from sd_lens import (
    ablated,
    default_texts,
    explosion_in_context,
    explosion_path,
    explosion_subspace,
    find_high_norm_tokens,
)

pytestmark = pytest.mark.real_model

SAMPLE = torch.randperm(49_152, generator=torch.Generator().manual_seed(0))[:512]


def test_every_token_explodes_on_the_initial_path_and_some_without_attention(smollm2):
    small, great = (explosion_path(smollm2, layer, token_ids=SAMPLE, n_random=256, progress=False) for layer in (2, 11))
    for path in (small, great):
        assert path.initial_rate > 0.99
        assert path.random_rate > 0.9
        assert 0.01 < path.non_initial_rate < 0.2
    assert great.threshold > 5 * small.threshold


def test_in_real_texts_attention_keeps_the_named_tokens_from_exploding(smollm2):
    """What the path says of non-initial positions holds only where attention writes nothing."""
    path = explosion_path(smollm2, 2, token_ids=SAMPLE, n_random=16, progress=False)
    texts = default_texts()[:4]
    found = explosion_in_context(smollm2, path, texts, n_tokens=16, n_contexts=4, progress=False)
    assert found.table[found.table.named].non_initial.min() > path.threshold
    assert found.named_rate < 0.1
    with ablated(smollm2, ["L0ATTN", "L1ATTN", "L2ATTN"]):
        without = explosion_in_context(smollm2, path, texts, n_tokens=16, n_contexts=4, progress=False)
    assert (without.named_rate, without.other_rate) == (1.0, 0.0)


def test_the_great_explosion_has_one_dimension_and_one_sign(smollm2):
    found = explosion_subspace(smollm2, 11, token_ids=SAMPLE, progress=False)
    assert float(found.outputs[0]) > 20 * float(found.outputs[1:].max())
    assert float(found.outputs[0]) > 50 * float(found.opposite[0])
    assert (found.n_sufficient, found.n_necessary) == (1, 1)
    assert found.sources.coefficient["initial"] > 10 * found.sources.coefficient["second"]
    assert found.sources.token["initial"] > 0.9 * found.sources.coefficient["initial"]


def test_only_the_explodes_at_other_positions(smollm2):
    texts = default_texts()[:10]
    found = find_high_norm_tokens(smollm2, texts, 235.0, progress=False)
    at_block_2 = found.table[(found.table.layer == 2) & (found.table.position > 0)]
    assert at_block_2.token.value_counts().index[0] == " the"
    assert (at_block_2.token == " the").mean() > 0.9
