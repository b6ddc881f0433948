"""What a long run leaves while it works, to go on from if it is killed: the state of its steps, or a list of pairs.

In a folder of the host's that no list of LoRAs shows. A merge goes on by itself when the same recipe is run again; the tab
offers what it finds. Nothing here is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from ziplora_lib import __version__, atomic
from ziplora_lib.errors import BadInput
from ziplora_lib.merge.method import State
from ziplora_lib.recipe import Recipe, parse

# seconds of a run between two snapshots: shorter runs leave none
EVERY = 30.0
# seconds after which nobody will go on with one
KEPT = 30 * 24 * 3600

STEPS, PAIRS = ".steps", ".pairs"

# fields of a recipe that no step depends on: how it is saved, what is drawn afterwards, how memory is spared
NOT_DECIDING = {
    "output", "overwrite", "allow_same", "dtype", "layer_names", "max_rank", "keep_energy", "keep_norm",
    "balance_points", "preview_size", "preview_prompt", "memory", "at_once",
}  # fmt: skip


class Keeper:
    """Keeps the state of one merge's steps; see `merge.method.Keeper`. folder: None to keep nothing.

    identity: what besides the recipe decides the steps, such as the LoRAs' hashes.
    """

    def __init__(self, folder: Path | None, recipe: Recipe, identity: Sequence[str]):
        self._recipe = json.loads(recipe.json())
        deciding = {name: value for name, value in self._recipe.items() if name not in NOT_DECIDING}
        said = json.dumps([__version__, deciding, list(identity)], sort_keys=True)
        self._file = folder and folder / (hashlib.sha256(said.encode()).hexdigest()[:16] + STEPS)
        self._last = time.monotonic()
        self._state: Callable[[], State] | None = None

    def found(self) -> State | None:
        if self._file is None or not self._file.is_file():
            return None
        try:
            facts, tensors = _read(self._file)
            return State(int(facts["step"]), tensors, dict(facts["state"]))
        except (BadInput, KeyError, TypeError, ValueError):  # of no use to anybody
            self.forget()
            return None

    def keep(self, state: Callable[[], State]) -> None:
        self._state = state
        if time.monotonic() - self._last >= EVERY:
            self.keep_last()

    def keep_last(self) -> None:
        """Keeps the last step at once."""
        if self._file is None or self._state is None:
            return
        now = self._state()
        facts = {"recipe": self._recipe, "step": now.step, "steps": self._recipe["steps"], "state": now.facts}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace(self._file, save(now.tensors, {"ziplora": json.dumps(facts)}))
        except OSError as error:  # the merge itself needs none
            print(f"ZipLoRA: no snapshot could be kept in {self._file.parent} ({error.strerror})")
        self._last = time.monotonic()

    def forget(self) -> None:
        """The run has ended in a way from which nobody will go on."""
        if self._file is not None:
            _remove(self._file)


@contextlib.contextmanager
def listed(folder: Path | None, recipes: Sequence[Recipe]) -> Iterator[None]:
    """Meanwhile a list of merges is at work: what is left of it if the process is killed is offered."""
    if folder is None or not recipes:
        yield
        return
    facts = {"recipes": [json.loads(recipe.json()) for recipe in recipes]}
    text = json.dumps(facts)
    file = folder / (hashlib.sha256(text.encode()).hexdigest()[:16] + PAIRS)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.replace(file, text.encode())
    yield
    _remove(file)  # not where an exception ends it


@dataclass(frozen=True)
class Unfinished:
    """What can be gone on with. recipes: one, or a list of pairs'; step: how far one was, of steps; when: as time()."""

    file: Path
    recipes: tuple[Recipe, ...]
    step: int
    steps: int
    when: float

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        if self.file.suffix == PAIRS:
            return f"a list of {len(self.recipes)} LoRAs, from {self.recipes[0].output} on ({when})"
        return f"{self.recipes[0].output}: step {self.step} of {self.steps} ({when})"

    def forget(self) -> None:
        _remove(self.file)


def unfinished(folder: Path | None) -> list[Unfinished]:
    """What killed runs have left, the newest first; what is too old or cannot be read goes."""
    if folder is None or not folder.is_dir():
        return []
    with contextlib.suppress(OSError):
        atomic.remove_leftovers(folder)
    found = []
    for file in folder.iterdir():
        if file.suffix not in (STEPS, PAIRS) or not file.is_file():
            continue
        try:
            when = file.stat().st_mtime
            if time.time() - when > KEPT:
                raise BadInput("is too old")
            facts = _read(file)[0] if file.suffix == STEPS else json.loads(file.read_bytes())
            recipes = tuple(parse(one) for one in facts.get("recipes", [facts.get("recipe")]))
            found.append(Unfinished(file, recipes, int(facts.get("step", 0)), int(facts.get("steps", 0)), when))
        except OSError:
            continue
        except (BadInput, AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
            _remove(file)
    return sorted(found, key=lambda one: one.when, reverse=True)


def _read(file: Path) -> tuple[Mapping, dict]:
    """The facts and the tensors of a snapshot. Raises BadInput for what is none."""
    data = file.read_bytes()
    try:
        tensors = load(data)
        begin = 8 + int.from_bytes(data[:8], "little")
        return json.loads(json.loads(data[8:begin])["__metadata__"]["ziplora"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInput("is no snapshot of ZipLoRA", file=file.name, remedy="Delete it") from error


def _remove(file: Path) -> None:
    """With its folder, where that was the last in it."""
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
        file.parent.rmdir()
