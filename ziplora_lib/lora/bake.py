"""What a merged file can be made into by itself: the same at other strengths, or its parents' halves as files of their own.

Needs no model, no parents and no new optimisation: a layer's ranks are the parents' one after the other, so a strength
scales columns of `lora_up`, and a half is some of the ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.extras import embedding_tensors, extra_tensors
from ziplora_lib.lora.keys import LAYER_NAMES, layer_key, listed, spelled
from ziplora_lib.lora.metadata import half_metadata, made_by
from ziplora_lib.lora.reader import Lora, read
from ziplora_lib.lora.stack import Stack
from ziplora_lib.lora.vectors import Vectors

# how far a strength after the fact may go, either way
STRONGEST = 4

_DTYPE_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def origins(lora: Lora) -> list[dict[str, str]]:
    """A merged file's parents, in order: name, role, sha256 and trigger, "" where it does not say.

    Files of before roles were kept have one subject and one style. Raises BadInput for a LoRA that ZipLoRA did not make.
    """
    return _recorded(lora)[0]


def _recorded(lora: Lora) -> tuple[list[dict[str, str]], dict[str, tuple[int, ...]]]:
    """The parents, and each layer's ranks of theirs (the usual ones under "*"), as the metadata has them."""
    try:
        entries = [dict(entry) for entry in json.loads(lora.metadata["ziplora.parents"])]
        table = json.loads(lora.metadata["ziplora.ranks"])
        ranks = {key: tuple(int(rank) for rank in split) for key, split in table.items()}
        if not entries or {len(split) for split in ranks.values()} != {len(entries)}:
            raise ValueError("parents and ranks do not fit")
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if "ziplora.split_from" in lora.metadata:
            raise BadInput(
                "is one half of a merge, and has no halves of its own",
                file=lora.path.name,
                remedy="Use it in a prompt at the strength that you like",
            ) from error
        raise BadInput(
            "was not made by ZipLoRA, so its halves are not known",
            file=lora.path.name,
            remedy="Pick a LoRA that ZipLoRA made",
        ) from error
    parents = []
    for i, entry in enumerate(entries):
        told = {field: _text(entry.get(field, "")) for field in ("name", "role", "sha256", "trigger")}
        if told["role"] not in ("subject", "style"):
            told["role"] = "style" if i else "subject"
        parents.append(told)
    return parents, ranks


def _text(value: object) -> str:
    """A field of a parent, which another tool may have made a list of lists."""
    return str(value) if isinstance(value, str | int | float) else ""


def in_order(lora: Lora, given: Mapping[str, Sequence]) -> list:
    """What is given for the subjects and for the styles, each in their order, in the order of all parents.

    given: by role, one a parent. Raises BadInput where the counts do not fit the file.
    """
    parents = origins(lora)
    for role, values in given.items():
        own = [parent["name"] for parent in parents if parent["role"] == role]
        if len(values) != len(own):
            names = f" ({', '.join(own)})" if own else ""
            raise BadInput(
                f"has {len(own)} {role}{'' if len(own) == 1 else 's'}{names}, but {len(values)} are given",
                file=lora.path.name,
                remedy="Give as many as there are, in that order",
            )
    left = {role: iter(values) for role, values in given.items()}
    return [next(left[parent["role"]]) for parent in parents]


def strengths(lora: Lora, given: Mapping[str, Sequence[float]]) -> list[float]:
    """A strength for each parent from those given by role: one serves all of its role, none leaves them as they are."""
    roles = [parent["role"] for parent in origins(lora)]
    spread = {}
    for role in ("subject", "style"):
        values, n = list(given.get(role, ())), roles.count(role)
        spread[role] = [*(values or [1.0])] * n if n and len(values) <= 1 else values
    return in_order(lora, spread)


def check_strengths(lora: Lora, weights: Sequence[float]) -> None:
    """Raises BadInput for strengths that are not one a parent of the merged LoRA, or out of range."""
    parents = origins(lora)
    if len(weights) != len(parents):
        names = ", ".join(parent["name"] for parent in parents)
        raise BadInput(
            f"takes {len(parents)} strengths, one for each of {names}, but {len(weights)} are given",
            file=lora.path.name,
            remedy="Give one for each, in that order",
        )
    for weight in weights:
        if not abs(weight) <= STRONGEST:
            raise BadInput(
                f"the strength {weight} is not between -{STRONGEST} and {STRONGEST}", remedy="1 leaves a half as it is"
            )


def stacks(lora: Lora) -> dict[str, Stack]:
    """A merged file's layers, split into its parents again. Raises BadInput for a LoRA that ZipLoRA did not make."""
    table, split = _recorded(lora)[1], {}
    if lora.dense:
        raise BadInput(
            f"has {listed(sorted(lora.dense))} of a kind that ZipLoRA does not write",
            file=lora.path.name,
            key=min(lora.dense),
            remedy="Another tool changed the file: merge again",
        )
    for key, delta in lora.deltas.items():
        ranks = table.get(key, table.get("*", ()))
        if sum(ranks) != delta.rank or min(ranks) < 0:
            raise BadInput(
                f"has rank {delta.rank}, but its metadata says {' + '.join(map(str, ranks))}",
                file=lora.path.name,
                key=key,
                remedy="Another tool changed the file: merge again",
            )
        split[key] = Stack(delta.up.float() * delta.scale, delta.down.float(), ranks)
    return split


def vectors_of(lora: Lora) -> dict[str, Vectors]:
    """What each parent of a merged file adds to norms and biases. Raises BadInput where that is not one row a parent."""
    parents = len(origins(lora))
    for key, added in lora.vectors.items():
        if any(t is not None and (t.ndim != 2 or len(t) != parents) for t in (added.weight, added.bias)):
            raise BadInput(
                f"does not say what each of its {parents} parents adds",
                file=lora.path.name,
                key=key,
                remedy="Another tool changed the file: merge again",
            )
    return lora.vectors


def _write(
    lora: Lora,
    destination: Path,
    stacks: Mapping[str, Stack],
    vectors: Mapping[str, Vectors],
    metadata: Mapping[str, str],
    overwrite: bool,
) -> dict:
    """Writes what was made of a merged LoRA: in its dtype and spelling, with its embeddings."""
    base = "sdxl" if lora.base == "unknown" else lora.base
    names = made_by(lora).get("layer_names")
    names = names if names in LAYER_NAMES else "kohya"
    plain, extra = extra_tensors(stacks, vectors, _bias_shapes(lora, base), partial(spelled, base=base))
    extra |= embedding_tensors([lora])[0]
    dtype = _DTYPE_NAMES.get(lora.dtype, "fp32")  # what another tool made of it
    return writer.write(destination, plain, dtype, metadata, overwrite, names=names, base=base, extra=extra)


def _bias_shapes(lora: Lora, base: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the layers with a bias, which stands beside a whole ΔW."""
    with safe_open(str(lora.path), framework="pt") as file:
        whole = [name for name in file.keys() if name.endswith(".diff")]
        return {layer_key(n.removesuffix(".diff"), base): tuple(file.get_slice(n).get_shape()) for n in whole}


def bake(source: Path, destination: Path, weights: Sequence[float], overwrite: bool = False) -> dict:
    """Saves a merged LoRA at other strengths, one a parent, with its metadata and card; returns what the writer does.

    Raises BadInput for a file that is not ours, strengths that are not one a parent or out of range, and as the writer does.
    """
    lora = read(source)
    check_strengths(lora, weights)
    writer.check_name(destination.stem)
    writer.check_free(destination, overwrite)
    scaled = {
        key: replace(stack, up=stack.up * stack.per_rank(torch.tensor(weights, dtype=torch.float32)))
        for key, stack in stacks(lora).items()
    }
    vectors = {key: added.scaled(weights) for key, added in vectors_of(lora).items()}
    name = destination.stem
    try:
        before = [float(w) for w in json.loads(lora.metadata["ziplora.strengths"])]
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        before = []
    told = len(before) == len(weights) and all(map(math.isfinite, before))
    before = before if told else [1.0] * len(weights)
    metadata = {
        **lora.metadata,
        "ss_output_name": name,
        "modelspec.title": name,
        "ziplora.strengths": json.dumps([round(a * b, 6) for a, b in zip(before, weights)]),
    }
    saved = _write(lora, destination, scaled, vectors, metadata, overwrite)
    card = lora.sidecar or {"activation text": lora.metadata.get("modelspec.trigger_phrase", "")}
    notes = f"{card.get('notes', '')} Baked from {lora.name} at {' : '.join(f'{w:.2f}' for w in weights)}.".strip()
    writer.write_beside(destination, ".json", writer.card(str(card.get("activation text", "")), notes, base=lora.base))
    return saved


def split(source: Path, destinations: Sequence[Path], overwrite: bool = False) -> list[dict]:
    """Writes each parent's half of a merged LoRA, as learned, as an ordinary LoRA with its metadata and card.

    destinations: one a parent, in their order. The halves add up to the merged LoRA; layers that a parent does not have
    are not in its half. Returns what the writer does, for each. Raises BadInput, before anything is written, for a file
    that is not ours and destinations that are not one a parent or the same, and as the writer does.
    """
    lora = read(source)
    parents = origins(lora)
    if len(destinations) != len(parents):
        names = ", ".join(f"{parent['role']} {parent['name']}" for parent in parents)
        raise BadInput(
            f"has {len(parents)} halves ({names}), but {len(destinations)} names are given for them",
            file=source.name,
            remedy="Give one for each, in that order",
        )
    # without their case, which not every file system tells apart
    if len({str(path.resolve()).lower() for path in (source, *destinations)}) <= len(destinations):
        raise BadInput("two of the halves, or a half and the whole, have the same name", remedy="Choose other names")
    for path in destinations:
        writer.check_name(path.stem)
        writer.check_free(path, overwrite)
    whole, vectors, halves, written = stacks(lora), vectors_of(lora), [], []
    for i, parent in enumerate(parents):
        half = {key: Stack.of([stack.part(i)]) for key, stack in whole.items() if stack.ranks[i]}
        own = {key: row for key, added in vectors.items() if (row := added.row(i)) is not None}
        if not half and not own:
            raise BadInput(f"has nothing of {parent['name']}", file=source.name, remedy="Merge again")
        halves.append((half, own))
    for parent, path, (half, own) in zip(parents, destinations, halves):
        rank = max((sum(stack.ranks) for stack in half.values()), default=0)
        metadata = half_metadata(path.stem, lora, parent, rank)
        try:
            written.append(_write(lora, path, half, own, metadata, overwrite))
        except OSError as error:
            names = ", ".join(done.name for done in destinations[: len(written)]) or "none"
            raise OSError(f"{path.name}: {error.strerror or error}; halves that were written: {names}") from error
        notes = f"The half of {parent['name']} in {lora.name}, as ZipLoRA merged it."
        writer.write_beside(path, ".json", writer.card(parent["trigger"], notes, base=lora.base))
    return written
