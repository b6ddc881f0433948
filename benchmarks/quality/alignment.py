"""Observation 3 of arXiv 2311.13600: do LoRAs whose columns are aligned spoil each other when they are added up?

python -m benchmarks.quality.alignment        writes benchmarks/results/alignment.json, from the main table's cells
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np

from benchmarks.quality import pairs
from benchmarks.quality.measures import share
from benchmarks.quality.run import path
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.analysis import Overlap, overlap, stacked

RESULT = Path(__file__).parents[1] / "results" / "alignment.json"
LORA_SEED = 0


def met(pair: pairs.Pair, regime: str) -> Overlap:
    """How the pair's two LoRAs meet, over all layers that both have."""
    loras = [read(file) for file in pairs.files(pair, regime, LORA_SEED)]
    shared = loras[0].deltas.keys() & loras[1].deltas.keys()
    return sum((overlap(stacked(loras, key).column_grams()) for key in shared), Overlap())


def cells(row: str, regime: str) -> list[dict]:
    return [json.loads(path(row, regime, pair, LORA_SEED).read_text()) for pair in pairs.pairs()]


def measured(regime: str) -> dict:
    found = [met(pair, regime) for pair in pairs.pairs()]
    summed = [share(cell["measures"]["joint/0"]) for cell in cells("sum", regime)]
    result = {}
    for name in ("column_cosine", "interference"):
        values = [getattr(each, name) for each in found]
        result[name] = {
            "mean": round(statistics.mean(values), 4),
            "range": [round(min(values), 4), round(max(values), 4)],
            "correlation with the plain sum's joint success": round(float(np.corrcoef(values, summed)[0, 1]), 3),
        }
    result["overlap after, over before"] = {
        row: round(statistics.mean(cell["facts"]["overlap"] for cell in cells(row, regime)), 3)
        for row in ("ziplora", "paper", "regmean", "ssr")
    }
    return result


def main() -> None:
    result = {regime: measured(regime) for regime in pairs.REGIMES}
    RESULT.write_text(json.dumps({"miniature": pairs.weights_hash(), **result}, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
