"""What a merge costs, as the README shows it: its table, made from the results of speed.py, startup.py and tab.py.

python -m benchmarks.costs        puts the table into the README
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- costs -->\n", "<!-- /costs -->"
SHOWN = {"tiny": "a small UNet of SDXL's structure", "slice": "SDXL's true widths, one block where it has up to ten"}


def table() -> str:
    """The block between the marks."""
    rows = ["| | dense | ours | of dense |", "|---|---|---|---|"]
    for name, what in SHOWN.items():
        found = json.loads((RESULTS / f"speed-{name}.json").read_text("utf-8"))
        step, of, memory = (found[key] for key in ("seconds a step", "of dense", "LoRAs in memory, MB"))
        peak, taught, part = found["peak, MB"], "ours, with its teachers", found["of dense's memory"]
        where = f"{what}, {found['pixels']} pixels, rank {found['rank']} + {found['rank']}"
        dense = f"{step['dense']:.2f} s"
        rows += [
            f"| **{where}** | | | |",
            f"| a step | {dense} | {step['ours']:.2f} s | {of['ours']:.2f} |",
            f"| a step, with its share of the calibration | {dense} | {step[taught]:.2f} s | {of[taught]:.2f} |",
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
    return (
        "\n".join(rows)
        + f"\n\n({made['machine']}, {made['threads']} threads, torch {made['torch']}, {made['dtype']}.)\n\n"
        + f"The WebUI starts {startup['later by']:.2f} s later with the extension ({startup['starts of each']} starts with "
        + "and without in turn, from the first script on, medians). With 10 and with 1,000 SDXL LoRAs of rank 32 in "
        + f"the folder, on {startup['machine']['cores']} cores: {told}.\n"
    )


def main() -> None:
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
