"""The rows of the table: what is done with a pair's two LoRAs. METHODS' own rows run the very functions that users run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils.merge_utils import dare_linear, ties

from benchmarks.quality.pairs import Pair, files, joint_file
from ziplora_lib import calibration, job
from ziplora_lib.hosts import world
from ziplora_lib.hosts.diffusers import DiffusersHost
from ziplora_lib.hosts.samples import style_prompt, style_subjects, subject_prompt
from ziplora_lib.lora.delta import DenseDelta
from ziplora_lib.lora.reader import read
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge import METHODS, NEEDS_MODEL, balance
from ziplora_lib.merge.attach import Router, Slot, attach
from ziplora_lib.merge.method import Calibration
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.opening import attached
from ziplora_lib.recipe import Recipe, parse

ROLES = ["subject", "style"]
GRID = Path(__file__).parents[1] / "results" / "grid.json"
# of the recipe, what suits pictures of 64 pixels
SMALL = {"resolution": world.SIDE, "sampler_steps": 12, "guidance": 3.0, "checkpointing": False, "at_once": 8}


def fields_of(chosen: Pair, regime: str, seed: int) -> dict:
    """The recipe of a merge of this pair, with all that is default left out."""
    subject, style = files(chosen, regime, seed)
    words = style_prompt(style_subjects(seed)[0])  # one of the prompts it was trained with
    parents = [
        {"lora": str(subject), "role": "subject", "prompt": subject_prompt(chosen.shown[0])},
        {"lora": str(style), "role": "style", "prompt": words},
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

    def calibration(self, recipe: Recipe) -> Calibration:
        return calibration.calibrated(self.host, self.router, recipe, lambda _: None)


@contextmanager
def opened(host: DiffusersHost, chosen: Pair, regime: str, seed: int) -> Iterator[Opened]:
    fields = fields_of(chosen, regime, seed)
    recipe = parse(fields)
    ready = job.preflight(recipe, host)
    with host.session(recipe):
        pairing, *_ = job.prepare(recipe, ready, host, lambda _: None)
        with attach(ready.slots, pairing.stacks, pairing.vectors) as router:
            yield Opened(host, chosen, regime, seed, fields, pairing, ready.slots, router)


@dataclass(frozen=True)
class Shown:
    """A row on the model. choose: sets the balance; balances: whether it has one; facts: seconds, errors and the like."""

    choose: Callable[[float], None]
    balances: bool = True
    facts: dict | None = None


@contextmanager
def alone(on: Opened, parent: int) -> Iterator[Shown]:
    yield Shown(lambda _: on.router.alone(parent), balances=False)


@contextmanager
def summed(on: Opened, weights: tuple[float, float] = (1.0, 1.0)) -> Iterator[Shown]:
    """The plain sum at weights of its own, and along the balance from there."""

    def choose(at: float) -> None:
        on.router.merged(weights=[w * b for w, b in zip(weights, balance.weights(at, ROLES))])

    yield Shown(choose)


def best_fixed(on: Opened) -> AbstractContextManager[Shown]:
    """The plain sum at the strengths that served the validation pairs of this regime best."""
    return summed(on, tuple(json.loads(GRID.read_text())[on.regime]["best"]))


@contextmanager
def _attached(on: Opened, stacks: Mapping[str, Stack], balances: bool, facts: dict) -> Iterator[Shown]:
    on.router.bare()
    with attach(on.slots, stacks, on.pairing.vectors) as router:

        def choose(at: float) -> None:
            router.merged(weights=balance.weights(at, ROLES) if balances else None)

        yield Shown(choose, balances, facts)


def merged(on: Opened, method: str, **fields) -> AbstractContextManager[Shown]:
    """One of METHODS. fields: of the recipe, what is other than default."""
    recipe = parse({**on.fields, "method": method, **fields})
    started = time.perf_counter()
    samples = on.calibration(recipe) if method in NEEDS_MODEL else None
    calibrated = time.perf_counter()
    done = METHODS[method](on.pairing, samples, job.settings_of(recipe), lambda _: None)
    facts = {"calibrate s": calibrated - started, "merge s": time.perf_counter() - calibrated, **done.summary}
    return _attached(on, done.stacks, True, facts)


def by_peft(on: Opened, merge: str) -> AbstractContextManager[Shown]:
    """A merge of dense ΔW, layer by layer, which leaves no halves to balance."""
    torch.manual_seed(0)
    started, stacks = time.perf_counter(), {}
    for key, stack in on.pairing.stacks.items():
        deltas = [torch.zeros(stack.shape) if part is None else part.dense() for part in map(stack.part, (0, 1))]
        together = PEFT[merge](deltas, torch.ones(len(deltas)), density=0.5)
        stacks[key] = Stack.of([DenseDelta(together).low_rank()[0]])
    return _attached(on, stacks, False, {"merge s": time.perf_counter() - started})


PEFT = {"ties": ties, "dare": dare_linear}


@contextmanager
def jointly(on: Opened) -> Iterator[Shown]:
    """One LoRA trained on the pictures of both."""
    on.router.bare()
    with attached(read(joint_file(on.pair, on.seed)), on.host):
        yield Shown(lambda _: None, balances=False)


@dataclass(frozen=True)
class Row:
    """A line of a table: how it is made, and with what."""

    title: str
    make: Callable[..., AbstractContextManager[Shown]]
    fields: dict = field(default_factory=dict)

    def spec(self) -> str:
        """All that decides its cells beside the LoRAs and the miniature: a new default makes them anew."""
        forms = {n: (o.error.__name__, o.penalty.__name__, o.lam, o.start) for n, o in OBJECTIVES.items()}
        defaults = {name: field.default for name, field in Recipe.__fields__.items()}
        return json.dumps([self.make.__name__, self.fields, SMALL, forms, defaults], sort_keys=True)


ROWS = {
    "subject": Row("subject LoRA alone", alone, {"parent": 0}),
    "style": Row("style LoRA alone", alone, {"parent": 1}),
    "sum": Row("plain sum", summed),
    "average": Row("average (.5, .5)", merged, {"method": "average"}),
    "grid": Row("best fixed strengths", best_fixed),
    "ziplora": Row("**ZipLoRA, default**", merged, {"method": "ziplora"}),
    "paper": Row("ZipLoRA, `paper`", merged, {"method": "ziplora", "objective": "paper"}),
    "paper-literal": Row("ZipLoRA, `paper-literal`", merged, {"method": "ziplora", "objective": "paper-literal"}),
    "closed-form": Row("closed form", merged, {"method": "closed-form"}),
    "regmean": Row("RegMean", merged, {"method": "regmean"}),
    "ssr": Row("SSR-Merge", merged, {"method": "ssr"}),
    "np-lora": Row("NP-LoRA, μ = .5", merged, {"method": "np-lora"}),
    "rank-masks": Row("rank masks", merged, {"method": "rank-masks"}),
    "ties": Row("TIES (peft)", by_peft, {"merge": "ties"}),
    "dare": Row("DARE (peft)", by_peft, {"merge": "dare"}),
    "joint": Row("joint training", jointly),
}
