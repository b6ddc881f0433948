"""The section History: what was merged lately and how, and a recipe back into the page, out of whatever file has it."""

from __future__ import annotations

import contextlib
import html
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from ziplora_lib.errors import BadInput
from ziplora_lib.later import later
from ziplora_lib.recipe import parse
from ziplora_lib.tab import words
from ziplora_lib.tab.controls import LABELS
from ziplora_lib.tab.parents import MOST
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import QUIET
from ziplora_lib.tab.uploads import Upload

records, writer = later("ziplora_lib.history"), later("ziplora_lib.lora.writer")

# merges that are shown, the newest
RECENT = 60
NOTHING = "Nothing was merged yet: what you zip will stand here. A recipe from elsewhere can be dropped below."
# fields that have rows of their own
_TOLD = {"parents", "output", "method", "steps", "lr", "seed", "resolution"}


class History:
    """`listed()` gives updates for `outputs`: the merges as they are now, for a page that is loaded or a merge that ended."""

    def __init__(self, place: Place, use: Callable[[dict], list], outputs: Sequence[gr.components.Component]):
        """use(recipe): updates for `outputs` that put a recipe into the page; a LoRA that is gone is None in it."""
        self.place, self.use, self.others = place, use, list(outputs)
        self._folder = tempfile.TemporaryDirectory(prefix="ziplora_recipes_")  # gone when the program ends
        # what is shown in the gallery, by name in its order; the recipe that is shown
        self.names, self.chosen = gr.State([]), gr.State({})
        with gr.Row():
            self.nothing = gr.HTML(elem_id="ziplora_history_nothing")
            refresh = gr.Button("Refresh", elem_id="ziplora_history_refresh", min_width=100, scale=0)
        self.gallery = gr.Gallery(
            label="Merged LoRAs, the newest first: click one to see its recipe",
            columns=5,
            object_fit="cover",
            allow_preview=False,
            show_share_button=False,
            visible=False,
            elem_id="ziplora_history_gallery",
        )
        drop = Upload(
            label="Drop a merged LoRA, its preview picture or a recipe (.json): the Zip section gets its settings",
            file_types=[".safetensors", ".png", ".json"],
            height=140,
            elem_id="ziplora_history_drop",
        )
        self.said = gr.HTML(elem_id="ziplora_history_said")
        with gr.Column(visible=False, elem_id="ziplora_history_recipe") as self.card:
            self.lines = gr.HTML(elem_id="ziplora_history_lines")
            with gr.Row():
                use_button = gr.Button("Use these settings", variant="primary", elem_id="ziplora_history_use", scale=1)
                self.file = gr.File(
                    label="Download recipe", interactive=False, height=80, elem_id="ziplora_history_file", scale=2
                )
            with gr.Accordion("The recipe as JSON, as the API takes it", open=False, elem_id="ziplora_history_json"):
                self.code = gr.Code(
                    language="json", label="Recipe", interactive=False, elem_id="ziplora_history_code"
                )  # fmt: skip
        self.outputs = [self.gallery, self.nothing, self.names]
        shown = [self.card, self.lines, self.code, self.file, self.chosen]
        refresh.click(self._renewed, None, self.outputs, **QUIET)
        self.gallery.select(self._selected, self.names, [self.said, *shown], **QUIET)
        use_button.click(self._used, self.chosen, [self.said, *self.others], **QUIET)
        drop.upload(self._dropped, drop, [self.said, *shown, *self.others], **QUIET)

    # --- the list --------------------------------------------------------------------------------------

    def listed(self) -> list:
        """Updates for `outputs`."""
        found = records.merges(self.place.catalogue, RECENT)
        pictures = [(str(past.picture) if past.picture else _blank(), _caption(past)) for past in found]
        nothing = words.line(NOTHING) if not found else ""
        return [gr.update(value=pictures, visible=bool(found)), nothing, [past.name for past in found]]

    def _renewed(self) -> list:
        with contextlib.suppress(BadInput):  # no Lora extension: the Zip section says so
            self.place.host.refresh()
        return self.listed()

    def _selected(self, names: list[str], chosen: gr.SelectData) -> list:
        name = names[chosen.index] if chosen.index < len(names) else ""
        past = next((past for past in records.merges(self.place.catalogue, RECENT) if past.name == name), None)
        if past is None:
            return [words.error("it is not there any more. Press Refresh.", "Cannot show it"), *_no_recipe()]
        if past.problem:
            return [words.error(past.problem, "Cannot show it"), *_no_recipe()]
        return ["", *self._shown(past.name, past.recipe, past.notes, _date(past.when))]

    def _shown(self, name: str, recipe: dict, notes: Sequence[str], when: str = "") -> list:
        """The card of a recipe. name: what the LoRA or the file with it is called."""
        text = records.as_json(recipe)
        head = f"<h4>{html.escape(name)}{when and f', {when}'}</h4>"
        notes = [f"not in the recipe: {note}" for note in notes]
        told = head + words.table(["Setting", "Value"], _rows(name, recipe)) + words.warnings(notes)
        return [gr.update(visible=True), told, text, self._download(recipe["output"], text), recipe]

    def _download(self, name: str, text: str) -> str:
        try:
            path = Path(self._folder.name) / f"{writer.check_name(name)}.recipe.json"
        except BadInput:  # a recipe that was written by hand
            path = Path(self._folder.name) / "recipe.json"
        path.write_text(text + "\n", encoding="utf-8")
        return str(path)

    # --- back into the page ------------------------------------------------------------------------------

    def _used(self, recipe: dict) -> list:
        if not recipe:
            return [words.error("no merge is picked. Click one above.", "Nothing to use"), *self._as_they_are()]
        try:
            return self._put(recipe, f"The Zip section has the settings of {recipe['output']} now", [])
        except BadInput as error:
            return [words.error(str(error), "Cannot use it"), *self._as_they_are()]

    def _dropped(self, file) -> list:
        try:
            path = Path(file if isinstance(file, str) else file.name)
            recipe, notes = records.understood(records.recipe_from(path), path.name)
            said, *updates = self._put(recipe, f"Restored from {path.name}: {records.in_words(recipe)}", notes)
            return [said, *self._shown(path.name, recipe, notes), *updates]
        except BadInput as error:
            return [words.error(str(error), "Cannot read it"), *_no_recipe(), *self._as_they_are()]

    def _put(self, recipe: dict, said: str, notes: Sequence[str]) -> list:
        """What is said, and the updates of the Zip section. Raises BadInput."""
        try:
            names = self.place.host.loras()
        except BadInput:  # no Lora extension, so no LoRAs
            names = []
        fields, gone = records.matched(recipe, names)
        missing = [f"{title} is not there now: pick another LoRA in its place, or refresh the list" for title in gone]
        missing += [f"{parent['lora']}: the page has room for {MOST} LoRAs" for parent in recipe["parents"][MOST:]]
        missing += [f"not restored: {note}" for note in notes]
        return [words.line(said + ".") + words.warnings(missing), *self.use(fields)]

    def _as_they_are(self) -> list:
        return [gr.update() for _ in self.others]


def build(place: Place, use: Callable[[dict], list], outputs: Sequence[gr.components.Component]) -> History:
    """The section, inside a gr.Tab. use(recipe): updates for `outputs`, the Zip section's components."""
    return History(place, use, outputs)


def _no_recipe() -> list:
    return [gr.update(visible=False), "", "", None, {}]


def _blank() -> Image.Image:
    """In the place of a preview that there is none of."""
    return Image.new("RGB", (64, 64), (128, 128, 128))


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def _caption(past: records.Past) -> str:
    """Name, parents, method and date: a line each."""
    told = past.problem and "its recipe cannot be read"
    return "\n".join([past.name, told or " + ".join(past.parents), *filter(None, [past.method]), _date(past.when)])


def _rows(name: str, recipe: dict) -> list[list]:
    """A recipe in readable lines: its LoRAs, what most ask for, and every setting that is not the usual one."""
    usual = {"parents": recipe["parents"], "output": "", "objective": recipe.get("objective", "guided")}
    usual = json.loads(parse(usual).json()) | {"objective": "guided"}
    full = {**usual, **recipe}
    rows = []
    for parent in full["parents"]:
        prompt = f", prompt “{parent['prompt']}”" if parent.get("prompt") else ""
        rows.append(
            [words.capital(parent["role"]), f"{parent['lora']} at strength {parent.get('strength', 1):g}{prompt}"]
        )
    steps = f", {full['steps']} steps, learning rate {full['lr']:g}" if full["method"] == "ziplora" else ""
    rows.append(["Method", full["method"] + steps])
    rows.append(["Seed", full["seed"]])
    rows.append(["Resolution", f"{full['resolution']} pixels"])
    others = {field: value for field, value in full.items() if field not in _TOLD and value != usual.get(field)}
    rows += [
        [LABELS.get(field, field), "on" if value is True else "off" if value is False else value]
        for field, value in others.items()
    ]
    return [*rows, ["Merged as", recipe["output"]]] if recipe["output"] != name else rows
