"""Claim: `singular_defects` of a folder holds one block at a time: its peak stays below one and a half.

Checkpoints of four random blocks of the shapes of real models, in bfloat16 (Gaussian weights of the usual size, with a
planted direction, for a random matrix has no gap), over shards that cut through blocks; the vocabulary is small. The
peak counts mapped files. What the interpreter and its modules take, measured after a tiny checkpoint, is not counted.
"""

import json
import math
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from sd_lens import singular_defects

N_LAYERS = 4
TENSORS_PER_SHARD = 7
COMMON = {"num_hidden_layers": N_LAYERS, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SHAPES = {
    "Llama-2-7B": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, **COMMON),
    "Phi-3-mini": Phi3Config(hidden_size=3072, intermediate_size=8192, num_attention_heads=32, **COMMON),
}
TINY = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, **COMMON)


def write_checkpoint(config, folder):
    """Shard by shard, so that no more than one is in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names, shards = list(shapes), {}
    generator = torch.Generator().manual_seed(0)
    for number, start in enumerate(range(0, len(names), TENSORS_PER_SHARD)):
        shard = {name: random_weight(name, shapes[name], generator) for name in names[start:][:TENSORS_PER_SHARD]}
        shards |= dict.fromkeys(shard, f"model-{number}.safetensors")
        save_file(shard, folder / f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return max(
        sum(2 * shape.numel() for name, shape in shapes.items() if f".{layer}." in name) for layer in range(N_LAYERS)
    )


def random_weight(name, shape, generator):
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        weight[:, 0] *= 30  # one neuron writes much more than the others
    return weight.to(torch.bfloat16)


def resident_bytes(field):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def measure(folder, tiny_folder, queue):
    """Seconds, and bytes of the peak above what is there before, in a fresh process."""
    singular_defects(tiny_folder, progress=False)  # modules, thread pools and code caches
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on the peak counts anew (Linux)
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    singular_defects(folder, progress=False)
    queue.put((time.perf_counter() - start, resident_bytes("VmHWM") - before))


def main():
    context = multiprocessing.get_context("spawn")
    print(f"{torch.get_num_threads()} threads")
    print(f"{'':<12}{'MB per block':>14}{'seconds per block':>19}{'peak, MB':>10}{'peak, blocks':>14}")
    for name, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, tiny = Path(folder) / "checkpoint", Path(folder) / "tiny"
            write_checkpoint(TINY, tiny)
            size = write_checkpoint(config, checkpoint)
            queue = context.Queue()
            process = context.Process(target=measure, args=(checkpoint, tiny, queue))
            process.start()
            seconds, more = queue.get()
            process.join()
        print(
            f"{name:<12}{size / 1e6:>14.0f}{seconds / N_LAYERS:>19.2f}{more / 1e6:>10.0f}{more / size:>14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
