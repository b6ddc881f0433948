"""A merge inside a real WebUI, with the miniature: how long beside the bare model, and what jobs leave in memory.

In turn, in the same process: bare steps, a forward and a backward of the model alone down to the latent, with as many rows
as a step has; and a zip over the API. A step is two samples under guidance, so four rows. The steps of a zip that end with a
look at the held-out samples are told apart by when the job reports them. Then short jobs in a row, and what is there after
each.

The WebUI is started as for the tests (tests/webui/conftest.py), on one thread unless OMP_NUM_THREADS says otherwise: the
processor's seconds, which others on the machine hardly change, are then those of an idle machine.

python -m benchmarks.in_webui        writes benchmarks/results/in-webui.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.machine import machine
from ziplora_lib.hosts.miniature import build_miniature

HERE = Path(__file__).parent
RESULT = HERE / "results" / "in-webui.json"
sys.path.insert(0, str(HERE.parent / "tests/webui"))

from conftest import WEBUI_DIR, WebUI, running_webui  # noqa: E402
from kohya_files import write_lora  # noqa: E402
from sgm_miniature import write_sgm_miniature  # noqa: E402

INSIDE = (HERE / "inside_webui.py").read_text("utf-8")
SUBJECT, STYLE = "a photo of sks dog", "a house in szn style"
ROWS, AT_ONCE = 4, 2
FAST = {"memory": "fast", "at_once": AT_ONCE}
SHORT = {"steps": 6, "samples": 4, "pictures": 1, "sampler_steps": 6}


def inside(webui: WebUI, function: str, **arguments):
    """Calls a function of inside_webui.py in the WebUI's process."""
    return webui.run(f"{INSIDE}\nresult = {function}(**data)", **arguments)


def zipped(webui: WebUI, output: str, **fields) -> dict:
    """A whole zip over the API -> its result."""
    parents = [
        {"lora": role, "role": role, "prompt": prompt} for role, prompt in (("subject", SUBJECT), ("style", STYLE))
    ]
    answer = webui.post("/ziplora/v1/merge", {"parents": parents, "output": output, **FAST, **fields}).json()
    if "job" not in answer:
        raise SystemExit(answer)
    while True:
        state = webui.get(f"/ziplora/v1/jobs/{answer['job']}").json()
        if state["state"] == "done":
            return state["result"]
        if state["state"] not in ("queued", "running"):
            raise SystemExit(state)
        time.sleep(0.5)


def of_ticks(ticks: list, clock: int) -> dict[str, float]:
    """A job's seconds by what it is spent on, by one of the two clocks."""
    at = [(when[clock], phase, looked) for when, phase, looked in ticks]
    first = {phase: when for when, phase, _ in reversed(at)}
    last = {phase: when for when, phase, _ in at}
    steps = [(when, looked) for when, phase, looked in at if phase == "merge"]
    apart = [(after - before, looked) for (before, _), (after, looked) in pairwise(steps)]
    step = statistics.mean(seconds for seconds, looked in apart if not looked)
    return {
        "whole job": last["end"] - first["preflight"],
        "until calibrated": last["calibrate"] - first["preflight"],
        "merge": first["save"] - last["calibrate"],
        "save": first["preview"] - first["save"],
        "preview": last["end"] - first["preview"],
        "merge: steps alone": step * len(steps),
        "merge: warm start, its passes": last["warm start"] - last["calibrate"],
        "merge: before the first step": steps[0][0] - last["warm start"] - step,
        "merge: looks at held-out samples": sum(seconds - step for seconds, looked in apart if looked),
    }


def beside_bare(webui: WebUI, steps: int, resolution: int, times: int) -> dict:
    bare, jobs, told = [], [], []
    for k in range(times):
        bare.append(inside(webui, "bare_steps", rows=ROWS, resolution=resolution, steps=steps, prompt=SUBJECT))
        inside(webui, "watch")
        told.append(zipped(webui, "timed", steps=steps, resolution=resolution, overwrite=True)["seconds"])
        ticks = inside(webui, "ticks")
        jobs.append([of_ticks(ticks, clock) for clock in (0, 1)])
        print(k, bare[-1], told[-1], *jobs[-1], sep="\n", flush=True)
    clocks = {"seconds": 0, "processor": 1}
    return {
        "steps": steps,
        "rows": ROWS,
        "pixels": resolution,
        "times": times,
        "webui": {name: bare[0][name] for name in ("torch", "threads")},
        "bare steps": {clock: spread([one[clock] for one in bare]) for clock in clocks},
        "zip": {
            clock: {name: spread([job[k][name] for job in jobs]) for name in jobs[0][k]} for clock, k in clocks.items()
        },
        "zip, seconds as the job tells them": {name: spread([one[name] for one in told]) for name in told[0]},
        "over the bare steps": {
            clock: {
                name: spread([job[k][name] / one[clock] for job, one in zip(jobs, bare)])
                for name in ("whole job", "merge", "merge: steps alone")
            }
            for clock, k in clocks.items()
        },
    }


def after_jobs(webui: WebUI, jobs: int, resolution: int) -> dict:
    """What is there after each of so many short jobs, and by how much it grows a job from the second on."""
    inside(webui, "unwatch")
    before, rows = inside(webui, "left"), []
    for k in range(1, jobs + 1):
        zipped(webui, f"short {k}", resolution=resolution, **SHORT)
        rows.append(inside(webui, "left"))
        print(k, rows[-1], flush=True)
    told = rows[1:]
    numbers = range(2, jobs + 1)
    slopes = {name: statistics.linear_regression(numbers, [row[name] for row in told]).slope for name in told[0]}
    return {
        "jobs": jobs,
        "pixels": resolution,
        "before": {name: rounded(value) for name, value in before.items()},
        "after job": {k: {name: rounded(value) for name, value in row.items()} for k, row in enumerate(rows, 1)},
        "growth a job, from the second on": {name: rounded(slope) for name, slope in slopes.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": rounded(statistics.median(values)),
        "least": rounded(min(values)),
        "most": rounded(max(values)),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", default="transformer_blocks", help="layers whose names hold this have LoRAs")
    parser.add_argument("--jobs", type=int, default=10, help="short ones in a row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "checkpoint").mkdir()
        checkpoint = write_sgm_miniature(folder / "checkpoint", WEBUI_DIR)
        with running_webui(folder / "data", checkpoint) as webui:
            pipe = build_miniature()
            for seed, role in enumerate(("subject", "style")):
                path = webui.lora_dir / f"{role}.safetensors"
                write_lora(path, pipe, seed=seed, rank=args.rank, alpha=args.rank / 2, only=args.layers, strength=0.1)
            webui.post("/sdapi/v1/refresh-loras")
            zipped(webui, "first", resolution=args.resolution, **SHORT)
            seconds = beside_bare(webui, args.steps, args.resolution, args.times)
            left = after_jobs(webui, args.jobs, args.resolution)
    made = {**machine(), **seconds.pop("webui"), "command": " ".join(["python -m benchmarks.in_webui", *sys.argv[1:]])}
    told = {
        "made": made,
        "rank": args.rank,
        "layers": args.layers,
        "beside the bare model": seconds,
        "after jobs": left,
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
