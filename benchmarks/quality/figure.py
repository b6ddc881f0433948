"""A figure of the main table: joint success of every row against the plain sum, in each regime and in both.

python -m benchmarks.quality.figure        draws docs/quality.png from benchmarks/results/quality-main.json
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.quality.pairs import REGIMES
from benchmarks.quality.report import BOTH, RESULTS, TITLES

FIGURE = Path(__file__).parents[2] / "docs" / "quality.png"
SHOWN = {"joint": ("as merged", "o"), "joint, chosen balance": ("at the chosen balance", "D")}
PANELS = {**{name: title for name, title in TITLES.items() if name in REGIMES}, BOTH: "Both together"}


def main() -> None:
    saved = json.loads((RESULTS / "quality-main.json").read_text())
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, len(PANELS), figsize=(14, 4.6), sharex=True, layout="constrained")
    for panel, (regime, title) in zip(panels, PANELS.items()):
        rows = [row for row in saved[regime].values() if "difference" in row.get("joint", {})]
        for k, (measure, (label, marker)) in enumerate(SHOWN.items()):
            shown = [(i, row[measure]) for i, row in enumerate(rows) if "difference" in row.get(measure, {})]
            at = [i + 0.15 - 0.3 * k for i, _ in shown]
            middle = [entry["difference"] for _, entry in shown]
            sides = [[abs(entry["interval"][end] - entry["difference"]) for _, entry in shown] for end in (0, 1)]
            panel.errorbar(middle, at, xerr=sides, fmt=marker, markersize=4, linewidth=1, capsize=2, label=label)
        names = [row["title"].replace("*", "").replace("`", "") for row in rows]
        panel.set_yticks(range(len(rows)), names)
        panel.invert_yaxis()
        panel.axvline(0, color="0.6", linewidth=0.8)
        panel.set_title(f"{title}\nplain sum: {saved[regime]['sum']['joint']['mean']:.2f}", fontsize=9)
    figure.supxlabel("joint success minus the plain sum's, 95 % over pairs", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=2)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
