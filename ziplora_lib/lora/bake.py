"""Strengths after the fact, from the merged file alone: its first ranks are the subject's, the rest the style's.

Needs no model, no parents and no new optimisation: a strength scales columns of `lora_up`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.reader import Lora, read
from ziplora_lib.lora.stack import Stack

_DTYPE_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def stacks(lora: Lora) -> dict[str, Stack]:
    """A merged file's layers, split into its parents again. Raises BadInput for a LoRA that ZipLoRA did not make."""
    try:
        table = json.loads(lora.metadata["ziplora.ranks"])
        usual = tuple(table["*"])
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(
            "was not made by ZipLoRA, so its halves are not known",
            file=lora.path.name,
            remedy="Pick a LoRA that ZipLoRA made",
        ) from error
    split = {}
    for key, delta in lora.deltas.items():
        ranks = tuple(table.get(key, usual))
        if sum(ranks) != delta.rank:
            raise BadInput(
                f"has rank {delta.rank}, but its metadata says {' + '.join(map(str, ranks))}",
                file=lora.path.name,
                key=key,
                remedy="Another tool changed the file: merge again",
            )
        split[key] = Stack(delta.up.float() * delta.scale, delta.down.float(), ranks)
    return split


def bake(source: Path, destination: Path, weights: Sequence[float], overwrite: bool = False) -> dict:
    """Saves a merged LoRA at other strengths, one a parent, with its metadata and card; returns what the writer does.

    Raises BadInput for a file that is not ours, and as the writer does.
    """
    lora = read(source)
    writer.check_name(destination.stem)
    writer.check_free(destination, overwrite)
    scaled = {
        key: replace(stack, up=stack.up * stack.per_rank(torch.tensor(weights, dtype=torch.float32)))
        for key, stack in stacks(lora).items()
    }
    name = destination.stem
    try:
        before = [float(w) for w in json.loads(lora.metadata["ziplora.strengths"])]
    except (KeyError, ValueError, TypeError):
        before = [1.0] * len(weights)
    metadata = {
        **lora.metadata,
        "ss_output_name": name,
        "modelspec.title": name,
        "ziplora.strengths": json.dumps([round(a * b, 6) for a, b in zip(before, weights)]),
    }
    saved = writer.write(destination, scaled, _DTYPE_NAMES[lora.dtype], metadata, overwrite)
    card = lora.sidecar or {"activation text": lora.metadata.get("modelspec.trigger_phrase", "")}
    notes = f"{card.get('notes', '')} Baked from {lora.name} at {weights[0]:.2f} : {weights[1]:.2f}.".strip()
    writer.write_beside(destination, ".json", writer.card(str(card.get("activation text", "")), notes))
    return saved
