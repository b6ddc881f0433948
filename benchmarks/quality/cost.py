"""What the learned and solved methods cost, side by side: seconds and memory of the same pairs in one run.

python -m benchmarks.quality.cost        writes benchmarks/results/cost.json
"""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path

import torch

from benchmarks.quality import pairs, rows
from ziplora_lib.hosts.diffusers import DiffusersHost

RESULT = Path(__file__).parents[1] / "results" / "cost.json"
ROWS = ("ziplora", "cold", "paper", "regmean", "ssr")
PAIRS = 2


def main() -> None:
    torch.set_num_threads(1)
    host = DiffusersHost("miniature", device="cpu")
    found: dict[str, list[dict]] = {name: [] for name in ROWS}
    for pair in pairs.pairs()[:PAIRS]:
        for regime in pairs.REGIMES:
            for name in ROWS:
                # opened anew for each, or the later ones would find the samples made
                with rows.opened(host, pair, regime, 0) as on:
                    row = rows.ROWS[name]
                    with row.make(on, **row.fields) as shown:
                        found[name].append(shown.facts)
    result = {
        name: {
            "calibrate s": round(statistics.mean(facts["calibrate s"] for facts in all_facts), 2),
            "merge s": round(statistics.mean(facts["merge s"] for facts in all_facts), 2),
            "peak MB": round(max(facts["peak MB"] for facts in all_facts), 1),
        }
        for name, all_facts in found.items()
    }
    made = {"machine": f"{platform.machine()}, one CPU core", "torch": torch.__version__, "pairs": PAIRS}
    RESULT.write_text(json.dumps({"made": made, "rows": result}, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
