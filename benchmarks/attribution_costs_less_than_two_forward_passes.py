"""Claim: attribution takes less than twice the time and memory of the forward pass that it needs."""

import multiprocessing
import resource
import time
from functools import partial

import torch

from sd_lens import attribute, attribute_corpus, default_texts, load_model
from sd_lens.models.hooks import run_with_hooks
from sd_lens.observations.texts import batches

LAYER = 29


def forward(model, texts):
    for batch in batches(model, texts, batch_tokens=1024, progress=False):
        run_with_hooks(model, batch.tokens, {f"blocks.{LAYER}.hook_resid_post": lambda x: None})


def stacked(model, texts):
    """What attribution avoids: all head outputs at once, as `ActivationCache.stack_head_results` forms them."""
    W_O = [block.attn.W_O.detach() for block in model.blocks]
    for batch in batches(model, texts, batch_tokens=1024, progress=False):
        results = {}

        def keep(layer, z, results=results):
            results[layer] = torch.einsum("bphe,hed->bphd", z, W_O[layer])

        points = {f"blocks.{layer}.attn.hook_z": partial(keep, layer) for layer in range(LAYER + 1)}
        run_with_hooks(model, batch.tokens, points)


CASES = {
    "forward pass to block 29": forward,
    "attribution of every token": lambda model, texts: attribute_corpus(model, texts, LAYER, None, progress=False),
    "attribution of the initial tokens": lambda model, texts: attribute_corpus(model, texts, LAYER, progress=False),
    "every head's output [batch, pos, head, d_model]": stacked,
}
ONE_TEXT = {
    "one text, forward pass to block 29": lambda model, texts: forward(model, texts[:1]),
    "one text, its last token attributed": lambda model, texts: attribute(model, texts[0], -1, LAYER),
}


def measure(name, queue):
    """Median seconds of three runs, and megabytes of peak memory above the loaded model's, in a fresh process."""
    run = (CASES | ONE_TEXT)[name]
    model, texts = load_model("smollm2-135m"), default_texts()
    forward(model, texts[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            run(model, texts)
        seconds.append(time.perf_counter() - start)
    queue.put((sorted(seconds)[1], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, before / 1024))


def main():
    context = multiprocessing.get_context("spawn")
    print(f"SmolLM2-135M, 40 default passages, {torch.get_num_threads()} threads")
    print(f"{'':<50}{'seconds':>9}{'ratio':>7}{'MB above loaded':>17}{'peak, ratio':>13}")
    for cases in (CASES, ONE_TEXT):
        bare = None
        for name in cases:
            queue = context.Queue()
            process = context.Process(target=measure, args=(name, queue))
            process.start()
            seconds, above, loaded = queue.get()
            process.join()
            bare = bare or (seconds, above + loaded)
            print(
                f"{name:<50}{seconds:>9.2f}{seconds / bare[0]:>7.2f}{above:>17.0f}{(above + loaded) / bare[1]:>13.2f}"
            )


if __name__ == "__main__":
    main()
