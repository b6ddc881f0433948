"""The rows of the table: what is done with a pair's two LoRAs. those of methods run the very functions that users run."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from benchmarks import sampling
from benchmarks.judge import WEIGHTS
from benchmarks.methods import COMPARED, NEEDS_SAMPLES
from benchmarks.quality.measures import BALANCES, GUIDANCE
from benchmarks.quality.pairs import JOINT_STEPS, Pair, files, joint_file
from ziplora_lib import calibration, job
from ziplora_lib.hosts import world
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.samples import style_prompt, style_subjects, subject_prompt
from ziplora_lib.lora.reader import read
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge import balance
from ziplora_lib.merge.analysis import weighted_overlap
from ziplora_lib.merge.attach import Router, Slot, attach
from ziplora_lib.merge.judging import retained
from ziplora_lib.merge.method import Calibration, Sample
from ziplora_lib.merge.objective import OBJECTIVES, relative_error
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.recipe import Recipe, parse

ROLES = ["subject", "style"]
GRID = Path(__file__).parents[1] / "results" / "grid.json"
# of the recipe, what suits pictures of 64 pixels
SMALL = {"resolution": world.SIDE, "sampler_steps": 12, "guidance": 2.0, "memory": "fast", "at_once": 8}
CALIBRATING = (
    "pictures", "samples", "taught", "objective", "empty_share", "seed", "text_encoders", "guidance", "loss_guidance",
)  # fmt: skip


def fields_of(chosen: Pair, regime: str, seed: int, strengths: Sequence[float]) -> dict:
    """The recipe of a merge of this pair, with all that is default left out."""
    subject, style = files(chosen, regime, seed)
    words = style_prompt(style_subjects(seed)[0])  # one of the prompts it was trained with
    parents = [
        {"lora": str(file), "role": role, "prompt": prompt, "strength": strength}
        for file, role, prompt, strength in zip(
            (subject, style), ROLES, (subject_prompt(chosen.shown[0]), words), strengths
        )
    ]
    return {"parents": parents, "output": "merged", "overwrite": True, "seed": seed, **SMALL}


@dataclass(frozen=True)
class Opened:
    """A pair on the model, its factors attached."""

    host: DiffusersHost
    pair: Pair
    regime: str
    seed: int
    fields: dict
    pairing: Pairing
    slots: Mapping[str, Slot]
    router: Router
    held_out: Sequence[Sample]
    made: dict = field(default_factory=dict)

    def calibration(self, recipe: Recipe) -> tuple[Calibration, float]:
        """The samples, made once for all rows that ask for the same; and the seconds that it took."""
        asked = json.dumps([[p.dict() for p in recipe.parents], [getattr(recipe, name) for name in CALIBRATING]])
        if asked not in self.made:
            started = time.perf_counter()
            samples = calibration.calibrated(self.host, self.router, recipe, lambda _: None)
            self.made[asked] = samples, time.perf_counter() - started
        return self.made[asked]

    @torch.no_grad()
    def errors(self) -> list[float]:
        """‖D_m − D_i‖² / ‖D_i − D_0‖² against each LoRA alone, of what is in the weights now, on samples of its own."""
        self.router.bare()
        sums = [0.0, 0.0]
        for s in self.held_out:
            told = self.host.encode(s.text, world.SIDE, negative=not s.text)  # as the text encoders are now
            predicted = self.host.predict(s.x, s.t, [told])
            sums[s.parent] += float(relative_error(predicted, s.target, s.bare)) / (len(self.held_out) / 2)
        return sums


@contextmanager
def opened(
    host: DiffusersHost, chosen: Pair, regime: str, seed: int, strengths: Sequence[float] = (1.0, 1.0)
) -> Iterator[Opened]:
    fields = fields_of(chosen, regime, seed, strengths)
    recipe = parse(fields)
    ready = job.preflight(recipe, host)
    with host.session():
        pairing, *_ = job.prepare(recipe, ready, host, lambda _: None)
        with attach(ready.slots, pairing.stacks, pairing.vectors) as router:
            judging = parse({**fields, "loss_guidance": 1.0, "samples": 16, "seed": 99})
            samples, _ = calibration.calibrate(host, router, judging, lambda _: None)
            held_out = [_with_bare(host, router, s) for s in samples]
            yield Opened(host, chosen, regime, seed, fields, pairing, ready.slots, router, held_out)


@torch.no_grad()
def _with_bare(host: DiffusersHost, router: Router, s: Sample) -> Sample:
    """What the bare model predicts too, which the default's loss does not ask for."""
    router.bare()
    return replace(s, bare=host.predict(s.x, s.t, [host.encode(s.text, world.SIDE, negative=not s.text)]).float().cpu())


@dataclass(frozen=True)
class Shown:
    """A row on the model. choose: sets the balance; balances: whether it has one; facts: seconds, errors and the like."""

    choose: Callable[[float], None]
    balances: bool = True
    facts: dict | None = None


@contextmanager
def in_weights(on: Opened, deltas: Mapping[str, Sequence[Tensor]]) -> Iterator[Callable[[Sequence[float]], None]]:
    """Each LoRA's ΔW in the live weights, at strengths to be chosen: pictures come faster so than with attached factors."""
    on.router.bare()
    own = {key: on.slots[key].weight.detach().clone() for key in deltas}

    @torch.no_grad()
    def choose(strengths: Sequence[float]) -> None:
        for key, parts in deltas.items():
            added = sum(strength * part for strength, part in zip(strengths, parts))
            on.slots[key].weight.copy_(own[key] + added)

    try:
        yield choose
    finally:
        with torch.no_grad():
            for key, weight in own.items():
                on.slots[key].weight.copy_(weight)


def by_parent(stacks: Mapping[str, Stack]) -> dict[str, list[Tensor]]:
    """Each LoRA's ΔW of each layer."""
    return {
        key: [torch.zeros(stack.shape) if part is None else part.dense() for part in map(stack.part, (0, 1))]
        for key, stack in stacks.items()
    }


@contextmanager
def alone(on: Opened, parent: int) -> Iterator[Shown]:
    with in_weights(on, by_parent(on.pairing.stacks)) as choose:
        choose([float(i == parent) for i in range(2)])
        yield Shown(lambda _: None, balances=False)


@contextmanager
def summed(on: Opened, weights: tuple[float, float] = (1.0, 1.0)) -> Iterator[Shown]:
    """The plain sum at weights of its own, and along the balance from there."""
    with in_weights(on, by_parent(on.pairing.stacks)) as choose:
        yield Shown(lambda at: choose([w * b for w, b in zip(weights, balance.weights(at, ROLES))]))


def best_fixed(on: Opened) -> AbstractContextManager[Shown]:
    """The plain sum at the strengths that served four validation pairs of this regime best."""
    best = json.loads(GRID.read_text())
    return summed(on, tuple(best.get(on.regime, best["light"])["best"]))


@contextmanager
def merged(on: Opened, method: str, **fields) -> Iterator[Shown]:
    """One of COMPARED. fields: of the recipe, what is other than default."""
    recipe = parse({**on.fields, **fields})
    samples, seconds = on.calibration(recipe) if method in NEEDS_SAMPLES else (None, 0.0)
    with memory() as peak:
        started = time.perf_counter()
        done = COMPARED[method](on.pairing, samples, job.settings_of(recipe), lambda _: None)
        facts = {"calibrate s": seconds, "merge s": time.perf_counter() - started, **done.summary}
    facts["retained"] = retained(on.pairing, done.stacks)
    facts["overlap"] = weighted_overlap(on.pairing.stacks, done.stacks)["all"]
    with in_weights(on, by_parent(done.stacks)) as choose:
        yield Shown(lambda at: choose(balance.weights(at, ROLES)), facts=facts | peak)


@contextmanager
def from_the_loras(on: Opened) -> Iterator[Shown]:
    """The default without its warm start."""
    cold = {"guided": replace(OBJECTIVES["guided"], warm_start=False)}
    with patch.dict(OBJECTIVES, cold), merged(on, "ziplora") as shown:
        yield shown


@contextmanager
def by_peft(on: Opened, merge: str) -> Iterator[Shown]:
    """A merge of dense ΔW, layer by layer, which leaves no halves to balance."""
    torch.manual_seed(0)
    with memory() as peak:
        started, parts = time.perf_counter(), by_parent(on.pairing.stacks)
        deltas = {key: [PEFT[merge](both, torch.ones(2), density=0.5)] for key, both in parts.items()}
        facts = {"merge s": time.perf_counter() - started}
    with in_weights(on, deltas) as choose:
        choose([1.0])
        yield Shown(lambda _: None, balances=False, facts=facts | peak)


@contextmanager
def memory() -> Iterator[dict[str, float]]:
    """Filled at the end with the MB of memory at the peak beyond what was held before; left empty where that is not told."""
    status, found = Path("/proc/self/status"), {}

    def told(name: str) -> float:
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) / 1024

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed and is kept for later would hide what is taken now
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = told("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found["peak MB"] = max(0.0, told("VmHWM") - before)


PEFT = {"ties": ties, "dare": dare_linear}


@contextmanager
def jointly(on: Opened) -> Iterator[Shown]:
    """One LoRA trained on the pictures of both."""
    with in_weights(on, {key: [d.dense()] for key, d in read(joint_file(on.pair, on.seed)).deltas.items()}) as choose:
        choose([1.0])
        yield Shown(lambda _: None, balances=False)


@dataclass(frozen=True)
class Row:
    """A line of a table: how it is made, and with what; strengths: the LoRAs' own, before anything is done with them."""

    title: str
    make: Callable[..., AbstractContextManager[Shown]]
    fields: dict = field(default_factory=dict)
    strengths: tuple[float, float] = (1.0, 1.0)

    def spec(self) -> str:
        """All that decides its cells beside the LoRAs and the miniature: a new default makes them anew."""
        forms = {
            n: (o.error.__name__, o.penalty.__name__, o.lam, o.start, o.guidance, o.warm_start)
            for n, o in OBJECTIVES.items()
        }
        defaults = {name: field.default for name, field in Recipe.__fields__.items()}
        own = [self.make.__name__, self.fields, self.strengths]
        if self.make is best_fixed:
            own.append(json.loads(GRID.read_text()))
        pictures = [sampling.STEPS, GUIDANCE, BALANCES, hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12]]
        return json.dumps([own, SMALL, forms, defaults, pictures, JOINT_STEPS], sort_keys=True)


# arXiv 2311.13600: at most 100 updates
PAPER = {"steps": 100, "lr": 0.01}
ROWS = {
    "subject": Row("subject LoRA alone", alone, {"parent": 0}),
    "style": Row("style LoRA alone", alone, {"parent": 1}),
    "sum": Row("plain sum", summed),
    "average": Row("average (.5, .5)", merged, {"method": "average"}),
    "grid": Row("best fixed strengths", best_fixed),
    "ziplora": Row("**ZipLoRA, default**", merged, {"method": "ziplora"}),
    "cold": Row("the same, no warm start", from_the_loras),
    "paper": Row("ZipLoRA, `paper`", merged, {"method": "ziplora", "objective": "paper", **PAPER}),
    "paper-literal": Row(
        "ZipLoRA, `paper-literal`", merged, {"method": "ziplora", "objective": "paper-literal", **PAPER}
    ),
    "closed-form": Row("closed form", merged, {"method": "closed-form"}),
    "regmean": Row("RegMean", merged, {"method": "regmean"}),
    "ssr": Row("SSR-Merge", merged, {"method": "ssr"}),
    "np-lora": Row("NP-LoRA, μ = .5", merged, {"method": "np-lora"}),
    "rank-masks": Row("rank masks", merged, {"method": "rank-masks"}),
    "ties": Row("TIES (peft)", by_peft, {"merge": "ties"}),
    "dare": Row("DARE (peft)", by_peft, {"merge": "dare"}),
    "joint": Row("joint training", jointly),
}
