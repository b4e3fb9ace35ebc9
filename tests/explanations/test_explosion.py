"""Paths of one-token texts: against explicit runs, and with planted mechanisms."""

import pytest
import torch

from sd_lens import explosion_path
from sd_lens.errors import InputError, NumericalError
from tests import planted, tiny

LAYER = 1


def norms_of_runs(model, layer, *, attention):
    """A slow twin: every token alone, by TransformerLens's own hooks."""
    found = []
    off = [] if attention else [(f"blocks.{i}.hook_attn_out", lambda x, hook: x * 0) for i in range(layer + 1)]
    for token in range(tiny.VOCABULARY):
        keep = (f"blocks.{layer}.hook_resid_post", lambda x, hook: found.append(x[0, 0].double().norm()))
        with torch.no_grad():
            model.run_with_hooks(torch.tensor([[token]]), fwd_hooks=[*off, keep])
    return torch.stack(found)


def by_token(path, column):
    return torch.tensor(path.table.set_index("token_id")[column].sort_index().to_numpy())


def test_both_paths_are_those_of_single_runs(tiny_model):
    path = explosion_path(tiny_model, LAYER, 1.0, batch_tokens=7, n_random=5, progress=False)
    for column, attention in (("initial", True), ("non_initial", False)):
        expected = norms_of_runs(tiny_model, LAYER, attention=attention)
        torch.testing.assert_close(by_token(path, column), expected, rtol=1e-5, atol=0)
    assert path.table.non_initial.is_monotonic_decreasing
    assert (path.initial_rate, path.non_initial_rate, len(path.untrained)) == (1.0, 1.0, 0)


def test_the_planted_token_explodes_on_both_paths_and_nothing_else(planted_defect, backend):
    model = tiny.wrap(planted_defect.hf_model, backend)
    path = explosion_path(model, planted.EXPLOSION, 1000.0, progress=False)
    assert path.table.token_id[path.table.explodes].tolist() == [planted.TOKEN]
    assert path.initial_rate == pytest.approx(1 / len(path.table))
    assert path.random_rate < 0.1  # those that happen to have much of the marker
    assert "without attention 1 tokens" in str(path)
    found_gap = explosion_path(model, planted.EXPLOSION, progress=False)
    assert found_gap.table.explodes[0]
    assert found_gap.table.non_initial[0] > 10 * found_gap.threshold > 0


@torch.no_grad()
def attention_carries():
    """Lone tokens explode, all of them, because attention writes what the MLP explodes on."""
    model = tiny.llama(hidden_size=planted.WIDTH, num_hidden_layers=3, head_dim=16)
    tiny.randomised(model, scale=0.02)
    model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.model.embed_tokens.weight[:, 0] = 0
    model.model.embed_tokens.weight[:, 1] = 4
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight[0, 1] = 1  # the first key-value head reads channel 1,
    attention.o_proj.weight[0, 0] = 3  # the first head writes what it read into channel 0
    mlp = model.model.layers[2].mlp
    mlp.gate_proj.weight[3] = mlp.up_proj.weight[3] = 1.5 * torch.eye(planted.WIDTH)[0]
    mlp.down_proj.weight[:, 3] = 60 * planted._direction()
    return model


def test_an_explosion_that_attention_carries_is_on_the_initial_path_alone(backend):
    path = explosion_path(tiny.wrap(attention_carries(), backend), 2, progress=False)
    assert path.initial_rate == 1
    assert path.non_initial_rate == 0
    assert path.random_rate < 1  # a random embedding has its own channel 1


def test_untrained_tokens_are_set_apart():
    hf_model = tiny.llama()
    with torch.no_grad():
        hf_model.model.embed_tokens.weight[9] *= 0.01
    path = explosion_path(tiny.wrap(hf_model, "bridge"), LAYER, 1.0, progress=False)
    assert path.untrained.token_id.tolist() == [9]
    assert 9 not in path.table.token_id.tolist()
    assert len(path.table) == tiny.VOCABULARY - 1


def test_some_tokens_alone_have_the_same_norms(tiny_llama):
    whole = explosion_path(tiny_llama, LAYER, 1.0, progress=False)
    some = explosion_path(tiny_llama, LAYER, 1.0, token_ids=torch.tensor([8, 3]), progress=False)
    assert sorted(some.table.token_id) == [3, 8]
    expected = whole.table.set_index("token_id").loc[some.table.token_id]
    assert some.table.initial.tolist() == pytest.approx(expected.initial.tolist())
    assert some.table.token.tolist() == expected.token.tolist()


def test_the_seed_draws_the_random_embeddings(tiny_llama):
    first, again, other = (
        explosion_path(tiny_llama, 0, 1.0, seed=seed, n_random=9, progress=False).random for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_cannot_be_done_is_said(tiny_llama):
    for arguments, message in (
        ({"layer": 3}, "block 3 does not exist: the model has blocks 0 to 2"),
        ({"layer": 1, "threshold": -1.0}, "threshold=-1.0: expected 'auto' or a positive number"),
        ({"layer": 1, "n_random": 0}, "n_random=0, batch_tokens=2048: expected at least 1"),
        ({"layer": 1}, "no norm explodes after block 1: no gap .* forecast"),
    ):
        with pytest.raises(InputError, match=message):
            explosion_path(tiny_llama, **arguments, progress=False)


def test_weights_that_are_not_finite_are_reported():
    hf_model = tiny.llama()
    with torch.no_grad():
        hf_model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="not finite after block 1"):
        explosion_path(tiny.wrap(hf_model, "bridge"), LAYER, 1.0, progress=False)
