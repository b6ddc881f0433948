"""Merges killed at random moments: is there the old file, whole, or the new one, whole, and nothing else?

`python -m tests.kills` kills 200; tests/test_kills.py a few of them.
"""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ziplora_lib import job
from ziplora_lib.lora import writer
from ziplora_lib.recipe import Recipe

OLDER = b"an older LoRA"


class SlowFile:
    """A file on a disk that takes its time, so that kills meet it half-written."""

    def __init__(self, file):
        self.file = file

    def write(self, data) -> int:
        for begin in range(0, len(data), 1 << 14):
            self.file.write(data[begin : begin + (1 << 14)])
            self.file.flush()
            time.sleep(0.002)
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def with_a_slow_disk() -> None:
    fast = builtins.open

    def slow(file, mode="r", *args, **kwargs):
        opened = fast(file, mode, *args, **kwargs)
        return SlowFile(opened) if "w" in mode and str(file).endswith(".ziplora-part") else opened

    builtins.open = io.open = slow


class Killing:
    """A host, and recipes that overwrite, one without the model and one with it.

    `kill` ends a merge somewhere and looks at what is left.
    """

    def __init__(self, host, recipes: Sequence[Recipe], seed: int = 0):
        self.host, self.chance = host, random.Random(seed)
        # for those while it saves nothing needs to be learned before
        self.recipes = dict(zip(("while saving", "anywhere"), recipes))
        self.destination = host.destination(recipes[0].output)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.whole = {OLDER}
        for one in self.recipes.values():
            job.run(one, host)
            self.whole.add(self.destination.read_bytes())
        self.seconds = {where: self._timed(one) for where, one in self.recipes.items()}

    def _timed(self, recipe: Recipe) -> dict[str, float]:
        """Seconds until it saves, and in all, in a child with the slow disk."""
        process, said = self._started(recipe)
        began, at = time.monotonic(), {}
        for phase in iter(lambda: os.read(said, 1), b""):
            at[phase] = time.monotonic() - began
        os.close(said)
        os.waitpid(process, 0)
        return {"save": at[b"s"], "all": time.monotonic() - began}

    def _started(self, recipe: Recipe) -> tuple[int, int]:
        """A child that merges; its phases' first letters come out of the pipe."""
        self.destination.write_bytes(OLDER)
        for ending in (".json", ".png"):
            self.destination.with_suffix(ending).unlink(missing_ok=True)
        said, tell = os.pipe()
        child = os.fork()
        if child:
            os.close(tell)
            return child, said
        try:
            with_a_slow_disk()
            job.run(recipe, self.host, lambda info: os.write(tell, info["phase"][:1].encode()) and None)
        finally:
            os._exit(0)

    def kill(self) -> None:
        """Half of them anywhere in a merge, half while it saves, where there is something to spoil."""
        where = self.chance.choice(list(self.recipes))
        child, said = self._started(self.recipes[where])
        seconds = self.seconds[where]
        wait = self.chance.uniform(0, seconds["all"])
        if where == "while saving":
            while os.read(said, 1) not in (b"s", b""):
                pass
            wait = self.chance.uniform(0, seconds["all"] - seconds["save"])
        self._drain(said, wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(said)
        self.counts[where] += 1
        self._look()

    def _drain(self, said: int, seconds: float) -> None:
        """Waits, and keeps the pipe from filling."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([said], [], [], left)[0] and not os.read(said, 4096):
                time.sleep(max(0.0, until - time.monotonic()))
                return

    def _look(self) -> None:
        folder, found = self.destination.parent, self.destination.read_bytes()
        self.counts["old file" if found == OLDER else "new file"] += 1
        if found not in self.whole:
            self.wrong.append(f"a file of {len(found)} bytes that is neither")
        names = {file.name for file in folder.iterdir() if file.is_file()}
        parts = {name for name in names if name.endswith(".ziplora-part")}
        self.counts["with a part left"] += bool(parts)
        if found == OLDER and not parts:
            self.counts["before the file was begun"] += 1
        for name in sorted(names - parts):
            file = folder / name
            try:
                if file.suffix == ".json":
                    json.loads(file.read_text("utf-8"))
                elif file.suffix == ".png":
                    Image.open(file).load()
                elif file != self.destination:
                    self.wrong.append(f"{name} was left")
            except Exception as error:
                self.wrong.append(f"{name}: {error}")
        writer.check_free(self.destination, overwrite=True)  # as the next run does
        self.wrong += [f"{name} stayed" for name in parts if (folder / name).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from failures import random_pair, report, small_recipes

    from benchmarks.machine import machine
    from ziplora_lib.hosts.diffusers import DiffusersHost

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "out").mkdir()
        recipes = small_recipes(*random_pair(Path(folder)))
        killing = Killing(DiffusersHost("miniature", Path(folder) / "out", "cpu"), recipes, args.seed)
        for number in range(args.count):
            killing.kill()
            if number % 20 == 0:
                print(number, dict(killing.counts), *killing.wrong, flush=True)
    told = {
        "kills": args.count,
        **killing.counts,
        "wrong": killing.wrong,
        "command": f"python -m tests.kills --count {args.count} --seed {args.seed}",
        "machine": machine(),
    }
    report(told, args.json)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
