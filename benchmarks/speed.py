"""What a merge costs, beside the way that the known reimplementation goes: time a step, memory, and the bare model.

`dense` is Eq. 2 and 3 of arXiv 2311.13600 as printed and as reimplementations do it: ΔW of both LoRAs in full, in fp32, added
to every weight in every pass, and four passes of the UNet a step, two teachers and two students. Ours learns the same loss on
the same samples, so the coefficients can be held against each other.

UNets of SDXL's structure with random weights, LoRAs with random factors on all matrices of the transformers.

python -m benchmarks.speed [--size tiny|slice|sdxl] [--device cuda --dtype bf16]    writes benchmarks/results/speed-SIZE.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.scale import RandomModel, Size, random_pair, unet
from ziplora_lib.calibration import calibrated
from ziplora_lib.job import settings_of
from ziplora_lib.merge.attach import Slot, attach
from ziplora_lib.merge.methods import METHODS
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.ziplora import by_layer, learned_columns
from ziplora_lib.recipe import parse

RESULTS = Path(__file__).parent / "results"
# "slice": the first of SDXL's two inner levels' ten blocks, all widths true
SIZES = {
    "tiny": Size((64, 128, 256), (1, 2), 16),
    "slice": Size((320, 640, 1280), (1, 1), 32),
    "sdxl": Size((320, 640, 1280), (2, 10), 128),
}
# fp64: to hold the coefficients against each other where rounding, which Adam makes large, has no say
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MATRICES = "transformer_blocks"
LR, LAM = 0.01, 0.01


class Clock:
    """Seconds of pieces of work by name; waits for the device."""

    def __init__(self, device: torch.device):
        self.device, self.told = device, {}

    def __call__(self, name: str, work: Callable[[], object]) -> object:
        self._wait()
        began = time.perf_counter()
        found = work()
        self._wait()
        self.told.setdefault(name, []).append(time.perf_counter() - began)
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median(self, name: str) -> float:
        return statistics.median(self.told[name])


class Peak:
    """The most memory between two looks, in bytes: of the GPU, or of this process."""

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def end(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])


# --- the dense way -------------------------------------------------------------------------------------------


class Dense:
    """ΔW of every LoRA in full, in fp32, with a coefficient for each column, added to the weight in every forward."""

    def __init__(self, pairing: Pairing, device: torch.device):
        self.deltas = {
            key: [pairing.stacks[key].part(i).dense().to(device) for i in range(pairing.parents)]
            for key in pairing.learned
        }
        self.m: Mapping[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(delta.nbytes for deltas in self.deltas.values() for delta in deltas)

    @contextmanager
    def attached(self, slots: Mapping[str, Slot]) -> Iterator[None]:
        changed = [slots[key].module for key in self.deltas]
        try:
            for key, module in zip(self.deltas, changed):
                module.forward = self._forward(key, module)
            yield
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)

    def _forward(self, key: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight = module.weight.to(torch.promote_types(module.weight.dtype, torch.float32))
            for delta, m in zip(self.deltas[key], self.m[key]):
                weight = weight + delta * m
            return nn.functional.linear(x, weight.to(x.dtype), module.bias)

        return forward


def dense_steps(dense: Dense, host: RandomModel, pairing: Pairing, samples: list, steps: int, clock: Clock) -> Tensor:
    """Learns by the dense way; -> the coefficients (P, columns)."""
    columns = learned_columns(pairing, str(clock.device))
    m = torch.full(columns.present.shape, 1.0, device=clock.device, requires_grad=True)
    optimiser = torch.optim.Adam([m], lr=LR)
    alone = [
        {key: [float(i == k) for k in range(pairing.parents)] for key in pairing.learned}
        for i in range(pairing.parents)
    ]
    own = [[s for s in samples if s.parent == i] for i in range(pairing.parents)]
    form = OBJECTIVES["paper"]
    for step in range(steps):

        def one(step=step) -> None:
            optimiser.zero_grad()
            loss = LAM * form.penalty(m, columns)
            for i, mine in enumerate(own):
                sample = mine[step % len(mine)]
                with torch.no_grad():
                    dense.m = alone[i]
                    teacher = host.predict(sample.x, sample.t, [sample.cond])
                dense.m = by_layer(m, pairing, columns)
                student = host.predict(sample.x, sample.t, [sample.cond])
                loss = loss + form.error(student, teacher, teacher).sum()
            loss.backward()
            optimiser.step()

        clock("dense step", one)
    return m.detach()


# --- what is measured ----------------------------------------------------------------------------------------


def recipe_of(pixels: int, samples: int, steps: int, at_once: int):
    parents = [{"lora": role, "role": role, "prompt": role} for role in ("subject", "style")]
    return parse({
        "parents": parents, "output": "merged", "objective": "paper", "lr": LR, "lam": LAM, "samples": samples,
        "pictures": 2, "steps": steps, "at_once": at_once, "resolution": max(64, pixels),
    })  # fmt: skip


def attached_cost(host: RandomModel, slots, pairing: Pairing, rows: int, times: int, clock: Clock) -> dict:
    """Forwards of the bare model, of the plain sum and of one LoRA a row, in turn."""
    x = torch.randn(rows, 4, host.size.latent, host.size.latent)
    t, cond = torch.full((rows,), 500), [host.encode("x", 0)] * rows
    with attach(slots, pairing.stacks) as router, torch.no_grad():
        ways = {
            "bare": router.bare,
            "all LoRAs": router.merged,
            "a LoRA a row": lambda: router.alone(*(k % pairing.parents for k in range(rows))),
        }
        for turn in range(times + 1):
            for name, route in ways.items():
                route()
                (clock if turn else lambda _, work: work())(f"{name} {rows}", lambda: host.predict(x, t, cond))
    bare = clock.median(f"bare {rows}")
    seconds = {name: clock.median(f"{name} {rows}") for name in ways}
    return {"rows": rows, "seconds": rounded(seconds), "over bare": rounded({k: v / bare for k, v in seconds.items()})}


def measured(size: Size, rank: int, steps: int, device: torch.device, dtype: torch.dtype, times: int) -> dict:
    model = unet(size).to(device, dtype)
    model.disable_gradient_checkpointing()
    host = RandomModel(model, size)
    pairing, slots = random_pair(model, rank, where=MATRICES)
    clock, peak = Clock(device), Peak(device)
    result = {
        "widths": size.widths,
        "depth": size.depth,
        "pixels": 8 * size.latent,
        "rank": rank,
        "layers": len(slots),
        "attached": [attached_cost(host, slots, pairing, rows, times, clock) for rows in (1, 2)],
    }
    recipe = recipe_of(8 * size.latent, max(2, steps), steps, at_once=2)
    with attach(slots, pairing.stacks) as router:
        samples = clock("calibrate", lambda: calibrated(host, router, recipe, lambda _: None))
        ticks: list[tuple[float, bool]] = [(time.perf_counter(), True)]
        peak.begin()
        merged = METHODS["ziplora"](
            pairing,
            samples,
            settings_of(recipe),
            lambda told: ticks.append((time.perf_counter(), "held_out" in told)),
        )
        ours_peak = peak.end()
    # the steps that end with a look at the held-out samples are no measure
    ours = statistics.median(after - before for (before, _), (after, looked) in pairwise(ticks) if not looked)
    factors = sum(s.up.numel() + s.down.numel() for s in pairing.stacks.values())
    dense = Dense(pairing, device)
    with dense.attached(slots):
        peak.begin()
        m = dense_steps(dense, host, pairing, list(samples.train), steps, clock)
        dense_peak = peak.end()
    # ours keeps the best of the steps that it looked at: held against each other at the last one
    learned = torch.cat([merged.coefficients[key] for key in pairing.learned], dim=1).to(m)
    last = merged.summary["best_step"] == steps
    theirs = clock.median("dense step")
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return result | {
        "steps": steps,
        "seconds a step": rounded({"dense": theirs, "ours": ours}),
        "of dense": round(ours / theirs, 4),
        # each pair of samples is predicted once, held-out ones too
        "calibration, seconds a pair of samples": clock.median("calibrate") / (recipe.samples + recipe.held_out),
        "LoRAs in memory, MB": rounded({"dense": dense.bytes / 1e6, "ours": factors * itemsize / 1e6}),
        "of dense's memory": round(factors * itemsize / dense.bytes, 4),
        "peak, MB": rounded({"dense": dense_peak / 1e6, "ours": ours_peak / 1e6}),
        "coefficients": compared(learned, m) if last else None,
    }


def compared(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two ways' coefficients are apart, and how far they have gone."""
    apart = (ours - theirs).abs().flatten().float()
    told = {"largest difference": apart.max(), "mean difference": apart.mean(), "mean way": (theirs - 1).abs().mean()}
    return rounded({name: float(value) for name, value in told.items()})


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="slice")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, default=10, help="ten or more: every fifth part ends with a look at held-out samples"
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    args = parser.parse_args()
    device = torch.device(args.device)
    made = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
    }
    found = measured(SIZES[args.size], args.rank, args.steps, device, DTYPES[args.dtype], args.times)
    text = json.dumps({"made": made, **found}, indent=1)
    print(text)
    usual = args.device == "cpu" and args.dtype == "fp32"
    name = args.size if usual else f"{args.size}-{args.device}-{args.dtype}"
    (RESULTS / f"speed-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
