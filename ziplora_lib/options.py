"""The user's settings, kept by the host: the WebUI's settings page shows them, elsewhere they are as here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ziplora_lib.recipe import schema


@dataclass(frozen=True)
class Option:
    """default, what it is called, a line about it; choices, or bounds as (least, most, step).

    at_start: looked at when the page is made only.
    """

    default: Any
    label: str
    hint: str
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float, float] | None = None
    at_start: bool = False


def _of_recipe(field: str, label: str, step: int = 1) -> Option:
    """The default that the tab shows for a field of the recipe."""
    about = schema()["properties"][field]
    bounds = (about["minimum"], about["maximum"], step) if "minimum" in about else None
    return Option(about["default"], label, about["description"], tuple(about.get("enum", ())), bounds, True)


OPTIONS = {
    "folder": Option("", "Folder for new LoRAs", "below the Lora folder; empty: the Lora folder itself"),
    "name": Option("{subject}-{style}", "Name of new LoRAs", "{subject}, {style}, {method} and {date} are filled in"),
    "preview_size": _of_recipe("preview_size", "Preview size", 64),
    "thumbnails": Option(True, "Thumbnails", "pictures in the list of LoRAs"),
    "steps": _of_recipe("steps", "Steps"),
    "resolution": _of_recipe("resolution", "Resolution", 64),
    "dtype": _of_recipe("dtype", "Precision"),
    "memory": _of_recipe("memory", "Memory"),
    "balance_points": _of_recipe("balance_points", "Pictures along the balance", 2),
}
