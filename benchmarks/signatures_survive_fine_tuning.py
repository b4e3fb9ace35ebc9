"""Claim: a signature recognises SmolLM2 in whatever still works of it, and nothing else.

Three tables. Variants of SmolLM2-135M against the original: fine-tuned (really, with AdamW: all weights, and LoRA),
rounded, pruned, noised, merged, cut; then in other channels; then with nothing of it left. Tiny GPT-2s that are trained
from scratch from several seeds, and a fine-tune of each, all against all. And the false-positive rates under
100,000 random orders and signs of SmolLM2's channels.
"""

import argparse
import copy
import math
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from sd_lens import default_texts, lineage, load_model, signature
from sd_lens.applications.lineage import EQUAL_SPECTRA, NOT_COMPARABLE, RELATED
from sd_lens.linear.largest_channels import channels_beyond_chance, shared_channels
from sd_lens.linear.random_angles import chance_angle
from sd_lens.models.loading import _dequantise
from sd_lens.models.packaged import packaged_folder

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()

READING = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITING = ("self_attn.o_proj", "mlp.down_proj")
RATE = 1e-3


# Fine-tuning


class LoRA(nn.Module):
    """A linear layer plus a trained map of rank `rank` (Hu et al. 2021)."""

    def __init__(self, base, rank=8, scale=2.0):
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        """The layer and the map."""
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T

    @torch.no_grad()
    def merged(self):
        """The layer with the map added to its weights."""
        self.base.weight += self.scale * self.B @ self.A
        return self.base


def replace_linears(model, new):
    for layer in model.model.layers:
        for name in READING + WRITING:
            parent, child = name.split(".")
            setattr(layer.get_submodule(parent), child, new(layer.get_submodule(name)))


def fine_tune(model, tokens, steps, learning_rate, lora, seed=0):
    """AdamW on batches of 4 x 64 tokens; prints the loss."""
    torch.manual_seed(seed)
    if lora:
        model.requires_grad_(False)
        replace_linears(model, LoRA)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    start = time.perf_counter()
    for step in range(steps):
        batch = torch.stack([tokens[i : i + 64] for i in torch.randint(0, len(tokens) - 64, (4,))])
        loss = model(batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in (0, steps - 1):
            print(f"  step {step}: loss {float(loss):.2f} after {time.perf_counter() - start:.0f} s", flush=True)
    if lora:
        replace_linears(model, LoRA.merged)
    return model


def fine_tuned(base, tokens, steps, folder, name, **options):
    """The model in `folder`, trained if it is not there yet."""
    where = folder / f"{name}-{steps}"
    if not where.exists():
        print(f"{name}, {steps} steps", flush=True)
        fine_tune(copy.deepcopy(base), tokens, steps, **options).save_pretrained(where)
    return AutoModelForCausalLM.from_pretrained(where)


# What else is done to weights: in place, the model is returned


def linears(model):
    return [layer.get_submodule(name).weight for layer in model.model.layers for name in READING + WRITING]


def rounded(model, bits, group=None):
    """To the nearest of 2**bits - 1 steps, symmetric, one scale a row or a group of its entries."""
    for weight in linears(model):
        parts = weight.view(len(weight), -1, group or weight.shape[1])
        scale = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        weight.copy_((torch.round(parts / scale) * scale).view_as(weight))
    return model


def pruned(model, share):
    """The smallest entries of each matrix to zero."""
    for weight in linears(model):
        weight[weight.abs() <= weight.abs().flatten().kthvalue(int(share * weight.numel())).values] = 0
    return model


def noised(model, share, seed=0):
    """Gaussian noise of a share of each matrix's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for weight in [model.model.embed_tokens.weight, *linears(model)]:
        weight += share * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def averaged(one, other):
    for weight, added in zip(one.parameters(), other.parameters(), strict=True):
        weight.copy_((weight + added) / 2)
    return one


def without_blocks(model, removed):
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in removed]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(kept), len(kept)
    return model


def with_tokens(model, kept):
    """Only some rows of the embedding, which is the unembedding too."""
    rows = model.model.embed_tokens.weight[kept].clone()
    model.resize_token_embeddings(len(kept))
    model.model.embed_tokens.weight.copy_(rows)
    return model


def folded(model):
    """The gains of all norms multiplied into the weights behind them."""
    gains = model.model.norm.weight
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight * gains, requires_grad=False)
    gains.fill_(1)
    for layer in model.model.layers:
        for norm, names in ((layer.input_layernorm, READING[:3]), (layer.post_attention_layernorm, READING[3:])):
            for name in names:
                layer.get_submodule(name).weight *= norm.weight
            norm.weight.fill_(1)
    return model


def in_channels(model, Q):
    """The same function in a stream that is multiplied by the orthogonal Q."""
    model = folded(model)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.copy_(weight @ Q)
    for layer in model.model.layers:
        for name in READING:
            layer.get_submodule(name).weight.copy_(layer.get_submodule(name).weight @ Q)
        for name in WRITING:
            layer.get_submodule(name).weight.copy_(Q.T @ layer.get_submodule(name).weight)
    return model


def shuffled(model, seed=0):
    """The entries of each matrix in random order: their statistics are all that is left."""
    generator = torch.Generator().manual_seed(seed)
    for weight in [model.model.embed_tokens.weight, *linears(model)]:
        weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))
    return model


# The three tables


def loss_of(model, rows):
    return sum(float(model(row[None], labels=row[None]).loss) for row in rows) / len(rows)


@torch.no_grad()
def variants_of_smollm2(folder, steps):
    path = packaged_folder(_dequantise)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in default_texts()]
    rows, training = rows[:10], torch.cat(rows[10:])
    generator = torch.Generator().manual_seed(0)
    kept = torch.cat([torch.cat(rows), torch.randperm(base.config.vocab_size, generator=generator)[:24_000]]).unique()
    ids = torch.zeros(base.config.vocab_size, dtype=torch.long)
    ids[kept] = torch.arange(len(kept))
    width = base.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q.float()
    order = torch.eye(width)[torch.randperm(width, generator=generator)]
    with torch.enable_grad():
        full = fine_tuned(base, training, steps, folder, "full", learning_rate=5e-5, lora=False)
        lora = fine_tuned(base, training, steps, folder, "lora", learning_rate=1e-3, lora=True)

    def fresh():
        return copy.deepcopy(base)

    variants = [
        (f"fine-tuned, all weights, {steps} steps", RELATED, lambda: copy.deepcopy(full)),
        (f"fine-tuned, LoRA of rank 8, {steps} steps", RELATED, lambda: copy.deepcopy(lora)),
        ("mean of original and fine-tuned", RELATED, lambda: averaged(fresh(), full)),
        ("mean of the two fine-tuned", RELATED, lambda: averaged(copy.deepcopy(lora), full)),
        ("8 bits, one scale a row", RELATED, lambda: rounded(fresh(), 8)),
        ("4 bits, one scale for 32", RELATED, lambda: rounded(fresh(), 4, 32)),
        ("4 bits, one scale a row", RELATED, lambda: rounded(fresh(), 4)),
        ("3 bits, one scale for 32", RELATED, lambda: rounded(fresh(), 3, 32)),
        ("30 % of the weights pruned", RELATED, lambda: pruned(fresh(), 0.3)),
        ("50 % of the weights pruned", RELATED, lambda: pruned(fresh(), 0.5)),
        ("70 % of the weights pruned", RELATED, lambda: pruned(fresh(), 0.7)),
        ("5 % noise", RELATED, lambda: noised(fresh(), 0.05)),
        ("20 % noise", RELATED, lambda: noised(fresh(), 0.2)),
        ("50 % noise", RELATED, lambda: noised(fresh(), 0.5)),
        ("half of the vocabulary", RELATED, lambda: with_tokens(fresh(), kept)),
        ("without blocks 14, 16, 18, 20", RELATED, lambda: without_blocks(fresh(), (14, 16, 18, 20))),
        ("norms folded", RELATED, lambda: folded(fresh())),
        ("channels permuted", EQUAL_SPECTRA, lambda: in_channels(fresh(), order)),
        ("channels rotated", EQUAL_SPECTRA, lambda: in_channels(fresh(), rotation)),
        ("channels rotated, 8 bits", EQUAL_SPECTRA, lambda: rounded(in_channels(fresh(), rotation), 8)),
        ("entries shuffled", NOT_COMPARABLE, lambda: shuffled(fresh())),
        ("initialized anew", NOT_COMPARABLE, lambda: AutoModelForCausalLM.from_config(base.config)),
    ]
    n_pairs = len(variants)
    print(f"\n{'':<38}{'loss':>7}{'texts':>8}{'weights':>8}{'shared':>7}{'log10 p':>8}{'spectra':>9}  verdict")
    false = 0
    original = _signatures(fresh(), rows)
    for name, expected, build in [("the original", RELATED, fresh), *variants]:
        model = build().eval()
        texts = [ids[row] for row in rows] if "vocabulary" in name else rows
        loss = loss_of(model, texts)
        # What `lineage` of all variants together would ask of a pair.
        observed, forecast = (
            lineage({"original": one, "variant": other}, false_positive_rate=RATE / n_pairs).table.iloc[0]
            for one, other in zip(original, _signatures(model, texts), strict=True)
        )
        false += observed.verdict != expected
        print(
            f"{name:<38}{loss:>7.2f}{observed.angle:>8.2f}{forecast.angle:>8.2f}{observed.shared!s:>7}"
            f"{observed.log10_p:>8.1f}{observed.spectral_distance:>9.4f}  {observed.verdict}"
            + ("" if observed.verdict == expected else f" (expected: {expected})")
            + ("" if observed.verdict == forecast.verdict else f"; from weights: {forecast.verdict}"),
            flush=True,
        )
    required = channels_beyond_chance(math.log10(RATE / n_pairs), width)
    print(f"{false} of {n_pairs} verdicts are not those expected; {required} shared channels are required")
    return original[0]


def _signatures(model, rows):
    """From texts and from weights."""
    wrapped = load_model(model, backend="bridge", device="cpu")
    return signature(wrapped, rows, progress=False), signature(wrapped, progress=False)


def periodic(n, periods, seed, vocabulary=32, length=32):
    """Rows that repeat a random pattern: its first period cannot be predicted, the rest can be copied."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(n, vocabulary, generator=generator).argsort(1)
    period = torch.randint(periods[0], periods[1] + 1, (n, 1), generator=generator)
    return patterns.gather(1, torch.arange(length)[None] % period)


def trained(model, rows, steps, learning_rate, seed):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / 50)
        batch = rows[torch.randint(0, len(rows), (16,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def tiny_models(n_seeds=6, steps=1000):
    """GPT-2s of 150,000 weights, trained from scratch, and a fine-tune of each to longer periods."""
    config = GPT2Config(
        vocab_size=34, n_embd=64, n_layer=3, n_head=2, n_positions=32, bos_token_id=33, eos_token_id=33,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    signatures = {}
    for seed in range(n_seeds):
        torch.manual_seed(seed)
        model = trained(GPT2LMHeadModel(config), periodic(4096, (4, 8), 0), steps, 3e-3, seed)
        tuned = trained(copy.deepcopy(model), periodic(4096, (6, 12), 2), steps // 5, 1e-3, seed)
        for name, each in ((f"seed {seed}", model), (f"seed {seed}, fine-tuned", tuned)):
            signatures[name] = signature(load_model(each, device="cpu"), periodic(64, (4, 8), 1), progress=False)
    found = lineage(signatures, false_positive_rate=RATE)
    print(f"\n{found}")
    table = found.table
    kin = table["first"].str.split(",").str[0] == table["second"].str.split(",").str[0]
    for name, pairs in (("base and its fine-tune", table[kin]), ("trained from different seeds", table[~kin])):
        print(
            f"{name:<30}{len(pairs):>4} pairs: angle {pairs.angle.min():.1f} to {pairs.angle.max():.1f}, shared "
            f"{pairs.shared.min()} to {pairs.shared.max()} ({pairs.required.iloc[0]} required), spectra "
            f"{pairs.spectral_distance.min():.3f} to {pairs.spectral_distance.max():.3f}; "
            + ", ".join(f"{n} {verdict}" for verdict, n in pairs.verdict.value_counts().items())
        )


def random_orders(direction, n=100_000, seed=0):
    """How often chance reaches what a false-positive rate allows it."""
    generator = torch.Generator().manual_seed(seed)
    width = len(direction)
    angles, shared = [], []
    for _ in range(n):
        signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
        other = direction[torch.randperm(width, generator=generator)] * signs
        angles.append(math.degrees(math.acos(min(1.0, abs(float(direction @ other))))))
        shared.append(shared_channels(direction, other))
    angles, shared = torch.tensor(angles), torch.tensor(shared)
    print(f"\n{n:,} random orders and signs of SmolLM2's channels")
    print(f"{'rate':>8}{'angle below':>13}{'happens':>10}{'shared':>8}{'happens':>10}")
    for rate in (1e-2, 1e-3, 1e-4):
        threshold, required = chance_angle(math.log10(rate), width), channels_beyond_chance(math.log10(rate), width)
        print(
            f"{rate:>8g}{threshold:>13.2f}{float((angles <= threshold).double().mean()):>10.5f}"
            f"{required:>8}{float((shared >= required).double().mean()):>10.5f}"
        )
    print(
        f"smallest angle {float(angles.min()):.1f} degrees; below 15 degrees {float((angles < 15).double().mean()):.5f}"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150, help="of each fine-tuning")
    parser.add_argument("--folder", type=Path, help="keeps the fine-tuned models, and uses those that it holds")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        original = variants_of_smollm2(options.folder or Path(temporary), options.steps)
    tiny_models()
    random_orders(original.direction)
    print(f"\n{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
