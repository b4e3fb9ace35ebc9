"""Claim: the closed form is the infinite-sample limit of the paper's estimator.

On one block of SmolLM2 the distance between the sampled F and the closed form is measured for 10,000,
100,000 and 1,000,000 samples, three seeds each. It must fall as 1/sqrt(n): by 3.16 for each step, without a
floor. The same for the singular direction of L.
"""

import argparse
import math
import warnings

import torch

from sd_lens import load_model
from sd_lens.linear.angles import acute_angles
from sd_lens.linear.approximations import attention_map, block_map, ffn_map
from sd_lens.linear.spectra import leading_triples
from sd_lens.models.blocks import block_weights

warnings.filterwarnings("ignore")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=int, default=11)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    model = load_model("smollm2-135m")
    block = block_weights(model, options.layer)
    A, closed = attention_map(block), ffn_map(block)
    F, direction = closed.dense(), leading_triples(block_map(A, closed), tol=1e-6).left[:, 0]
    print(f"block {options.layer} of SmolLM2-135M, {options.seeds} seeds; |F_n - F| / |F| in the Frobenius norm")
    print(f"{'n':>10}{'distance':>12}{'x sqrt(n)':>12}{'angle of u1':>14}{'x sqrt(n)':>12}")
    points = []
    for n in options.samples:
        distances, angles = [], []
        for seed in range(options.seeds):
            sampled = ffn_map(block, "sampled", n_samples=n, seed=seed)
            distances.append(float((sampled.dense() - F).norm() / F.norm()))
            left = leading_triples(block_map(A, sampled), tol=1e-6).left
            angles.append(acute_angles(left.mT, direction).item())
        distance, angle = sum(distances) / len(distances), sum(angles) / len(angles)
        points.append((math.log(n), math.log(distance), math.log(angle)))
        print(f"{n:>10,}{distance:>12.5f}{distance * n**0.5:>12.2f}{angle:>12.3f} deg{angle * n**0.5:>10.1f}")
    x, *ys = torch.tensor(points, dtype=torch.float64).T
    for name, y in zip(("distance", "angle"), ys, strict=True):
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        print(f"fitted exponent of the {name}: {slope:.3f} (1/sqrt(n) is -0.5)")


if __name__ == "__main__":
    main()
