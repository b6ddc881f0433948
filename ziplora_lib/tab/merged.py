"""Picking one of the LoRAs that ZipLoRA merged, as the sections about such a LoRA begin."""

from __future__ import annotations

import gradio as gr

from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import QUIET, flat


class MergedPicker:
    """A picker and its refresh. `updates(name)` are updates for `[lora]`: those there are now, this one picked."""

    def __init__(self, place: Place, section: str):
        """section: as its elem_ids have it."""
        self.place = place
        self.lora = gr.Dropdown(
            [],
            label="Merged LoRA",
            info="One that ZipLoRA made, the newest first",
            elem_id=f"ziplora_{section}_lora",
            scale=3,
        )
        refresh = gr.Button("Refresh", elem_id=f"ziplora_{section}_refresh", min_width=80, scale=0)
        refresh.click(lambda: flat(self._rescan()), None, self.lora, **QUIET)

    def updates(self, name: str | None = None) -> list:
        names = [entry.name for entry, _ in self.place.catalogue.zipped()]
        return [gr.update(choices=names, value=name) if name in names else gr.update(choices=names)]

    def _rescan(self) -> list:
        self.place.host.refresh()
        return self.updates()
