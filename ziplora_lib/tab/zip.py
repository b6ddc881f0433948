"""The section Zip: the LoRAs, the settings, the preflight as they change, and what comes out."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

import gradio as gr

from ziplora_lib import access
from ziplora_lib.errors import BadInput
from ziplora_lib.jobs import Job
from ziplora_lib.later import later
from ziplora_lib.naming import named
from ziplora_lib.recipe import Recipe, schema
from ziplora_lib.tab import words
from ziplora_lib.tab.controls import ADVANCED, control, default_of, in_labels, recipe_of, shown
from ziplora_lib.tab.parents import MOST, Parents
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.preflight import ready
from ziplora_lib.tab.result import ResultCard
from ziplora_lib.tab.running import JS, QUIET
from ziplora_lib.tab.unfinished import Offer

if TYPE_CHECKING:
    from ziplora_lib.snapshot import Unfinished

merging = later("ziplora_lib.job")

OFF = "Off: others can reach this page, and no password stops them"
# what changes what the preflight says
CHECKED = (
    "method",
    "objective",
    "steps",
    "resolution",
    "samples",
    "pictures",
    "sampler_steps",
    "overwrite",
    "allow_same",
    "dtype",
    "text_encoders",
    "equal_norms",
    "dense_rank",
    "layer_names",
)


class Zip:
    """`settings` are the recipe's fields but the LoRAs; `use` gives updates for `filled` that put a recipe into the page."""

    def __init__(self, place: Place):
        self.place = place
        self.settings: dict[str, gr.components.Component] = {}
        host = place.host
        gr.HTML(words.line("Merges LoRAs, what is in the picture and how it looks, into one new LoRA."))
        if missing := host.missing():
            gr.HTML(words.error(missing, "Not here"), elem_id="ziplora_missing")
        self.unfinished = Offer(place, ".steps", "merge")
        self.parents = Parents(place)
        with gr.Row(elem_id="ziplora_main"):
            self.settings["output"] = control("output", host, scale=2)
            self.settings["steps"] = control("steps", host, scale=2)
            self.settings["seed"] = control("seed", host, scale=1)
        with gr.Accordion("Advanced", open=False, elem_id="ziplora_advanced"):
            for title, group in ADVANCED.items():
                gr.HTML(f"<h4>{title}</h4>", elem_classes=["ziplora_heading"])
                with gr.Row(elem_classes=["ziplora_grid"]):
                    self.settings |= {field: control(field, host, **self._layout(field)) for field in group}
        with gr.Row(elem_id="ziplora_buttons"):
            zip_button = gr.Button("Zip", variant="primary", elem_id="ziplora_zip", scale=3)
            check_button = gr.Button("Check", elem_id="ziplora_check", scale=1)
        said = gr.HTML(elem_id="ziplora_said")
        checked = gr.HTML(elem_id="ziplora_checked")
        self.result = ResultCard(place)
        self.inputs = [*self.parents.inputs, *self.settings.values()]
        self.filled = [*self.parents.filled, *self.settings.values(), checked]

        # the check that was asked for last in each page: an earlier one that takes longer must not overwrite its answer
        latest, numbers = {}, itertools.count()
        page_id = gr.Textbox(visible=False, elem_id="ziplora_page")

        def check(page: str, *values):
            latest[page] = mine = next(numbers)
            enough = len(self.parents.of(values)) > 1
            if not enough:
                yield ""
            for whole in (False, True) if enough else ():
                if latest.get(page) == mine and (answer := self._checked(values, whole)) and latest.get(page) == mine:
                    yield answer
            if latest.get(page) == mine:
                del latest[page]

        # gradio hands the outputs to a script too
        keeping = {JS: f"(...all) => ziplora_keep({MOST}, all.slice(1, {1 + len(self.inputs)}))"}

        def checking(event):
            """After an event: what headers tell at once, then norms and what the model leaves out."""
            then = event.then if hasattr(event, "then") else event
            then(check, [page_id, *self.inputs], checked, **keeping, **QUIET)

        output = self.settings["output"]
        self.parents.connect(output, self._name, checking)
        checking(output.blur)
        for field in CHECKED:
            checking(self.settings[field].change)
        check_button.click(check, [page_id, *self.inputs], checked, **keeping)

        def show(job: Job | None) -> list:
            return [*self.unfinished.shown(), *self.parents.listed(), *self.result.shown(job)]

        shown_after = [*self.unfinished.outputs, *self.parents.pickers, *self.result.outputs]
        place.runner.offer(zip_button, self._job, self.inputs, said, show, shown_after, "merge")
        going_on = self.unfinished.preparing(
            lambda one: self._checked_job(access.admitted(one.recipes[0], place.overwriting))
        )
        place.runner.offer(self.unfinished.go_on, going_on, [self.unfinished.which], said, show, shown_after, "merge")
        self.result.connect()

    def _layout(self, field: str) -> dict:
        off = field == "overwrite" and not self.place.overwriting
        return {"interactive": False, "info": OFF} if off else {}

    # --- recipes in and out ---------------------------------------------------------------------------------

    def recipe(self, values) -> Recipe:
        """What the page holds, as a recipe. Raises BadInput."""
        n = len(self.parents.inputs)
        recipe = recipe_of(self.parents.of(values[:n]), dict(zip(self.settings, values[n:])))
        return access.admitted(recipe, self.place.overwriting)

    def use(self, recipe: Mapping) -> list:
        """Updates for `filled`: the recipe's LoRAs and settings; what it does not say gets its default."""
        fields = schema()["properties"]
        values = {
            field: shown(field, recipe.get(field, default_of(field, self.place.host)))
            for field in self.settings
            if field in fields
        }
        if not self.place.overwriting:
            values["overwrite"] = False
        return [*self.parents.fill(recipe.get("parents", [])[:MOST], {}), *values.values(), ""]

    def _name(self, parents: list[dict]) -> str:
        try:
            return named(str(self.place.host.option("name")), parents, "ziplora")
        except BadInput:  # said when it is used
            return "-".join(parent["lora"] for parent in parents)

    def _checked(self, values, whole: bool) -> str:
        try:
            recipe = self.recipe(values)
            return ready(
                merging.preflight(recipe, self.place.host, whole).report, recipe, list(self.place.jobs.values()), whole
            )
        except BadInput as error:
            return words.error(in_labels(str(error)))
        except Exception as error:
            traceback.print_exc()
            return words.error(f"{type(error).__name__}: {error}")

    def _job(self, *values) -> Job:
        return self._checked_job(self.recipe(values))

    def _going_on(self, one: Unfinished) -> Job:
        return self._checked_job(access.admitted(one.recipes[0], self.place.overwriting))

    def _checked_job(self, recipe: Recipe) -> Job:
        # what headers tell is refused now, the rest by the job
        merging.preflight(recipe, self.place.host, values=False)
        return Job.merge(recipe)
