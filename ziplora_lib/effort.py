"""What a merge will take: counted in passes of the UNet, and in seconds once one was timed on this machine."""

from __future__ import annotations

from collections.abc import Iterable

from ziplora_lib.merge import BY_STEPS, NEEDS_MODEL
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.recipe import Recipe

# no weight has a gradient, so a backward is about as much work as a forward (benchmarks/results/footprint.json); and once
# more where blocks are recomputed
BACKWARD, RECOMPUTED = 1, 1


def passes(recipe: Recipe) -> int:
    """Forward passes of one picture through the UNet that a merge takes, backwards counted as such."""
    pictured = 2 * recipe.sampler_steps  # two rows a step, under guidance
    previews = recipe.balance_points * pictured
    if recipe.method not in NEEDS_MODEL:
        return previews
    parents, rows = len(recipe.parents), 2 if recipe.loss_guidance > 1 else 1
    held_out = recipe.held_out
    made = sum(0 if parent.reference else recipe.pictures * pictured for parent in recipe.parents)
    objective = OBJECTIVES[recipe.objective]
    of_taught = rows + objective.against_bare
    predicted = (recipe.taught * of_taught + held_out * (1 + rows)) * parents
    observed = recipe.samples * parents if objective.warm_start or recipe.method not in BY_STEPS else 0
    judged = 2 * held_out * parents * rows
    learned = 0
    if recipe.method in BY_STEPS:
        step = recipe.batch * parents * rows
        learned = recipe.steps * step * (1 + BACKWARD + (0 if recipe.memory == "fast" else RECOMPUTED))
        judged += 5 * held_out * parents * rows
    return made + predicted + observed + learned + judged + previews


def expected(recipe: Recipe, timed: Iterable[tuple[Recipe, float]]) -> float | None:
    """Seconds, by the last merge that was timed at the same resolution; None where there was none."""
    rates = [seconds / passes(other) for other, seconds in timed if other.resolution == recipe.resolution]
    return rates[-1] * passes(recipe) if rates else None


def as_pictures(recipe: Recipe) -> int:
    """As long as how many ordinary pictures, of the recipe's sampler steps."""
    return max(1, round(passes(recipe) / (2 * recipe.sampler_steps)))
