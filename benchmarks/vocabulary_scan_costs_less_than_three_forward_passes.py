"""Both scans of the whole vocabulary, against one bare forward pass of it through the same blocks."""

import time

import torch

from sd_lens import explosion_path, load_model

LAYER = 2


def main() -> None:
    model = load_model("smollm2-135m")
    ids = torch.arange(model.cfg.d_vocab)
    explosion_path(model, LAYER, 300.0, token_ids=ids[:2048], progress=False)  # warm up

    start = time.perf_counter()
    with torch.no_grad():
        for part in ids[:, None].split(2048):
            model(part, stop_at_layer=LAYER + 1, return_type=None)
    bare = time.perf_counter() - start

    start = time.perf_counter()
    path = explosion_path(model, LAYER, 300.0, n_random=1, progress=False)
    scans = time.perf_counter() - start

    print(path)
    print(f"| one bare forward pass, {len(ids):,} one-token texts, blocks 0 to {LAYER} | {bare:.1f} s |")
    print(f"| both scans (with and without attention), with embedding norms and table | {scans:.1f} s |")
    print(f"| ratio | {scans / bare:.2f} |")


if __name__ == "__main__":
    main()
