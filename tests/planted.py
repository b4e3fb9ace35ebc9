"""Models with a known defect: one token explodes in one block, along one direction, and decays in another."""

from dataclasses import dataclass
from typing import Any

import torch

from tests import tiny

TOKEN = 7
EXPLOSION, DECAY, N_LAYERS, WIDTH, EXPERT = 2, 4, 6, 64, 1


@dataclass(frozen=True)
class Planted:
    hf_model: Any
    direction: torch.Tensor
    texts: torch.Tensor


def _direction(seed=0):
    """A unit vector without the marker's coordinate and without mean (LayerNorm removes the mean)."""
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5 + seed))
    v[0] = 0
    v[1:] -= v[1:].mean()
    return v / v.norm()


def _texts():
    """Forty random texts of 12 tokens; the planted token stands once in each, also in front."""
    generator = torch.Generator().manual_seed(6)
    texts = torch.randint(10, tiny.VOCABULARY, (40, 12), generator=generator)
    texts[torch.arange(40), torch.arange(40) % 12] = TOKEN
    return texts


def _marked_embeddings(weight, direction):
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    weight[:, 0] = 0
    weight[TOKEN, 0] = 6
    weight -= torch.outer(weight @ direction, direction)  # only the planted token ever gets any of it


@torch.no_grad()
def llama(seed=0):
    """Another seed is another model: other weights, another direction."""
    model = tiny.llama(hidden_size=WIDTH, num_hidden_layers=N_LAYERS, head_dim=16)
    tiny.randomised(model, seed, scale=0.02)
    direction = _direction(seed)
    _marked_embeddings(model.model.embed_tokens.weight, direction)
    marker = torch.nn.functional.one_hot(torch.tensor(0), WIDTH).float()
    explosion, decay = model.model.layers[EXPLOSION].mlp, model.model.layers[DECAY].mlp
    explosion.gate_proj.weight[3] = explosion.up_proj.weight[3] = 1.5 * marker
    explosion.down_proj.weight[:, 3] = 60 * direction
    # At the decay block the stream is nearly along the direction: the norm makes that 8 = sqrt(64).
    decay.gate_proj.weight[5] = decay.up_proj.weight[5] = direction
    stream = _stream_before(model, DECAY)
    decay.down_proj.weight[:, 5] = -0.9 * stream / 64 * direction
    return Planted(model, direction, _texts())


@torch.no_grad()
def gpt2():
    model = tiny.gpt2(n_embd=WIDTH, n_layer=N_LAYERS)
    tiny.randomised(model, scale=0.02)
    direction = _direction()
    _marked_embeddings(model.transformer.wte.weight, direction)
    marker = torch.nn.functional.one_hot(torch.tensor(0), WIDTH).float()
    explosion, decay = model.transformer.h[EXPLOSION].mlp, model.transformer.h[DECAY].mlp
    explosion.c_fc.weight[:, 3] = 3 * marker
    explosion.c_fc.bias[3] = -3
    explosion.c_proj.weight[3] = 300 * direction
    decay.c_fc.weight[:, 5] = direction
    decay.c_fc.bias[5] = -4  # the stream's 8 = sqrt(64) along the direction becomes 4, anything small nothing
    stream = _stream_before(model, DECAY)
    decay.c_proj.weight[5] = -0.9 * stream / 4 * direction
    return Planted(model, direction, _texts())


@torch.no_grad()
def mixtral():
    """One expert makes the explosion, and the router sends it the planted token; nothing decays."""
    model = tiny.llama_like(
        "Mixtral",
        hidden_size=WIDTH,
        num_hidden_layers=N_LAYERS,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    tiny.randomised(model, scale=0.02)
    direction = _direction()
    _marked_embeddings(model.model.embed_tokens.weight, direction)
    marker = torch.nn.functional.one_hot(torch.tensor(0), WIDTH).float()
    mlp = model.model.layers[EXPLOSION].mlp
    mlp.gate.weight[EXPERT] = marker
    mlp.experts.gate_up_proj[EXPERT, 3] = mlp.experts.gate_up_proj[EXPERT, 48 + 3] = 1.5 * marker
    mlp.experts.down_proj[EXPERT, :, 3] = 60 * direction
    return Planted(model, direction, _texts())


@torch.no_grad()
def exploding_when_initial():
    """The planted GPT-2, with attention of one block writing the marker: every lone token explodes."""
    defect = gpt2()
    defect.hf_model.transformer.h[EXPLOSION].attn.c_proj.bias[0] = 30
    return defect


OUTLIERS = (2, 4)


@torch.no_grad()
def llama_with_outliers():
    """One neuron in each of two blocks stands far above the others at every token, and writes nothing.

    Returns the model, and texts that it predicts as well as it can: drawn from itself.
    """
    model = tiny.llama(num_hidden_layers=N_LAYERS)
    pattern = torch.randn(32, generator=torch.Generator().manual_seed(8)).sign()
    model.model.embed_tokens.weight += 3 * pattern
    for layer in OUTLIERS:
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[3] = mlp.up_proj.weight[3] = 0.7 * pattern
        mlp.down_proj.weight[:, 3] = 0
    generator = torch.Generator().manual_seed(9)
    texts = torch.randint(3, tiny.VOCABULARY, (10, 1), generator=generator)
    for _ in range(15):
        likely = torch.softmax(model(texts).logits[:, -1], dim=-1)
        texts = torch.cat([texts, torch.multinomial(likely, 1, generator=generator)], dim=1)
    return model, texts


def _stream_before(model, layer):
    """The planted token's norm before a block."""
    states = model(torch.tensor([[TOKEN]]), output_hidden_states=True).hidden_states
    return float(states[layer].norm())


SINK_LAYER, SINK_HEAD, CHANNEL = 3, 2, 11


@torch.no_grad()
def sink():
    """`llama` with a head behind the explosion all of whose queries look for the direction, wherever it is."""
    defect = llama()
    model, direction = defect.hf_model.model, defect.direction
    everywhere = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    everywhere[0] = 0
    everywhere -= (everywhere @ direction) * direction
    everywhere /= everywhere.norm()
    model.embed_tokens.weight += 4 * everywhere  # what every query reads
    attention = model.layers[SINK_LAYER].self_attn
    # The last pair of a head of 16 rotates by 0.0003 per position: not at all.
    attention.q_proj.weight[16 * SINK_HEAD : 16 * (SINK_HEAD + 1)] = 0
    attention.q_proj.weight[16 * SINK_HEAD + 7] = 1.2 * everywhere
    attention.k_proj.weight[16:32] = 0  # the second of two key-value heads, which heads 2 and 3 read
    attention.k_proj.weight[16 + 7] = direction
    return defect


@torch.no_grad()
def through_one_weight(defect):
    """The same explosion, written by neuron 3 into one channel alone: one massive activation, one super weight."""
    blocks = defect.hf_model.model.layers if hasattr(defect.hf_model, "model") else defect.hf_model.transformer.h
    mlp = blocks[EXPLOSION].mlp
    row = mlp.down_proj.weight[:, 3] if hasattr(mlp, "down_proj") else mlp.c_proj.weight[3]
    length = row.norm()
    row.zero_()
    row[CHANNEL] = length
    return Planted(defect.hf_model, torch.nn.functional.one_hot(torch.tensor(CHANNEL), WIDTH).float(), defect.texts)
