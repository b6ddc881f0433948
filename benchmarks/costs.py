"""What a merge costs, as the README shows it: its table, made from the results of speed.py, startup.py and tab.py.

python -m benchmarks.costs        puts the table into the README
"""

from __future__ import annotations

import json
from pathlib import Path

from ziplora_lib.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- costs -->\n", "<!-- /costs -->"
# as by default: pairs of samples, the held-out ones too, and steps
DEFAULT = Recipe.__fields__
PAIRS, STEPS = DEFAULT["samples"].default * 9 // 8, DEFAULT["steps"].default
SHOWN = {"tiny": "a small UNet of SDXL's structure", "slice": "SDXL's true widths, one block where it has up to ten"}


def table() -> str:
    """The block between the marks."""
    rows = ["| | dense | ours | of dense |", "|---|---|---|---|"]
    for name, what in SHOWN.items():
        found = json.loads((RESULTS / f"speed-{name}.json").read_text("utf-8"))
        step, memory = found["seconds a step"], found["LoRAs in memory, MB"]
        peak, part = found["peak, MB"], found["of dense's memory"]
        taught = step["ours"] + PAIRS / STEPS * found["calibration, seconds a pair of samples"]
        where = f"{what}, {found['pixels']} pixels, rank {found['rank']} + {found['rank']}"
        dense = f"{step['dense']:.2f} s"
        rows += [
            f"| **{where}** | | | |",
            f"| a step | {dense} | {step['ours']:.2f} s | {found['of dense']:.2f} |",
            f"| a step, with its share of the calibration | {dense} | {taught:.2f} s | {taught / step['dense']:.2f} |",
            f"| the LoRAs in memory | {memory['dense']:.0f} MB | {memory['ours']:.0f} MB | {part:.2f} |",
            f"| peak, model included | {peak['dense']:.0f} MB | {peak['ours']:.0f} MB | {peak['ours'] / peak['dense']:.2f} |",
        ]
        over = ", ".join(f"{one['over bare']['all LoRAs']:.2f} ({one['rows']})" for one in found["attached"])
        rows.append(f"| a forward with both LoRAs, over the bare model's (rows) | | {over} | |")
    made = found["made"]
    startup = json.loads((RESULTS / "startup.json").read_text("utf-8"))
    tab = json.loads((RESULTS / "tab.json").read_text("utf-8"))["seconds"]
    few, many = "10 files", "1000 files"
    told = "; ".join(f"{what} {row[few]:.2f} / {row[many]:.2f} s" for what, row in tab.items())
    on = f"{made['machine']}, {made['threads']} threads, torch {made['torch']}, {made['dtype']}"
    how = "both samples of a step in one pass, no guidance, nothing computed again"
    share = f"the calibration's share as by default, {PAIRS} pairs of samples for {STEPS} steps"
    starts = f"{startup['starts of each']} starts with and without in turn, from the first script on, medians"
    cores = startup["machine"]["cores"]
    return (
        "\n".join(rows)
        + f"\n\n({on}; {how}; {share}.)\n\n"
        + f"The WebUI starts {startup['later by']:.2f} s later with the extension ({starts}). "
        + f"With 10 and with 1,000 SDXL LoRAs of rank 32 in the folder, on {cores} cores: {told}.\n"
    )


def main() -> None:
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
