"""The section Strengths: a merged LoRA's two sides made stronger or weaker after the fact, seen in pictures, saved, split."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ziplora_lib import access
from ziplora_lib.errors import BadInput
from ziplora_lib.jobs import Job
from ziplora_lib.later import later
from ziplora_lib.merge import balance
from ziplora_lib.naming import ROLES, at_balance, at_strengths, of_halves
from ziplora_lib.pictures import png
from ziplora_lib.tab import words
from ziplora_lib.tab.controls import property_of
from ziplora_lib.tab.merged import MergedPicker
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import QUIET

if TYPE_CHECKING:
    from ziplora_lib.lora.reader import Lora

bake, drawing, merging = later("ziplora_lib.lora.bake"), later("ziplora_lib.drawing"), later("ziplora_lib.job")

POINTS = 5
# the first grid: around the strengths that were learned
LISTED = "0.6, 0.8, 1, 1.2"


@dataclass(frozen=True)
class Asked:
    """A sheet that was asked for. chosen: for each picture what it sets the sliders to, (balance,) or (first, second)."""

    name: str
    plan: drawing.Plan
    chosen: list[tuple[float, ...]]


class Strengths:
    """`updates(name)` are updates for `filled`: the merged LoRAs as they are listed now, this one picked.

    `saved` are the events after which there are new LoRAs.
    """

    def __init__(self, place: Place):
        self.place = place
        # what is written to be downloaded; gone when the WebUI ends
        self._folder = tempfile.TemporaryDirectory(prefix="ziplora-")
        gr.HTML(words.line("Makes the two sides of a merged LoRA stronger or weaker, without learning again."))
        with gr.Row():
            picker = MergedPicker(place, "strengths")
        self.note = gr.HTML(elem_id="ziplora_strengths_note", elem_classes=["ziplora_note"])
        with gr.Row():
            self.prompt = gr.Textbox(
                label="Prompt",
                info="What is drawn; the prompt of its preview if empty",
                lines=2,
                elem_id="ziplora_strengths_prompt",
                scale=3,
            )
            self.seed = gr.Number(
                None,
                precision=0,
                label="Seed",
                info="The same for every picture",
                elem_id="ziplora_strengths_seed",
                scale=1,
            )
            about = property_of("resolution")
            self.size = gr.Slider(
                about["minimum"],
                about["maximum"],
                about["default"],
                step=64,
                label="Size",
                info="Side of a picture in pixels",
                elem_id="ziplora_strengths_size",
                scale=1,
            )
        with gr.Row(equal_height=False):
            with gr.Column(variant="compact", elem_id="ziplora_strengths_by_balance", min_width=280):
                self.point = gr.Slider(
                    -1,
                    1,
                    0,
                    step=0.05,
                    label="Balance",
                    info=_balance_hint("subject", "style"),
                    elem_id="ziplora_strengths_balance",
                )
                draw_balance = gr.Button(
                    "Draw the balance", variant="primary", elem_id="ziplora_strengths_draw_balance"
                )
            with gr.Column(variant="compact", elem_id="ziplora_strengths_by_two", min_width=280):
                with gr.Row():
                    self.first, self.second = (
                        gr.Slider(
                            0,
                            2,
                            1,
                            step=0.05,
                            label=_label(side),
                            info="0: without it, 1: as learned",
                            elem_id=f"ziplora_strengths_{which}",
                        )
                        for which, side in (("first", "subject"), ("second", "style"))
                    )
                with gr.Row():
                    self.firsts, self.seconds = (
                        gr.Textbox(
                            LISTED,
                            label=_label(side, many=True),
                            info=f"The grid's {across}, with commas between",
                            max_lines=1,
                            elem_id=f"ziplora_strengths_{which}_list",
                        )
                        for which, side, across in (("first", "subject", "columns"), ("second", "style", "rows"))
                    )
                draw_grid = gr.Button("Draw the grid", elem_id="ziplora_strengths_draw_grid")
        said = gr.HTML(elem_id="ziplora_strengths_said")
        self.gallery = gr.Gallery(
            label="Click the one you like: its balance or strengths go into the sliders",
            visible=False,
            object_fit="contain",
            show_share_button=False,
            elem_id="ziplora_strengths_gallery",
        )
        self.summary = gr.HTML(elem_id="ziplora_strengths_summary")
        self.sheet = gr.File(
            label="Download: all pictures in one, with their strengths at the edges",
            visible=False,
            interactive=False,
            elem_id="ziplora_strengths_sheet",
        )
        self.chosen = gr.State([])
        with gr.Row():
            self.output = gr.Textbox(
                label="Save as",
                info="Another LoRA beside the first; named after its balance or strengths if empty",
                max_lines=1,
                elem_id="ziplora_strengths_name",
                scale=3,
            )
            save_balance = gr.Button(
                "Save the balance", elem_id="ziplora_strengths_save_balance", min_width=160, scale=1
            )
            save_two = gr.Button("Save the two strengths", elem_id="ziplora_strengths_save_two", min_width=160, scale=1)
        with gr.Row():
            self.halves = gr.Textbox(
                label="Split into",
                info="A name for each LoRA that is in it, with commas between",
                max_lines=1,
                elem_id="ziplora_strengths_halves",
                scale=3,
            )
            split = gr.Button("Split", elem_id="ziplora_strengths_split", min_width=160, scale=1)
        done = gr.HTML(elem_id="ziplora_strengths_saved")

        self.lora, self.filled, self.updates = picker.lora, [picker.lora], picker.updates
        self.outputs = [self.gallery, self.summary, self.sheet, self.chosen]
        sliders = [self.point, self.first, self.second]
        lists = [self.firsts, self.seconds]
        look = [self.lora, self.prompt, self.seed, self.size]
        offered = place.runner.offer
        offered(draw_balance, self._strip_job, look, said, self.show, self.outputs, "strip")
        offered(draw_grid, self._grid_job, [*look, *lists], said, self.show, self.outputs, "grid")
        about_it = [self.note, self.prompt, self.seed, self.size, *sliders, *lists, self.output, self.halves, done]
        self.lora.change(self._picked, self.lora, [*about_it, *self.outputs], **QUIET)
        self.gallery.select(_choose, self.chosen, sliders, **QUIET)
        self.saved = [
            save_balance.click(self._save_balance, [self.lora, self.point, self.output], [*self.filled, done]),
            save_two.click(self._save_two, [self.lora, self.first, self.second, self.output], [*self.filled, done]),
            split.click(self._split, [self.lora, self.halves], [*self.filled, done]),
        ]

    # --- picking ---------------------------------------------------------------------------------------

    def _picked(self, name: str | None) -> list:
        """What is known of the LoRA goes into the page; pictures of the last one leave it."""
        sides, halves, prompt, seed, size, note = ("subject", "style"), [], "", None, gr.update(), ""
        try:
            if name:
                lora = self._opened(name)
                parents, recipe = bake.origins(lora), drawing.recipe_of(lora)
                sides, halves = balance.sides(*drawing.cast(lora)), of_halves(lora.name, parents)
                prompt, seed, size = recipe.picture_prompt, recipe.seed, recipe.picture_size
                note = words.line("Merged of " + " and ".join(f"{p['role']} {p['name']}" for p in parents) + ".")
        except BadInput as error:
            note = words.error(str(error), "Cannot read it")
        return [
            *(note, prompt, seed, size),
            gr.update(value=0, info=_balance_hint(*sides)),
            *(gr.update(value=1, label=_label(side)) for side in sides),
            *(gr.update(label=_label(side, many=True)) for side in sides),
            *("", ", ".join(halves), ""),
            *self.show(None),
        ]

    def _opened(self, name: str | None) -> Lora:
        """What its file says of the picked LoRA. Raises BadInput."""
        if not name:
            raise BadInput("no LoRA is picked", remedy="Pick a LoRA that ZipLoRA made, or press Refresh")
        return self.place.host.peek(name)

    # --- drawing ---------------------------------------------------------------------------------------

    def _strip_job(self, name: str | None, prompt: str, seed: int | None, size: int) -> Job:
        lora = self._opened(name)
        recipe = drawing.recipe_of(lora, prompt.strip(), seed=seed, resolution=size)
        plan = _admitted(drawing.along_balance(lora, recipe, [recipe.seed], POINTS))
        asked = Asked(lora.name, plan, [(point,) for point in balance.points(POINTS)])
        return Job(
            "strip",
            f"{lora.name} along the balance",
            lambda host, callback: drawing.draw(host, name, plan, callback),
            asked,
        )

    def _grid_job(self, name: str | None, prompt: str, seed: int | None, size: int, firsts: str, seconds: str) -> Job:
        lora = self._opened(name)
        recipe = drawing.recipe_of(lora, prompt.strip(), seed=seed, resolution=size)
        sides = balance.sides(*drawing.cast(lora))
        across, down = (_numbers(text, _label(side, many=True)) for text, side in zip((firsts, seconds), sides))
        plan = _admitted(drawing.over_strengths(lora, recipe, [recipe.seed], across, down))
        asked = Asked(lora.name, plan, [(x, y) for y in down for x in across])
        return Job(
            "grid",
            f"{lora.name} at other strengths",
            lambda host, callback: drawing.draw(host, name, plan, callback),
            asked,
        )

    def show(self, job: Job | None) -> list:
        """Updates for `outputs`: what was drawn, or why nothing was; None: nothing yet."""
        if job is None or job.result is None or not job.result.rows:
            text = ""
            if job is not None and job.result is not None:
                text = words.line(words.GONE)
            elif job is not None and job.state == "failed":
                text = words.error(job.error or "", "Cannot draw")
            elif job is not None:
                text = words.line("Stopped before the first picture.")
            return [gr.update(value=[], visible=False), text, gr.update(value=None, visible=False), []]
        sheet: drawing.Sheet = job.result
        asked: Asked = job.asked
        recipe = asked.plan.recipe
        wanted = len(asked.chosen)
        count = f"{len(sheet.pictures)} of {wanted} pictures, then stopped" if sheet.stopped else f"{wanted} pictures"
        text = f"{asked.name}: {count}, seed {recipe.seed}, {recipe.picture_size} pixels, “{sheet.prompt}”"
        path = Path(self._folder.name, f"{asked.name}-{job.kind}.png")
        path.write_bytes(png(sheet.whole))
        return [
            gr.update(value=sheet.pictures, columns=len(sheet.column_labels), visible=True),
            words.line(text, small=True),
            gr.update(value=str(path), visible=True),
            asked.chosen,
        ]

    # --- saving ----------------------------------------------------------------------------------------

    def _save_balance(self, name: str | None, point: float, output: str) -> list:
        def save() -> list[dict]:
            roles, names = drawing.cast(self._opened(name))
            wanted = output.strip() or at_balance(name, point, balance.side(point, roles, names))
            return [merging.bake_balance(self.place.host, name, wanted, balance.weights(point, roles))]

        return self._told(save)

    def _save_two(self, name: str | None, first: float, second: float, output: str) -> list:
        def save() -> list[dict]:
            roles, _ = drawing.cast(self._opened(name))
            wanted = output.strip() or at_strengths(name, first, second)
            return [merging.bake_balance(self.place.host, name, wanted, balance.spread(first, second, roles))]

        return self._told(save)

    def _split(self, name: str | None, halves: str) -> list:
        def save() -> list[dict]:
            self._opened(name)
            return merging.split_merged(
                self.place.host, name, [half.strip() for half in halves.split(",") if half.strip()]
            )

        return self._told(save)

    def _told(self, save: Callable[[], list[dict]]) -> list:
        """Updates for `filled` and what came of saving, in words."""
        try:
            done = save()
        except (BadInput, OSError) as error:
            return [*(gr.update() for _ in self.filled), words.error(str(error), "Not saved")]
        tags = " and ".join(f"{saved['tag']} ({words.size(saved['bytes'])})" for saved in done)
        return [*self.updates(), words.line(f"Saved: {tags}")]


def build(place: Place) -> Strengths:
    return Strengths(place)


def _admitted(plan: drawing.Plan) -> drawing.Plan:
    """The plan, if it does not take half a day."""
    pictures = sum(map(len, plan.cells))
    access.check_effort(2 * plan.recipe.sampler_steps * pictures, plan.recipe.picture_size)
    return plan


def _balance_hint(first: str, second: str) -> str:
    return f"-1: more {first}, 0: as learned, 1: more {second}"


def _label(side: str, many: bool = False) -> str:
    """Of a slider, or of a list. side: subject or style, or LoRAs by name."""
    what = "strengths" if many else "strength"
    return f"{side.capitalize()} {what}" if side in ROLES else f"{what.capitalize()} of {side}"


def _choose(chosen: Sequence[Sequence[float]], picture: gr.SelectData) -> list:
    """The sliders of a picture that was clicked; what it does not say stays."""
    said = chosen[picture.index] if picture.index < len(chosen) else ()
    unchanged = [gr.update()] * 3
    if len(said) == 1:
        return [said[0], *unchanged[1:]]
    return [unchanged[0], *said] if said else unchanged


def _numbers(text: str, label: str) -> list[float]:
    """Strengths that were typed, each once. Raises BadInput for what is none."""
    found = []
    for word in re.split(r"[\s,;]+", (text or "").strip(" ,;\n")):
        try:
            number = float(word)
        except ValueError as error:
            raise BadInput(f"{label}: {word!r} is not a number", remedy=f"For instance {LISTED}") from error
        found.append(number)
    found = list(dict.fromkeys(found))
    if len(found) > drawing.MOST:
        raise BadInput(f"{label}: {len(found)} numbers are too many", remedy=f"Ask for 1 to {drawing.MOST}")
    return found
