"""Claim: a block of a 7B model takes seconds, hardly any memory beyond its weights, and time linear in them.

Random blocks of the shapes of real models (Gaussian weights of the usual size, with a planted direction, for
a random matrix has no gap). Products count applications of L or its transpose to a block of eight columns.
The official method (least squares on 100,000 samples, dense SVD) is timed at fewer samples, in which its first part
is linear.
"""

import math
import multiprocessing
import resource
import time

import torch

from sd_lens.linear.approximations import attention_map, block_map, ffn_map
from sd_lens.linear.spectra import leading_triples
from sd_lens.models.views import BlockWeights, Norm

# d_model, d_mlp, heads, key-value heads, type of the weights
SHAPES = {
    "SmolLM2-135M": (576, 1536, 9, 3, torch.float32),
    "Llama-3.2-1B": (2048, 8192, 32, 8, torch.float32),
    "Llama-2-7B": (4096, 11008, 32, 32, torch.float32),
    "Llama-2-70B": (8192, 28672, 64, 8, torch.bfloat16),
}

REPEATS = 4
N_SAMPLES, TIMED_SAMPLES = 100_000, 10_000  # timed are at least twice as many as the width: fewer do not fit


def random_block(d, d_mlp, n_heads, n_kv, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) / math.sqrt(shape[-2])).to(dtype)

    norm = Norm("rms", torch.ones(d, dtype=dtype), None)
    d_head = d // n_heads
    block = BlockWeights(
        layer=0, attention_norm=norm, mlp_norm=norm, W_V=draw(n_kv, d, d_head), W_O=draw(n_heads, d_head, d),
        W_in=draw(d, d_mlp), W_gate=draw(d, d_mlp), W_out=draw(d_mlp, d), b_in=None, b_gate=None, act_fn="silu",
    )  # fmt: skip
    block.W_out[0] *= 30  # one neuron writes much more than the others
    return block


def resident_megabytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1e3 for line in file if line.startswith(field))


def analyse(block):
    A, F = attention_map(block), ffn_map(block)
    return leading_triples(block_map(A, F))


def measure(name, queue):
    """Seconds, products, megabytes of the weights and of the peak above them, in a fresh process."""
    block = random_block(*SHAPES[name])
    analyse(random_block(*SHAPES["SmolLM2-135M"]))  # thread pools and code caches
    tensors = [block.W_V, block.W_O, block.W_in, block.W_gate, block.W_out]
    for tensor in tensors:
        tensor.sum()  # all of the weights are in memory before, whatever the kernel thought of them
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on the peak counts anew (Linux)
    before = resident_megabytes("VmRSS")
    start = time.perf_counter()
    found = analyse(block)
    seconds = time.perf_counter() - start
    weights = sum(t.numel() for t in tensors)
    size = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    queue.put((seconds, found.products, weights, size, resident_megabytes("VmHWM") - before))


def measure_sampled(name, queue):
    """Seconds of the official method, its samples extrapolated, and megabytes above the weights."""
    block = random_block(*SHAPES[name])
    before, n = resident_megabytes("VmRSS"), max(TIMED_SAMPLES, 2 * block.d_model)
    start = time.perf_counter()
    F = ffn_map(block, "sampled", n_samples=n)
    fitted = time.perf_counter()
    torch.linalg.svd(block_map(attention_map(block), F).dense())
    seconds = (fitted - start) * N_SAMPLES / n + time.perf_counter() - fitted
    queue.put((seconds, resident_megabytes("VmHWM") - before))


def in_a_process(measurement, name):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measurement, args=(name, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main():
    print(f"{torch.get_num_threads()} threads; page size {resource.getpagesize()}")
    columns = (("weights", 14), ("MB", 8), ("seconds", 15), ("products", 10), ("MB more", 9), ("share", 8))
    columns += (("sampled s", 11), ("MB more", 9))
    print(" " * 14 + "".join(f"{title:>{width}}" for title, width in columns))
    points = []
    for name in SHAPES:
        runs = [in_a_process(measure, name) for _ in range(REPEATS)]
        fastest, products, weights, size, _ = min(runs)
        slowest, more = max(run[0] for run in runs), max(run[4] for run in runs)
        points.append((math.log(weights), math.log(fastest / products)))
        seconds = f"{fastest:.2f} to {slowest:.2f}"
        sampled = "{:>11.1f}{:>9.0f}".format(*in_a_process(measure_sampled, name))
        print(
            f"{name:<14}{weights:>14,}{size:>8.0f}{seconds:>15}{products:>10}{more:>9.0f}{100 * more / size:>7.1f} %"
            + sampled,
            flush=True,
        )
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    print(f"seconds per product grow as weights to the power {slope:.2f}")


if __name__ == "__main__":
    main()
