"""When memory runs out: how the same merge is done with less of it."""

from __future__ import annotations

import gc

import torch

from ziplora_lib.merge import NEEDS_MODEL
from ziplora_lib.recipe import Recipe


def sparing(recipe: Recipe) -> tuple[Recipe, str] | None:
    """The next more sparing way to the same merge, and what it is in words; None where there is none.

    Pictures are not made smaller by themselves: that would be another merge.
    """
    if recipe.method in NEEDS_MODEL and recipe.at_once > 1:
        return recipe.copy(update={"at_once": 1}), "one sample at once"
    if recipe.method == "ziplora" and not recipe.checkpointing:
        return recipe.copy(update={"checkpointing": True}), "blocks computed again in the backward"
    return None


def give_back() -> None:
    """What a broken-off run has left goes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
