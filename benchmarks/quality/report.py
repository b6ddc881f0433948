"""From the cells to what is shown: one JSON of results, the README's table and a figure.

python -m benchmarks.quality.report [--table main|ablations|validation]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from benchmarks.quality import pairs
from benchmarks.quality.ablations import ABLATIONS
from benchmarks.quality.measures import BALANCES, chosen, share
from benchmarks.quality.rows import ROWS
from benchmarks.quality.run import TABLES, done, path
from ziplora_lib.bootstrap import interval

BOTH = "both"
LORA_SEEDS = 9  # more than anyone trains
RESULTS = Path(__file__).parents[1] / "results"
README, BENCHMARKS = Path(__file__).parents[2] / "README.md", Path(__file__).parents[1] / "README.md"


def kept_both(cell: dict) -> float:
    """The harmonic mean of subject kept and style kept, on the joint prompt."""
    subject, style = share(cell["measures"]["subject/0"]), share(cell["measures"]["style/0"])
    return 2 * subject * style / (subject + style) if subject + style else 0.0


def of(name: str) -> Callable[[dict], float]:
    return lambda cell: share(cell["measures"][name])


MEASURES: dict[str, Callable[[dict], float]] = {
    "joint": of("joint/0"),
    "joint, chosen balance": lambda cell: chosen(cell["measures"]),
    "joint, chosen among its and the plain sum's": lambda cell: chosen(cell["measures"], cell["plain sum"]["measures"]),
    "subject in joint": of("subject/0"),
    "style in joint": of("style/0"),
    "harmonic mean": kept_both,
    **{f"joint at balance {b:g}": of(f"joint/{b:g}") for b in BALANCES},
    "joint, guidance 1": of("joint free"),
    "joint, guidance 5": of("joint pushed"),
    "own subject": of("own subject"),
    "own style": of("own style"),
    "new context": of("context"),
    "error, subject": lambda cell: cell["facts"]["error"][0],
    "error, style": lambda cell: cell["facts"]["error"][1],
    "retained": lambda cell: cell["facts"]["retained"],
    "peak MB": lambda cell: cell["facts"]["peak MB"],
}


# validation: all rows, on the pairs that settings are chosen by
SHOWN_TABLES = {**TABLES, "validation": {**ROWS, **ABLATIONS}}


# rows of LoRAs at other strengths are compared with their own plain sum
OWN_BASE = {"weak-style": "weak-style-sum", "weak-subject": "weak-subject-sum"}


def cells(table: str, regime: str, seeds: int) -> dict[str, dict[tuple, list[dict]]]:
    """By row, by pair: a cell a LoRA seed, each with that of the plain sum. BOTH: those of both regimes."""
    if regime == BOTH:
        one, other = (cells(table, regime, seeds) for regime in pairs.REGIMES)
        return {
            name: {pair: one[name][pair] + other[name][pair] for pair in common}
            for name in one
            if name in other and (common := [pair for pair in one[name] if pair in other[name]])
        }
    found: dict[str, dict[tuple, list[dict]]] = {}
    for name, row in SHOWN_TABLES[table].items():
        by_pair = {}
        for pair in pairs.validation_pairs() if table == "validation" else pairs.pairs():
            here = []
            for seed in range(LORA_SEEDS):
                if done(name, row, regime, pair, seed, seeds):
                    cell = json.loads(path(name, regime, pair, seed).read_text())
                    if done("sum", ROWS["sum"], regime, pair, seed, len(cell["measures"]["joint free"])):
                        cell["plain sum"] = json.loads(path("sum", regime, pair, seed).read_text())
                    here.append(cell)
            if here:
                by_pair[pair] = here
        if by_pair:
            found[name] = by_pair
    return found


def measured(by_pair: dict[tuple, list[dict]], measure: Callable[[dict], float]) -> dict[tuple, float]:
    """The measure's mean over LoRA seeds, by pair; without the cells that have no such thing."""

    def of_cells(here: list[dict]) -> Iterator[float]:
        for cell in here:
            with suppress(KeyError):
                yield measure(cell)

    means = {pair: list(of_cells(here)) for pair, here in by_pair.items()}
    return {pair: statistics.mean(values) for pair, values in means.items() if values}


def _of_same_loras(by_pair: dict[tuple, list[dict]], others: dict[tuple, list[dict]]) -> dict[tuple, list[dict]]:
    """The cells whose LoRAs and noise seeds the other row has too: only what differs in nothing else is compared."""

    def drawn(cell: dict) -> tuple:
        return cell["regime"], cell["lora seed"], len(cell["measures"]["joint free"])

    same = {}
    for pair, here in by_pair.items():
        asked = set(map(drawn, others.get(pair, [])))
        if kept := [cell for cell in here if drawn(cell) in asked]:
            same[pair] = kept
    return same


def results(table: str, regime: str, seeds: int, against: str = "sum") -> dict:
    """By row, by measure: the mean over pairs, and the paired difference to the row `against` with its interval."""
    found, summary = cells(table, regime, seeds), {}
    for name, by_pair in found.items():
        summary[name] = {"title": SHOWN_TABLES[table][name].title, "pairs": len(by_pair)}
        summary[name]["LoRA seeds"] = min(len({cell["lora seed"] for cell in here}) for here in by_pair.values())
        shown = [len(cell["measures"]["joint free"]) for here in by_pair.values() for cell in here]
        summary[name]["pictures"] = min(shown)
        for title, measure in MEASURES.items():
            values = measured(by_pair, measure)
            if not values:
                continue
            summary[name][title] = {"mean": round(statistics.mean(values.values()), 4)}
            other = found.get(OWN_BASE.get(name, against), {})
            mine, base = (
                measured(_of_same_loras(one, two), measure) for one, two in ((by_pair, other), (other, by_pair))
            )
            common = [pair for pair in mine if pair in base]
            if name != against and len(common) > 1:
                low, high = interval([mine[pair] - base[pair] for pair in common])
                difference = statistics.mean(mine[pair] - base[pair] for pair in common)
                summary[name][title] |= {
                    "difference": round(difference, 4),
                    "interval": [round(low, 4), round(high, 4)],
                }
    return summary


def markdown(summary: dict, columns: Sequence[str]) -> str:
    """A table: means, and in brackets the interval of the difference to the plain sum."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in summary.values():
        entries = []
        for column in columns:
            entry = row.get(column)
            text = "" if entry is None else _short(f"{entry['mean']:.2f}")
            if entry and "interval" in entry:
                text += " ({}, {})".format(*(_short(f"{v:+.2f}") for v in entry["interval"]))
            entries.append(text)
        lines.append(f"| {row['title']} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _short(number: str) -> str:
    return re.sub(r"^([+-]?)0\.", r"\1.", number)


# what the README shows of each regime: of these measures, and how they are called there
SHOWN = {
    "joint": "joint success",
    "joint, chosen balance": "at the chosen balance",
    "joint, guidance 5": "at guidance 5",
    "own subject": "subject kept",
    "own style": "style kept",
    "new context": "new context",
}
TITLES = {
    "strong": "Strong, overtrained LoRAs",
    "light": "Lightly trained LoRAs",
    "text": "Lightly trained, text encoders too",
}
# of the ablations
CHANGED = {
    "joint": "joint success",
    "joint, guidance 5": "at guidance 5",
    "own subject": "subject kept",
    "own style": "style kept",
    "error, subject": "error, subject",
    "error, style": "error, style",
}
MARK = "<!-- quality -->", "<!-- /quality -->"
# where a table stands, and its columns
PLACES = {"main": (README, SHOWN), "ablations": (BENCHMARKS, CHANGED)}
NOT_RUN = "*Not run yet.*"


def readme_tables(saved: dict, columns: dict[str, str]) -> str:
    """The regimes' tables, as they stand in a README. columns: measures, and how they are called there."""
    parts = []
    for regime, title in TITLES.items():
        if regime not in saved:
            continue
        rate, steps = saved["made"]["regimes"][regime]
        most = {what: max(row[what] for row in saved[regime].values()) for what in ("pairs", "LoRA seeds", "pictures")}
        how = f"rate {rate:g}, {steps} steps; pairs: {most['pairs']}, LoRA seeds: {most['LoRA seeds']}"
        how += f", noise seeds: {most['pictures']}"
        renamed = {}
        for name, row in saved[regime].items():
            fewer = f", {row['pairs']} pairs" if row["pairs"] < most["pairs"] else ""
            renamed[name] = {"title": row["title"] + fewer, **{columns[k]: v for k, v in row.items() if k in columns}}
        parts.append(f"**{title}** ({how})\n\n{markdown(renamed, list(columns.values()))}")
    return "\n\n".join(parts)


def in_readme(file: Path) -> str:
    """What stands between the marks."""
    return file.read_text().split(MARK[0])[1].split(MARK[1])[0].strip()


def into_readme(file: Path, text: str) -> None:
    """Replaces what stands between the marks."""
    before, rest = file.read_text().split(MARK[0])
    file.write_text(f"{before}{MARK[0]}\n{text}\n{MARK[1]}{rest.split(MARK[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=SHOWN_TABLES, default="main")
    parser.add_argument("--seeds", type=int, default=8, help="pictures that a cell needs at least to be counted")
    parser.add_argument("--against", default="sum", help="the row that differences are taken to")
    args = parser.parse_args()
    summary = {
        regime: results(args.table, regime, args.seeds, args.against) for regime in [*pairs.REGIMES, BOTH, *pairs.TEXT]
    }
    summary = {regime: found for regime, found in summary.items() if found}
    packages = ("torch", "diffusers", "peft", "safetensors", "numpy")
    made = {
        "miniature": pairs.weights_hash(),
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, CPU",
        "regimes": pairs.REGIMES | pairs.TEXT,
        "seeds at least": args.seeds,
    }
    result = RESULTS / f"quality-{args.table}.json"
    result.write_text(json.dumps({"made": made, **summary}, indent=1) + "\n")
    if args.table in PLACES:
        file, columns = PLACES[args.table]
        into_readme(file, readme_tables({"made": made, **summary}, columns))
    for regime, rows_ in summary.items():
        print(f"\n{regime}\n{markdown(rows_, list(MEASURES))}")


if __name__ == "__main__":
    main()
