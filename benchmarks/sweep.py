"""What a merge costs as rank, resolution, steps or the number of LoRAs grow; and where the time of a step goes.

UNets of SDXL's structure with random weights, LoRAs with random factors on all matrices of the transformers, the default
recipe but for what is swept, with few samples and steps. Beside each step stands a forward and a backward of the bare model
with as many rows, at the same size: what no way of learning through the model goes without.

python -m benchmarks.sweep [--profile] [--device cuda --dtype bf16]    writes benchmarks/results/sweep.json and docs/cost.png;
                                                                       --profile: where the time of a step goes, alone
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.scale import RandomModel, random_pair, unet
from benchmarks.speed import DTYPES, MATRICES, RESULTS, SIZES, Peak, rounded
from ziplora_lib.calibration import calibrated
from ziplora_lib.job import settings_of
from ziplora_lib.merge import attach as attaching
from ziplora_lib.merge.methods import METHODS
from ziplora_lib.merge.ziplora import _ByColumn
from ziplora_lib.recipe import Recipe, parse

FIGURE = Path(__file__).parents[1] / "docs" / "cost.png"
# a few are enough: what a sample takes does not depend on how many there are
SAMPLES, PICTURES = 4, 2
TIMES = 2


@dataclass(frozen=True)
class Point:
    """One merge. pixels: the calibration pictures' side; parents: how many LoRAs."""

    size: str = "tiny"
    rank: int = 16
    pixels: int = 128
    steps: int = 10  # ten or more: every fifth part ends with a look at held-out samples
    parents: int = 2

    @property
    def recipe(self) -> Recipe:
        roles = ["subject"] * (self.parents - 1) + ["style"]
        parents = [{"lora": f"lora {k}", "role": role, "prompt": f"prompt {k}"} for k, role in enumerate(roles)]
        return parse({
            "parents": parents, "output": "merged", "samples": SAMPLES, "pictures": PICTURES, "steps": self.steps,
            "at_once": self.parents, "resolution": self.pixels,
        })  # fmt: skip


SWEEPS = {
    "rank": [Point(rank=rank) for rank in (4, 16, 32, 64, 128)],
    "resolution": [Point(pixels=pixels) for pixels in (64, 128, 256, 512)],
    "steps": [Point(steps=steps) for steps in (10, 25, 50, 100)],
    "parents": [Point(parents=parents) for parents in (2, 3, 4)],
    "rank, slice": [Point("slice", rank=rank) for rank in (8, 64)],
}
PROFILED = Point("slice", rank=64, pixels=256, steps=50)


# --- the sweeps ----------------------------------------------------------------------------------------------


def model_for(point: Point, device: torch.device, dtype: torch.dtype) -> RandomModel:
    size = replace(SIZES[point.size], latent=point.pixels // 8)
    model = unet(size).to(device, dtype)
    model.disable_gradient_checkpointing()
    return RandomModel(model, size)


def bare_pass(host: RandomModel, rows: int) -> None:
    """A forward of the bare model and a backward to its input: no weight has a part of it."""
    x = torch.randn(rows, 4, host.size.latent, host.size.latent, requires_grad=True)
    host.predict(x, torch.full((rows,), 500), [host.encode("x", 0)] * rows).sum().backward()


def alone(device: torch.device) -> bool:
    """Whether one thread does it all."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def now(device: torch.device) -> float:
    """Seconds, the device's work done. Of one thread the processor's own, which nobody else's work adds to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if alone(device) else time.perf_counter()


def held(peak: Peak) -> int:
    """Bytes that are held now, what was freed given back to the system."""
    gc.collect()
    if peak.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)
    peak.begin()
    return peak.end()


def measured(point: Point, device: torch.device, dtype: torch.dtype) -> dict:
    """Seconds and MB of one merge, and of the bare model beside it, before and after."""
    host, recipe = model_for(point, device, dtype), point.recipe
    peak, bare = Peak(device), []
    rows = point.parents * (2 if recipe.loss_guidance > 1 else 1)

    def time_bare() -> None:
        for _ in range(TIMES):
            began = now(device)
            bare_pass(host, rows)
            bare.append(now(device) - began)

    bare_pass(host, rows)
    model = held(peak)
    time_bare()
    bare_peak = peak.end() - model
    held(peak)
    pairing, slots = random_pair(host.unet, point.rank, point.parents, MATRICES)
    ticks: list[tuple[float, dict]] = []
    with attaching.attach(slots, pairing.stacks) as router:
        began = now(device)
        samples = calibrated(host, router, recipe, lambda _: None)
        calibration, began = now(device) - began, now(device)
        METHODS[recipe.method](
            pairing, samples, settings_of(point.recipe), lambda told: ticks.append((now(device), told))
        )
        merge = now(device) - began
    ours_peak = peak.end() - model
    time_bare()
    learned = [(at, "held_out" in told) for at, told in ticks if told["phase"] == "merge"]
    took = [(after - before, looked) for (before, _), (after, looked) in pairwise(learned)]
    step = statistics.median(seconds for seconds, looked in took if not looked)
    seconds = {
        "calibration": calibration,
        "merge": merge,
        "a step": step,
        "a look": statistics.median(seconds for seconds, looked in took if looked) - step,
        "bare forward and backward": statistics.median(bare),
    }
    return {
        **asdict(point),
        "rows": rows,
        "layers": len(slots),
        "held-out samples": len(samples.held_out),
        "seconds": rounded(seconds),
        "a step over the bare model": round(step / statistics.median(bare), 3),
        "peak above the model, MB": rounded({"merge": ours_peak / 1e6, "bare": bare_peak / 1e6}),
    }


# --- where the time goes -------------------------------------------------------------------------------------

FOLD, DELTA, LOG = "LoRAs: coefficients folded in", "LoRAs: their factors", "optimiser, penalty and log"
REST = "Python and the rest"
# an operation belongs to the first group that has one of these words in its name, or in that of what it is part of
GROUPS = {
    LOG: ("optimizer",),
    "attention": ("attention", "attn"),
    "convolutions": ("conv",),
    "matrix multiplications": ("addmm", "linear", "matmul", "::mm", "mmbackward", "bmm"),
    "norms and activations": ("norm", "silu", "gelu"),
    "sums, copies and shapes": ("aten::", "autograd"),
}


@contextmanager
def ranges() -> Iterator[None]:
    """Meanwhile the profiler is told what the library's parts are."""

    def ranged(name: str, work):
        def inside(*args, **kwargs):
            with record_function(name):
                return work(*args, **kwargs)

        return inside

    with ExitStack() as patches:

        def patch(owner: object, attribute: str, what) -> None:
            patches.enter_context(mock.patch.object(owner, attribute, what))

        hook = attaching._hook  # of every layer: what the router's delta is, and the sum with the layer's output
        patch(attaching, "_hook", lambda *args: ranged(DELTA, hook(*args)))
        patch(_ByColumn, "folded_down", ranged(FOLD, _ByColumn.folded_down))
        for attribute in ("penalty", "mean_abs", "retained"):
            patch(_ByColumn, attribute, ranged(LOG, getattr(_ByColumn, attribute)))
        yield


def shares(events: list, wall: float, device: torch.device) -> dict[str, float]:
    """The share of `wall`, in seconds, of each group: of the processor's time, or of the GPU's, which otherwise waits.

    Their sum is 1.
    """
    parts = {FOLD, DELTA, LOG}
    backward = "autograd::engine::evaluate_function"
    events = sorted((e for e in events if e.device_type.name == "CPU"), key=lambda e: e.time_range.start)

    def around(event) -> Iterator:
        while event is not None:
            yield event
            event = event.cpu_parent

    # a backward has the number of the forward that it belongs to: of the last operation that had it
    owner: dict[int, str | None] = {}
    for event in events:
        chain = list(around(event))
        if event.sequence_nr >= 0 and not any(e.name.startswith("autograd::") for e in chain):
            owner[event.sequence_nr] = next((e.name for e in chain if e.name in parts), None)

    def group(event) -> str:
        chain = list(around(event))
        for e in chain:
            if e.name in parts:
                return e.name
            if e.name.startswith(backward) and owner.get(e.sequence_nr):
                return owner[e.sequence_nr]
        names = [e.name.lower() for e in chain]
        return next((name for name, words in GROUPS.items() if any(w in n for n in names for w in words)), REST)

    micro: dict[str, float] = defaultdict(float)
    for event in events:
        if device.type != "cuda":
            micro[group(event)] += event.self_cpu_time_total
        elif not event.is_user_annotation:  # a range itself computes nothing there
            micro[group(event)] += event.self_device_time_total
    told = {name: round(micro[name] / 1e6 / wall, 4) for name in (*GROUPS, DELTA, FOLD)}
    return told | {REST: round(1 - sum(told.values()), 4)}


def profiled(point: Point, steps: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Where the time of some learning steps goes, after the first."""
    host, recipe = model_for(point, device, dtype), point.recipe
    pairing, slots = random_pair(host.unet, point.rank, point.parents, MATRICES)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler, times = profile(activities=kinds), []

    def tick(told: dict) -> bool:
        step = told["step"] if told["phase"] == "merge" else 0
        if step and device.type == "cuda":
            torch.cuda.synchronize(device)
        if step:
            times.append(time.perf_counter())
        if step == 1 + steps:
            profiler.start()
            times[-1] = time.perf_counter()
        if step == 1 + 2 * steps:
            profiler.stop()
        return step == 1 + 2 * steps

    with ranges(), attaching.attach(slots, pairing.stacks) as router:
        samples = calibrated(host, router, recipe, lambda _: None)
        METHODS[recipe.method](pairing, samples, settings_of(point.recipe), tick)
    wall = times[2 * steps] - times[steps]
    return {
        **asdict(point),
        "seconds a step": rounded(
            {"profiled": wall / steps, "not profiled": (times[steps - 1] - times[0]) / (steps - 1)}
        ),
        "shares": shares(list(profiler.events()), wall, device),
    }


# --- the figure ----------------------------------------------------------------------------------------------

BARE = "bare model: forward and backward, as many rows"
LOOK = "look at held-out samples"
# (colour, marker) of what is drawn
LOOKS = {
    "step": ("#1f5fa8", "o"),
    BARE: ("0.55", "."),
    LOOK: ("#c8701a", "s"),
    "merge, all steps and looks": ("#3b8f5a", "D"),
    "calibration": ("#8a5aa8", "^"),
}
AXES = {
    "rank": ("rank", "rank of each LoRA"),
    "resolution": ("pixels", "side of the pictures, pixels"),
    "steps": ("steps", "learning steps"),
    "parents": ("parents", "LoRAs"),
}


def figure(sweeps: dict[str, list[dict]], made: dict, path: Path) -> None:
    """Seconds over each of what is swept; under its values the memory, at each step how often the bare model's time."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    drawn, panels = plt.subplots(1, len(AXES), figsize=(12, 4.2), layout="constrained")

    def line(panel, points: list[dict], field: str, label: str, seconds: Callable[[dict], float], style="-") -> None:
        color, marker = LOOKS[label]
        at, values = [point[field] for point in points], [seconds(point) for point in points]
        panel.plot(at, values, style, color=color, marker=marker, markersize=5, linewidth=1.4, label=label)

    def per_step(panel, points: list[dict], field: str, style: str = "-") -> None:
        line(panel, points, field, BARE, lambda p: p["seconds"]["bare forward and backward"], style)
        line(panel, points, field, "step", lambda p: p["seconds"]["a step"], style)
        for p in points:
            panel.annotate(
                f"{p['a step over the bare model']:.2f}", (p[field], p["seconds"]["a step"]), xytext=(6, 6),
                textcoords="offset points", ha="right", fontsize=8.5, color=LOOKS["step"][0],
            )  # fmt: skip

    for panel, (name, (field, label)) in zip(panels, AXES.items()):
        points = sweeps[name]
        if name in ("rank", "resolution"):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        if name == "steps":
            line(panel, points, field, "merge, all steps and looks", lambda p: p["seconds"]["merge"])
            line(panel, points, field, "calibration", lambda p: p["seconds"]["calibration"])
        else:
            per_step(panel, points, field)
        if name in ("resolution", "parents"):
            line(panel, points, field, LOOK, lambda p: p["seconds"]["a look"])
        if name == "rank":
            slice_ = sweeps["rank, slice"]
            per_step(panel, slice_, field, "--")
            panel.annotate(
                "SDXL's widths", (slice_[0]["rank"], slice_[0]["seconds"]["a step"]), xytext=(-6, -18),
                textcoords="offset points", fontsize=9, color="0.3",
            )  # fmt: skip
        memory = [p["peak above the model, MB"]["merge"] for p in points]
        shown = [f"{p[field]}\n{mb:.0f}" for p, mb in zip(points, memory)]
        panel.set_xticks([p[field] for p in points], shown, fontsize=9)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.margins(0.14, 0.15)
        if panel.get_yscale() == "linear":
            panel.set_ylim(0)
        panel.set_xlabel(f"{label}\nbelow: peak above the model, MB")
        panel.grid(axis="y", color="0.92", linewidth=0.8)
    panels[0].set_ylabel("seconds")
    found = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    drawn.legend(
        [found[label] for label in LOOKS],
        list(LOOKS),
        frameon=False,
        loc="outside upper center",
        ncols=len(LOOKS),
        fontsize=9,
    )
    drawn.supxlabel(caption(made), fontsize=8.5, color="0.3")
    drawn.savefig(path, dpi=100)
    plt.close(drawn)


def caption(made: dict) -> str:
    usual, threads = Point(), f"{made['threads']} thread{'s' if made['threads'] > 1 else ''}"
    on = f"{made['machine']}, {threads}, torch {made['torch']}, {made['dtype']}, seconds {made['seconds']}"
    return (
        f"A small UNet of SDXL's structure, random weights; where not swept: {usual.parents} LoRAs of rank {usual.rank}, "
        f"{usual.pixels} pixels, {usual.steps} steps, {SAMPLES} samples of each. Blue numbers: a step over the bare model.\n"
        f"{on}; loss under guidance, all samples of a step in one pass, nothing computed again"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, instead of the sweeps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    suffix = "" if args.device == "cpu" and args.dtype == "fp32" else f"-{args.device}-{args.dtype}"
    command = "python -m benchmarks.sweep" + (" --profile" if args.profile else "")
    made = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "command": command + (f" --device {args.device} --dtype {args.dtype}" if suffix else ""),
    }
    if args.profile:
        found = {"profile": {"made": made, **profiled(PROFILED, 3, device, dtype)}}
    else:
        measured(Point(pixels=64), device, dtype)  # what is loaded with the first merge of a process is no merge's own
        told: dict[Point, dict] = {}
        for point in dict.fromkeys(point for points in SWEEPS.values() for point in points):
            told[point] = measured(point, device, dtype)
            print(json.dumps(told[point]), flush=True)
        sweeps = {name: [told[point] for point in points] for name, points in SWEEPS.items()}
        setting = {"samples": SAMPLES, "pictures": PICTURES, "objective": Point().recipe.objective}
        made["seconds"] = "of the processor" if alone(device) else "of the clock"
        found = {"made": made, "setting": setting, "sweeps": sweeps}
        figure(sweeps, made, FIGURE.with_stem(FIGURE.stem + suffix))
    path = RESULTS / f"sweep{suffix}.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
