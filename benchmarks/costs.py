"""What a merge costs, as the README shows it: its tables, made from the results of the benchmarks of cost.

python -m benchmarks.costs        puts them into the README
"""

from __future__ import annotations

import json
from pathlib import Path

from ziplora_lib.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- costs -->\n", "<!-- /costs -->"
# as by default: pairs of samples that are asked of the LoRAs before the steps, the held-out ones too, and steps
DEFAULT = Recipe.__fields__
STEPS = DEFAULT["steps"].default
PAIRS = min(DEFAULT["samples"].default, STEPS) + DEFAULT["samples"].default // 8
SHOWN = {"tiny": "a small UNet of SDXL's structure", "slice": "SDXL's true widths, one block where it has up to ten"}
# dense fp16 products added up in fp32, operations a second, by the makers' data sheets
CARDS = {"H200": 989e12, "RTX 4090": 165e12}
SHARE = 0.4


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def table() -> str:
    """The block between the marks."""
    return "\n".join([beside_dense(), beside_bare(), full_size(), around()])


def beside_dense() -> str:
    rows = ["| | dense | ours | of dense |", "|---|---|---|---|"]
    for name, what in SHOWN.items():
        found = result(f"speed-{name}")
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
    on = f"{made['machine']}, {made['threads']} threads, torch {made['torch']}, {made['dtype']}"
    how = "both samples of a step in one pass, no guidance, nothing computed again"
    share = f"the calibration's share as by default, {PAIRS} pairs of samples for {STEPS} steps"
    return "\n".join(rows) + f"\n\n({on}; {how}; {share}.)\n"


def beside_bare() -> str:
    """What learning adds to a forward and a backward of the model alone, here and in the WebUI; where the time goes."""
    sweep, webui = result("sweep"), result("in-webui")
    slices = ", ".join(
        f"{point['a step over the bare model']:.2f} at rank {point['rank']}" for point in sweep["sweeps"]["rank, slice"]
    )
    shares = sweep["profile"]["shares"]
    where = ", ".join(
        f"{name} {share:.2f}" for name, share in sorted(shares.items(), key=lambda x: -x[1]) if share > 0.005
    )
    beside, jobs = webui["beside the bare model"], webui["after jobs"]
    over, grown = beside["over the bare steps"]["processor"], jobs["growth a job, from the second on"]
    return (
        "**Beside the bare model**, a forward and a backward of as many rows: a step takes "
        f"{slices} at SDXL's widths, a tenth more or less from run to run; how that goes with rank, size, steps and LoRAs "
        "is in the figure. "
        f"Of a step's time there: {where}.\n\n"
        "![Seconds of a step over rank, pictures' size, steps and number of LoRAs](docs/cost.png)\n\n"
        f"**In the WebUI**, the miniature at {beside['pixels']} pixels, {beside['steps']} steps beside as many of the bare "
        f"model in the same process, seconds of one processor, medians of {beside['times']} in turn: the steps take "
        f"{over['merge: steps alone']['median']:.2f} times as long, with the warm start and the looks at held-out samples "
        f"{over['merge']['median']:.2f}, the whole job, with thirteen pictures and what the LoRAs say of the samples, "
        f"{over['whole job']['median']:.2f}. After {jobs['jobs']} jobs as many tensors and hooks are there as after the "
        f"first, and a job leaves {grown['resident, trimmed']:.1f} MB with the process.\n"
    )


def full_size() -> str:
    """SDXL at 1024 pixels, counted."""
    found = result("footprint")
    guided, operations, merges = found["guided"], found["operations"], found["merges"]
    there, one, both = guided["weights"] + guided["LoRAs"], guided["whole"], found["both samples"]["whole"]
    ways = {
        "fast, both samples of a step in one pass": there + both["fast"],
        "fast, one sample": there + one["fast"],
        "checkpointing, both samples": there + both["checkpointing"],
        "checkpointing, one sample": there + one["checkpointing"],
        "offload, one sample": there + one["checkpointing"] - guided["weights that offload takes away"],
    }
    memory = ["| SDXL, 1024 pixels, rank 64 + 64, fp16, under guidance | GB |", "|---|---|"]
    memory += [f"| {name} | {size / 1e9:.1f} |" for name, size in ways.items()]
    time = [f"| | rows | PFLOP | {' | '.join(f'{card}: s, pairs an hour, 100 × 100' for card in CARDS)} |"]
    time.append("|---" * (3 + len(CARDS)) + "|")
    for name, merge in merges.items():
        cells = []
        for rate in CARDS.values():
            seconds = merge["operations"] / (rate * SHARE)
            cells.append(f"{seconds:.0f} s, {3600 / seconds:.0f}, {1e4 * seconds / 3600:.0f} h")
        time.append(f"| {name} | {merge['rows']} | {merge['operations'] / 1e15:.1f} | {' | '.join(cells)} |")
    forward, with_both, step = (operations[name] / 1e12 for name in operations)
    everywhere = found["operations, all matrices of the transformers"]["both LoRAs, forward"] / 1e12
    return (
        "**At SDXL's full size: counted, not measured** (`footprint.json`). What lies on the card "
        "while steps run, attention by fused kernels; work space comes on top, text encoders and VAE are away:\n\n"
        + "\n".join(memory)
        + f"\n\nA forward of one row is {forward:.2f} TFLOP, with both LoRAs on the attention {with_both:.2f} "
        f"({with_both / forward:.2f} times as much; on all matrices of the transformers {everywhere / forward:.2f}), "
        f"with its backward {step:.1f}. "
        "Whole merges by that, pictures before and after included, on cards that would reach "
        f"{SHARE:.0%} of what their makers state ({', '.join(f'{c} {r / 1e12:.0f} TFLOP/s' for c, r in CARDS.items())}), "
        "which is an assumption:\n\n" + "\n".join(time) + "\n"
    )


def around() -> str:
    """Saving, the WebUI's start, and the tab."""
    saving, startup, tab = result("saving"), result("startup"), result("tab")["seconds"]
    seconds, peak = saving["seconds"], saving["peak over what was there, MB"]["write"]
    few, many = "10 files", "1000 files"
    told = "; ".join(f"{what} {row[few]:.2f} / {row[many]:.2f} s" for what, row in tab.items())
    starts = f"{startup['starts of each']} starts with and without in turn, from the first script on, medians"
    cores = startup["machine"]["cores"]
    return (
        f"**Around it.** A merged LoRA of {saving['MB']:.0f} MB is cast, hashed, written, synced, read back and compared in "
        f"{seconds['write']['median']:.1f} s, with {peak:.0f} MB of memory on top; the bytes alone take "
        f"{seconds['the bytes alone, synced']['median']:.1f} s. Reading one with all checks takes "
        f"{seconds['read']['median']:.1f} s.\n"
        f"The WebUI starts {startup['later by']:.2f} s later with the extension ({starts}). "
        f"With 10 and with 1,000 SDXL LoRAs of rank 32 in the folder, on {cores} cores: {told}.\n"
    )


def main() -> None:
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
