"""The same seeds without LoRA, with each LoRA alone, with their plain sum, and merged: one row each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from ziplora_lib.hosts.host import Host
from ziplora_lib.job import preflight, prepare
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.attach import attach
from ziplora_lib.opening import attached
from ziplora_lib.recipe import Recipe


def row_labels(recipe: Recipe) -> list[str]:
    """What the rows show."""
    return ["no LoRA", *(f"{title} alone" for title in recipe.titles), "plain sum", "ZipLoRA"]


def comparison(recipe: Recipe, merged: Path, host: Host, seeds: Sequence[int]) -> list[list[Image.Image]]:
    """Pictures of the recipe's preview prompt, rows as labelled, a column a seed; the last row from the saved file."""
    parents = preflight(recipe.copy(update={"overwrite": True}), host)

    def row() -> list[Image.Image]:
        settings = (recipe.resolution, recipe.sampler_steps, recipe.guidance)
        return [host.decode(host.sample(recipe.picture_prompt, seed, *settings)) for seed in seeds]

    rows = []
    with host.session(recipe), host.embeddings(parents.loras):
        pairing, *_ = prepare(recipe, parents, host, lambda _: None)
        with attach(parents.slots, pairing.stacks, pairing.vectors) as router:
            each_alone = [partial(router.alone, i) for i in range(len(recipe.parents))]
            for choose in (router.bare, *each_alone, router.merged):
                choose()
                rows.append(row())
        with attached(read(merged), host):
            rows.append(row())
    return rows
