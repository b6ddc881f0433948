"""What may come from a page or over the network, decided once for the tab and the API: less than at the command line."""

from __future__ import annotations

from ziplora_lib import effort
from ziplora_lib.errors import BadInput
from ziplora_lib.recipe import Recipe

# as much as one job may take, in passes of the UNet at 1024 pixels: about three hours on an RTX 4090, the default 1,520
MOST_PASSES = 100_000
# pixels a side below which a pass hardly gets cheaper
SMALLEST = 512
# subjects times styles in Many
MOST_PAIRS = 10_000


def is_open(reachable: bool, password: object) -> bool:
    """Whether anybody may come: other machines reach this one, and no password stops them."""
    return bool(reachable and not password)


def check_overwriting(asked: bool, allowed: bool) -> None:
    """Raises BadInput for what would replace a LoRA where nobody may."""
    if asked and not allowed:
        raise BadInput(
            "overwriting is off, because others can reach this machine and no password stops them",
            remedy="Choose another output name, or start the WebUI with a password (--gradio-auth, --api-auth)",
        )


def admitted(recipe: Recipe, overwriting: bool) -> Recipe:
    """The recipe, if it may come from outside. Raises BadInput for one that may not, or would take half a day."""
    check_overwriting(recipe.overwrite, overwriting)
    check_effort(effort.passes(recipe), recipe.resolution)
    return recipe


def check_effort(passes: int, side: int) -> None:
    """Raises BadInput for more passes of the model, at this many pixels a side, than one job may ask for."""
    passes = round(passes * (max(side, SMALLEST) / 1024) ** 2)
    if passes > MOST_PASSES:
        raise BadInput(
            f"this would take {passes:,} passes of the model at 1024 pixels, and {MOST_PASSES:,} are the most here",
            remedy="Ask for fewer steps, samples, pictures or LoRAs, or for a smaller batch or resolution",
        )
