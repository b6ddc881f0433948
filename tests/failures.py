"""A failure at every line of a job in turn: is the model afterwards as it was, and are the files whole?

`python -m tests.failures` injects them all, and takes an hour; tests/test_failures.py a part of them.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

import ziplora_lib
from ziplora_lib.jobs import Job
from ziplora_lib.recipe import Recipe, parse

PACKAGE = str(Path(ziplora_lib.__file__).parent) + os.sep
ROOTS = ("unet", "text_encoder", "text_encoder_2", "vae")
# what stood under the output's name before
OLDER = b"an older LoRA"

Line = tuple[str, int]


class Injected(RuntimeError):
    """Stands for any error."""


class Ended(BaseException):
    """Stands for what no `except Exception` catches, as when a thread or the program is ended."""


def restoring(file: str) -> set[int]:
    """The lines of a file that put things back or clean up: an error there would be a second one.

    And those that only say `try:`, where nothing runs: what a tracer raises there no handler catches.
    """
    found: set[int] = set()
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try):
            found.add(node.lineno)
            for part in (*node.finalbody, *node.handlers):
                found |= set(range(part.lineno, part.end_lineno + 1))
    return found


@contextmanager
def watched(look: Callable[[Line], None], files: str = PACKAGE) -> Iterator[None]:
    """Calls look with every line before it runs in this thread, of files so named; what look raises, the line raises."""

    def lines(frame: FrameType, event: str, _):
        if event == "line":
            look((frame.f_code.co_filename, frame.f_lineno))
        return lines

    def calls(frame: FrameType, _event: str, _):
        # module bodies run once only, whichever job is the first
        ours = frame.f_code.co_filename.startswith(files) and frame.f_code.co_name != "<module>"
        return lines if ours else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(work: Callable[[], object]) -> list[Line]:
    """The lines that work runs through, in the order in which it comes to them, but those that only restore."""
    found: dict[Line, None] = {}
    with watched(lambda line: found.setdefault(line)):
        work()
    cleaning = {file: restoring(file) for file, _ in found}
    return [line for line in found if line[1] not in cleaning[line[0]]]


def fingerprint(host) -> dict:
    """All that a job could leave on a headless host."""
    found: dict = {"random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))}
    for part in ROOTS:
        root = getattr(host.pipe, part)
        for name, module in root.named_modules():
            hooks = [list(table.values()) for field, table in vars(module).items() if field.endswith("hooks")]
            found[part, name] = (type(module), module.training, vars(module).get("forward"), hooks)
        for name, value in root.named_parameters():
            flags = (value.requires_grad, value.grad is None, value.dtype, value.device, value.shape)
            # as integers, whose sum does not round
            found[part, name, "value"] = (*flags, id(value), int(value.detach().view(torch.int32).sum()))
    tokenizers = [len(host.pipe.tokenizer), len(host.pipe.tokenizer_2)]
    return {**found, "tokenizers": tokenizers, "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Finding:
    """What was wrong after a failure at a line."""

    line: Line
    kind: str
    said: str


class Bench:
    """A host and small merges over an older file; `inject` fails one at a line and looks at what is left.

    recipes: each line is tried in the first of them that comes to it, so the quickest comes first.
    """

    def __init__(self, host, recipes: Sequence[Recipe]):
        self.host, self.destination = host, host.destination(recipes[0].output)
        self.lines: dict[Line, Recipe] = {}
        self.whole = {OLDER}
        for recipe in recipes:
            self.run(recipe)  # what the first run alone does, such as loading libraries
            for line in lines_of(lambda recipe=recipe: self.run(recipe)):
                self.lines.setdefault(line, recipe)
            self.whole.add(self.destination.read_bytes())
        self.before = fingerprint(host)

    def run(self, recipe: Recipe) -> Job:
        self.clear()
        self.destination.write_bytes(OLDER)
        job = Job.merge(recipe)
        job.run(self.host)
        return job

    def clear(self) -> None:
        shutil.rmtree(self.host.scratch(), ignore_errors=True)
        for file in self.host.folder.iterdir():
            file.unlink()

    def inject(self, line: Line, kind: type[BaseException]) -> list[Finding]:
        reached, state = [], ""

        def look(here: Line) -> None:
            if here == line and not reached:
                reached.append(here)
                raise kind("injected")

        try:
            with watched(look, line[0]):
                state = self.run(self.lines.get(line) or next(iter(self.lines.values()))).state
        except BaseException as error:
            state = type(error).__name__
        said = [] if reached else ["the line was not reached"]
        # a line may stand in what is tried and survived, such as a preview
        if state not in ("failed", "done", "Injected", "Ended"):
            said.append(f"the job ended as {state}")
        after = fingerprint(self.host)
        if changed := [str(key) for key in self.before if self.before[key] != after.get(key)]:
            said.append(f"changed: {', '.join(changed[:5])}")
            self.before = after  # told once
        if self.destination.read_bytes() not in self.whole:
            said.append("the file is neither the old nor the new one")
        allowed = {self.destination.with_suffix(ending).name for ending in (".safetensors", ".json", ".png")}
        allowed.add(self.host.scratch().name)  # a snapshot, to go on from
        if strange := sorted({f.name for f in self.host.folder.iterdir()} - allowed):
            said.append(f"left: {', '.join(strange)}")
        return [Finding(line, kind.__name__, text) for text in said]


def small_recipes(subject: Path, style: Path) -> list[Recipe]:
    """As few passes as there can be, through as much of the code as there can be: one without the model, one with it."""
    fields = {
        "parents": [
            {"lora": str(subject), "role": "subject", "prompt": "a photo of sks cat"},
            {"lora": str(style), "role": "style", "prompt": "a house in szn style"},
        ],
        "output": "merged", "steps": 1, "resolution": 64, "pictures": 1, "samples": 2, "sampler_steps": 1,
        "balance_points": 1, "max_rank": 6, "overwrite": True,
    }  # fmt: skip
    return [parse({**fields, "method": "direct"}), parse({**fields, "memory": "offload"})]


def random_pair(folder: Path) -> tuple[Path, Path]:
    """Two LoRAs for the miniature, on attention and text encoders."""
    from loras import kohya_name, write_lora
    from torch import nn

    from ziplora_lib.hosts.miniature import build_miniature

    pipe = build_miniature()
    shapes = {
        kohya_name(part, name): tuple(module.weight.shape)
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ("attn" in name or "conv1" in name)
    }
    return tuple(
        write_lora(folder / f"{name}.safetensors", shapes, rank=4, seed=seed, size=0.3)
        for name, seed in (("subject", 1), ("style", 2))
    )


def report(told: dict, file: Path | None) -> None:
    """Says the result of a long run, and keeps it."""
    text = json.dumps(told, indent=1)
    print(text)
    if file:
        file.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="1/1", help="K/N: every Nth line from the Kth on")
    args = parser.parse_args()
    k, n = map(int, args.part.split("/"))

    from benchmarks.machine import machine
    from ziplora_lib.hosts.diffusers import DiffusersHost

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "out").mkdir()
        host = DiffusersHost("miniature", Path(folder) / "out", "cpu")
        bench = Bench(host, small_recipes(*random_pair(Path(folder))))
        chosen = list(bench.lines)[k - 1 :: n]
        findings: list[Finding] = []
        for i, line in enumerate(chosen):
            kind = Ended if i % 5 == 4 else Injected
            new = bench.inject(line, kind)
            findings += new
            if new or i % 100 == 0:
                print(f"{i} of {len(chosen)}", *new, sep="\n", flush=True)
    told = {
        "lines": len(bench.lines),
        "injected": len(chosen),
        "recovered": len(chosen) - len({finding.line for finding in findings}),
        "findings": [f"{Path(f.line[0]).name}:{f.line[1]} {f.kind}: {f.said}" for f in findings],
        "command": f"python -m tests.failures --part {args.part}",
        "machine": machine(),
    }
    report(told, args.json)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
