"""Tiny random models: every parameter is drawn wide enough to matter, gains and biases included."""

import importlib
import inspect

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sd_lens import load_model

VOCABULARY = 60


def _has_hooked_transformer():
    try:
        importlib.import_module("transformer_lens.HookedTransformer")
    except ImportError:
        return False
    return True


BACKENDS = ["hooked_transformer", "bridge"] if _has_hooked_transformer() else ["bridge"]


def randomised(model, seed=0, scale=0.25):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_gain else noise)
    return model.eval()


def llama(seed=0, **options):
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
        } | options
    )  # fmt: skip
    return randomised(LlamaForCausalLM(config), seed)


def mistral(seed=0):
    """Grouped queries, and a head width of its own."""
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return randomised(MistralForCausalLM(config), seed)


def qwen2(seed=0):
    """Llama with biases on queries, keys and values."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return randomised(Qwen2ForCausalLM(config), seed)


FAMILIES = ["llama", "gpt2", "mistral", "qwen2"]


def family(name):
    return {"llama": llama, "gpt2": gpt2, "mistral": mistral, "qwen2": qwen2}[name]()


def gpt2(seed=0, **options):
    config = GPT2Config(
        **{
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
            "bos_token_id": 1, "eos_token_id": 2,
        } | options
    )  # fmt: skip
    return randomised(GPT2LMHeadModel(config), seed)


def tokenizer():
    """One token per word; no beginning-of-sequence token by itself."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 5)), "<b>", "&"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def wrap(hf_model, backend, *, with_tokenizer=False):
    return load_model(hf_model, backend=backend, device="cpu", tokenizer=tokenizer() if with_tokenizer else None)


def unchecked(function):
    """A public function without the suite's type checks, to see what it says of wrong arguments itself."""
    return inspect.unwrap(function)


def opt(seed=0, **options):
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=1, **options,
    )  # fmt: skip
    return randomised(OPTForCausalLM(config), seed)


def gptj(seed=0):
    """Attention and MLP in parallel, behind one norm."""
    config = GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return randomised(GPTJForCausalLM(config), seed)


def gpt_neo(seed=0):
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return randomised(GPTNeoForCausalLM(config), seed)


def gpt_neox(seed=0):
    """Attention and MLP in parallel, each behind a norm of its own; one matrix for queries, keys and values."""
    return llama_like("GPTNeoX", seed)


def phi3(seed=0):
    """Llama with one matrix for queries, keys and values."""
    return llama_like("Phi3", seed, num_key_value_heads=2)


def mixtral(seed=0):
    """A mixture of experts."""
    return llama_like("Mixtral", seed, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)


def qwen_moe(generation, **options):
    """A mixture of experts that are narrower than a dense block's MLP; Qwen 2 has one more that all tokens share."""
    shared = {"shared_expert_intermediate_size": 40} if generation == 2 else {"head_dim": 8}
    return llama_like(
        f"Qwen{generation}Moe", num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        **shared, **options,
    )  # fmt: skip


def llama_like(name, seed=0, **options):
    """A small model of an architecture whose configuration has Llama's names."""
    config = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 2,
        } | options
    )  # fmt: skip
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config), seed)


def falcon(**options):
    config = transformers.FalconConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "alibi": False, "bias": False, "multi_query": True, "parallel_attn": True,
            "new_decoder_architecture": False, "bos_token_id": 1, "eos_token_id": 2,
        } | options
    )  # fmt: skip
    return randomised(transformers.FalconForCausalLM(config))


def mpt(**options):
    config = transformers.MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64, **options
    )
    return randomised(transformers.MptForCausalLM(config))


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "gpt2": gpt2, "phi3": phi3, "gptj": gptj, "opt": opt,
    "llama biased": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt_neox": gpt_neox,
    "gpt_neox sequential": lambda: llama_like("GPTNeoX", use_parallel_residual=False),
    "phi": lambda: llama_like("Phi"),
    "falcon": falcon,
    "falcon sequential": lambda: falcon(multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "gemma": lambda: llama_like("Gemma", **GROUPED),
    "gemma2": lambda: llama_like("Gemma2", **GROUPED),
    "gemma3": lambda: llama_like("Gemma3", **GROUPED),
    "qwen3": lambda: llama_like("Qwen3", **GROUPED),
    "mpt": mpt,
}  # fmt: skip
"""Every supported architecture, with the variants that store or add things in another way."""

MIXTURES = {
    "mixtral": mixtral,
    "qwen2_moe": lambda: qwen_moe(2),
    "qwen2_moe renormalized": lambda: qwen_moe(2, norm_topk_prob=True),
    "qwen2_moe interleaved": lambda: qwen_moe(2, mlp_only_layers=[0]),
    "qwen3_moe": lambda: qwen_moe(3, norm_topk_prob=True),
    "qwen3_moe interleaved": lambda: qwen_moe(3, decoder_sparse_step=2),
}
"""Every mixture of experts; block 1 is one, block 0 is not if interleaved."""

BRIDGE_ONLY = {"llama biased", "phi", "falcon", "falcon sequential", "gemma", "gemma2", "gemma3", "mpt"}
"""Those that HookedTransformer does not know, or does not make from a configuration in memory."""

BOOTING = [(name, backend) for name in ARCHITECTURES for backend in BACKENDS
           if backend == "bridge" or name not in BRIDGE_ONLY]  # fmt: skip

BOOTING_MIXTURES = [(name, backend) for name in MIXTURES for backend in BACKENDS
                    if backend == "bridge" or name == "mixtral"]  # fmt: skip
