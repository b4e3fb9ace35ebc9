"""Claim: finding high-norm tokens costs hardly more time than running the model on the texts."""

import time
import warnings

import torch

from sd_lens import default_texts, find_high_norm_tokens, load_model
from sd_lens.observations.texts import batches

warnings.filterwarnings("ignore")


def main():
    model = load_model("smollm2-135m")
    texts = default_texts()

    def forward():
        with torch.no_grad():
            for batch in batches(model, texts, progress=False):
                model(batch.tokens, return_type=None)

    def observed():
        find_high_norm_tokens(model, texts, progress=False)

    print(f"{type(model).__name__}, 40 default passages, {torch.get_num_threads()} threads; median of 3")
    medians = {}
    for name, run in (("bare forward pass, logits included", forward), ("find_high_norm_tokens", observed)):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        medians[name] = sorted(seconds)[1]
        print(f"{name:<38}{medians[name]:>8.2f} s")
    bare, found = medians.values()
    print(f"ratio {found / bare:.2f}")


if __name__ == "__main__":
    main()
