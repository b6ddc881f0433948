"""The same seeds without LoRA, with each LoRA alone, with their plain sum, and merged: one row each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ziplora_lib.hosts.host import Host
from ziplora_lib.job import preflight
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.attach import attach
from ziplora_lib.merge.pairing import pair
from ziplora_lib.recipe import Recipe

ROWS = ("no LoRA", "subject alone", "style alone", "plain sum", "ZipLoRA")


def comparison(recipe: Recipe, merged: Path, host: Host, seeds: Sequence[int]) -> list[list[Image.Image]]:
    """Pictures of the recipe's preview prompt, a row for each of ROWS, a column a seed; the last row from the saved file."""
    parents = preflight(recipe.copy(update={"overwrite": True}), host)
    file = read(merged)
    slots = host.slots(list(file.deltas))
    saved = pair([file], [1.0], {key: slot.shape for key, slot in slots.items()})

    def row() -> list[Image.Image]:
        settings = (recipe.resolution, recipe.sampler_steps, recipe.guidance)
        return [host.decode(host.sample(recipe.picture_prompt, seed, *settings)) for seed in seeds]

    rows = []
    with host.session(recipe):
        with attach(parents.slots, parents.pairing.stacks) as router:
            for choose in (router.bare, lambda: router.alone(0), lambda: router.alone(1), router.merged):
                choose()
                rows.append(row())
        with attach(slots, saved.stacks) as router:
            router.merged()
            rows.append(row())
    return rows
