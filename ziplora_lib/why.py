"""Why a merged LoRA does what it does: what the merge did to its parents, layer by layer, from the files alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.findings import Findings, Parent
from ziplora_lib.hosts.host import Entry, Host
from ziplora_lib.lora import bake
from ziplora_lib.lora.metadata import made_by
from ziplora_lib.lora.reader import Lora
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.analysis import GROUPS, block_of, block_order
from ziplora_lib.merge.effect import Effect, effect
from ziplora_lib.merge.method import Callback


def refuse(name: str, host: Host) -> None:
    """Raises BadInput, from the file's header, for a LoRA that ZipLoRA did not merge."""
    bake.origins(host.peek(name))


def look(name: str, host: Host, callback: Callback = lambda _: None) -> Findings:
    """Compares a merged LoRA with its parents, as far as the host still lists them.

    Raises BadInput for a LoRA that ZipLoRA did not merge or that another tool changed, Stopped when the callback says so.
    """
    merged = host.open(name)
    recorded, warnings = _recorded(merged)
    stacks = bake.stacks(merged)
    parents, loras = [], []
    for k, parent in enumerate(recorded):
        _step(callback, "open", k, len(recorded), f"reading {parent.name}")
        lora, problem = _found(parent, host)
        # a new name is worth a word, but is no problem
        parents.append(parent if lora else replace(parent, problem=problem))
        loras.append(lora)
        warnings += [f"the {parent.title} {problem}"] if problem else []
        warnings += _unmeasured(lora) if lora else []
    if None in loras:
        warnings.append(
            "without all of its LoRAs, their overlap before, the plain sum and the change are not known, nor what is kept of "
            "the missing ones"
        )
    if merged.vectors:
        warnings.append(f"{len(merged.vectors)} norms and biases have no columns, and are left out of all numbers")
    keys = sorted({*stacks, *(key for lora in loras if lora for key in lora.deltas)}, key=_place)
    layers = {}
    for k, key in enumerate(keys):
        _step(callback, "measure", k, len(keys), f"measuring {merged.name}")
        layers[key] = _effect(key, merged, stacks.get(key), parents, loras)
    return Findings(merged.name, parents, layers, warnings)


def _place(key: str) -> tuple:
    block, group = block_of(key)
    return block_order(block), GROUPS.index(group), key


def _step(callback: Callback, phase: str, step: int, steps: int, what: str) -> None:
    if callback({"phase": phase, "step": step, "steps": steps, "what": what}):
        raise Stopped


def _recorded(merged: Lora) -> tuple[list[Parent], list[str]]:
    """The parents as the merged file has them, and what is to be said of it."""
    origins, warnings = bake.origins(merged), []
    strengths = _numbers(lambda: [parent["strength"] for parent in made_by(merged)["parents"]])
    if len(strengths) != len(origins):
        strengths = [1.0] * len(origins)
        warnings.append("the file does not say at which strengths its LoRAs were merged; 1 is taken for each")
    baked = _numbers(lambda: json.loads(merged.metadata["ziplora.strengths"]))
    if len(baked) != len(origins):
        baked = [1.0] * len(origins)
    if set(baked) != {1.0}:
        said = " : ".join(f"{weight:.2f}" for weight in baked)
        warnings.append(f"it was saved at other strengths after the merge ({said}), which is part of the change")
    return [
        Parent(origin["name"], origin["role"], strength, weight, origin["sha256"])
        for origin, strength, weight in zip(origins, strengths, baked)
    ], warnings


def _numbers(told: Callable[[], Sequence]) -> list[float]:
    """What metadata says, which another tool may have changed; [] where it is no list of numbers."""
    try:
        numbers = [float(number) for number in told()]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def _found(parent: Parent, host: Host) -> tuple[Lora | None, str]:
    """The parent's file, told by its hash, and what is to be said: looked for by its name, then by what headers say."""
    listing = host.listing()
    named = [entry for entry in listing if parent.name in (entry.name, entry.path.stem)]
    problem = "is not listed any more"
    for entry in named:
        try:
            lora = host.open(entry.name)
        except BadInput as error:
            problem = f"cannot be read ({error})"
            continue
        if lora.hash == parent.sha256:
            return lora, ""
        problem = "is another file than the one that was merged: it was changed or replaced since"
    for entry in listing:
        if entry not in named and _told_hash(entry, host) == parent.sha256:
            lora = host.open(entry.name)
            if lora.hash == parent.sha256:
                return lora, f"is called {entry.name} now"
    return None, problem


def _told_hash(entry: Entry, host: Host) -> str:
    """The hash that a file says it has."""
    try:
        return host.peek(entry.name).metadata.get("sshs_model_hash", "")
    except BadInput:
        return ""


def _unmeasured(lora: Lora) -> list[str]:
    if not lora.dense:
        return []
    kinds = ", ".join(Counter(layer.kind for layer in lora.dense.values()))
    return [
        f"layers of {lora.name} that need the model: {len(lora.dense)} ({kinds}); what needs them is left out of the numbers"
    ]


def _effect(
    key: str, merged: Lora, stack: Stack | None, parents: Sequence[Parent], loras: Sequence[Lora | None]
) -> Effect:
    deltas = [lora.deltas[key].strength(p.strength) if lora and key in lora.deltas else None
              for p, lora in zip(parents, loras)]  # fmt: skip
    known = [lora is not None and key not in lora.dense for lora in loras]
    sizes = {(delta.shape[0], delta.down[0].numel()) for delta in deltas if delta is not None}
    if stack is None:  # a layer that was left out of the merge
        out, columns = next(iter(sizes))
        stack = Stack(torch.zeros(out, 0), torch.zeros(0, columns), (0,) * len(parents))
    if sizes - {(stack.shape[0], stack.columns)}:
        raise BadInput(
            "has another shape than in the LoRAs that it says it was merged from",
            file=merged.path.name,
            key=key,
            remedy="Another tool changed the file: merge again",
        )
    return effect(deltas, known, stack)
