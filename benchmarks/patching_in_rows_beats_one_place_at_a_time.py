"""Claim: patching many places as rows of a batch that ends at the metric beats TransformerLens's loop by far."""

import time
import warnings

import torch
from transformer_lens import patching

from sd_lens import load_model, patch
from sd_lens.models.hooks import hooked

CLEAN, CORRUPTED = "The man went to the sea.", "The man went to a sea."
LAYER, POSITION = 2, 4

warnings.filterwarnings("ignore")


def main():
    model = load_model("smollm2-135m")
    tokens = [model.to_tokens(text, prepend_bos=False) for text in (CLEAN, CORRUPTED)]
    stream = {}

    def ours():
        found = patch(
            model, CLEAN, CORRUPTED, sites=["mlp_out"], layer=LAYER, position=POSITION, progress=False
        )  # fmt: skip
        return torch.tensor(found.table.value.to_numpy()).reshape(LAYER + 1, -1)

    def library():
        watch = {f"blocks.{LAYER}.hook_resid_post": lambda x: stream.__setitem__("now", x)}
        with torch.no_grad(), hooked(model, watch):
            clean = model.run_with_cache(tokens[0])[1]
            return patching.get_act_patch_mlp_out(model, tokens[1], clean, lambda _: stream["now"][0, POSITION].norm())

    seconds, values = {}, {}
    for name, run in (("sd_lens.patch", ours), ("transformer_lens.patching", library)):
        start = time.perf_counter()
        values[name] = run()
        seconds[name] = time.perf_counter() - start
        print(f"{name:<28}{values[name].numel():>5} places{seconds[name]:>9.2f} s")
    mine, theirs = values.values()
    reachable = theirs[: LAYER + 1, : POSITION + 1]
    print(f"largest difference where the metric can be reached: {float((mine - reachable).abs().max()):.1e}")
    print(f"ratio {seconds['transformer_lens.patching'] / seconds['sd_lens.patch']:.0f}")


if __name__ == "__main__":
    main()
