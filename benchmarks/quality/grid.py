"""The strongest baseline without learning: the fixed strengths (w_c, w_s) that serve four validation pairs best.

python -m benchmarks.quality.grid        writes benchmarks/results/grid.json
"""

from __future__ import annotations

import json
import statistics
from itertools import product
from pathlib import Path

import torch

from benchmarks import sampling
from benchmarks.judge import verdicts
from benchmarks.quality import pairs, rows
from benchmarks.quality.measures import GUIDANCE
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.samples import joint_prompt

RESULT = Path(__file__).parents[1] / "results" / "grid.json"
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
SEEDS = range(12)
PAIRS = 4


def main() -> None:
    torch.set_num_threads(1)
    host = DiffusersHost("miniature", device="cpu")
    result = {}
    for regime in pairs.REGIMES:
        found: dict[tuple[float, float], list[float]] = {point: [] for point in product(STRENGTHS, STRENGTHS)}
        for pair in pairs.validation_pairs()[:PAIRS]:
            with rows.opened(host, pair, regime, 0) as on, rows.in_weights(on, rows.by_parent(on.pairing.stacks)) as at:
                for point, shares in found.items():
                    at(point)
                    seen = verdicts(sampling.pictures(host, joint_prompt(pair.shown[0]), SEEDS, GUIDANCE), *pair.shown)
                    shares.append(float((seen["subject"] & seen["style"]).float().mean()))
        means = {point: statistics.mean(shares) for point, shares in found.items()}
        # of equals the one nearest to the plain sum
        best = max(means, key=lambda point: (means[point], -abs(point[0] - 1) - abs(point[1] - 1)))
        result[regime] = {"best": best, "joint": {f"{c:g}, {s:g}": round(v, 3) for (c, s), v in means.items()}}
        print(regime, best, means[best], means[1.0, 1.0], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
