"""The same seeds without LoRA, with each LoRA alone, with their plain sum, and merged: one row each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ziplora_lib.drawing import Drawing, Sheet
from ziplora_lib.errors import Stopped
from ziplora_lib.hosts.host import Host
from ziplora_lib.job import preflight, prepare
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.attach import attach
from ziplora_lib.merge.method import Callback
from ziplora_lib.opening import attached
from ziplora_lib.recipe import Recipe


def comparison(
    recipe: Recipe,
    merged: Path,
    host: Host,
    seeds: Sequence[int],
    callback: Callback = lambda _: None,
    prompt: str = "",
) -> Sheet:
    """Pictures of the prompt, the recipe's own by default; a column a seed, the last row from the saved file.

    Raises BadInput as `job.preflight` does, and Stopped when it was stopped before the first picture.
    """
    recipe = recipe.copy(update={"overwrite": True, "preview_prompt": prompt or recipe.preview_prompt})
    if callback({"phase": "preflight", "step": 0, "steps": 1, "what": "opening the LoRAs"}):
        raise Stopped
    ready = preflight(recipe, host)
    labels = ["no LoRA", *(f"{title} alone" for title in recipe.titles), "plain sum", "ZipLoRA"]
    drawing = Drawing(host, recipe, labels, [f"seed {seed}" for seed in seeds], callback)
    with host.session(), host.embeddings(ready.loras):
        pairing, *_ = prepare(recipe, ready, host, callback)
        with attach(ready.slots, pairing.stacks, pairing.vectors) as router:
            each_alone = [partial(router.alone, i) for i in range(len(recipe.parents))]
            for choose in (router.bare, *each_alone, router.merged):
                drawing.row([(choose, seed) for seed in seeds])
        with attached(read(merged), host) as router:
            drawing.row([(router.merged, seed) for seed in seeds])
    return drawing.sheet()
