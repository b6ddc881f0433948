"""The section Why: what a merge did to its parents, as a picture of blocks and groups, with the numbers behind it."""

from __future__ import annotations

import json
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ziplora_lib import charts
from ziplora_lib.errors import BadInput
from ziplora_lib.jobs import Job
from ziplora_lib.later import later
from ziplora_lib.tab import words
from ziplora_lib.tab.merged import MergedPicker
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import QUIET

if TYPE_CHECKING:
    from ziplora_lib.findings import Findings, Measure

effect, findings, why = later("ziplora_lib.merge.effect"), later("ziplora_lib.findings"), later("ziplora_lib.why")

# these have colours of one meaning, so that they can be compared
ONE_SCALE = {"overlap before": "overlap", "overlap after": "overlap"}


class Why:
    """`updates(name)` are updates for `filled`: the merged LoRAs as they are listed now, this one picked."""

    def __init__(self, place: Place):
        self.place = place
        # what is written to be downloaded; gone when the WebUI ends
        self._folder = tempfile.TemporaryDirectory(prefix="ziplora-")
        gr.HTML(words.line("Shows what a merge did to its LoRAs, from the files alone: the model is not asked."))
        with gr.Row():
            picker = MergedPicker(place, "why")
            button = gr.Button("Look", variant="primary", elem_id="ziplora_why_look", min_width=120, scale=0)
        said = gr.HTML(elem_id="ziplora_why_said")
        told = gr.HTML(elem_id="ziplora_why_summary")
        self.job = gr.State("")
        with gr.Column(visible=False, elem_id="ziplora_why_result") as result:
            self.kind = gr.Radio(
                [],
                label="Show",
                info="What the colours stand for",
                elem_id="ziplora_why_show",
            )
            self.of = gr.Radio([], visible=False, label="Of", info="Whose numbers these are", elem_id="ziplora_why_of")
            self.map = gr.HTML(elem_id="ziplora_why_map")
            most = gr.HTML(elem_id="ziplora_why_most")
            with gr.Accordion("All numbers by block", open=False, elem_id="ziplora_why_numbers"):
                blocks = gr.HTML(elem_id="ziplora_why_blocks")
            files = gr.File(
                label="Download: all layers as CSV, everything as JSON",
                file_count="multiple",
                interactive=False,
                elem_id="ziplora_why_files",
            )
        self.lora, self.filled, self.updates = picker.lora, [picker.lora], picker.updates
        self.outputs = [told, self.job, result, self.kind, self.of, self.map, most, blocks, files]
        place.runner.offer(button, self._prepare, [self.lora], said, self.show, self.outputs, "why")
        self.kind.input(self._turn, [self.job, self.kind], [self.of, self.map], **QUIET)
        self.of.input(self._draw, [self.job, self.kind, self.of], self.map, **QUIET)

    def _prepare(self, name: str | None) -> Job:
        if not name:
            raise BadInput("no LoRA is picked", remedy="Pick a LoRA that ZipLoRA made, or press Refresh")
        why.refuse(name, self.place.host)
        return Job("why", name, partial(why.look, name), name)

    def show(self, job: Job | None) -> list:
        """Updates for `outputs`: what was found, or why nothing was; None: a look has begun."""
        if job is None or job.result is None:
            text = ""
            if job is not None:
                text = words.line("Stopped.") if job.state == "stopped" else words.error(job.error or "", "Cannot look")
            hidden, fresh = gr.update(visible=False), gr.update()
            return [text, "", hidden, fresh, gr.update(visible=False), "", "", "", None]
        found: Findings = job.result
        kinds = [words.capital(kind) for kind in findings.KINDS]
        return [
            f"{words.line(findings.summary(found))}{words.warnings([words.capital(said) for said in found.warnings])}",
            job.id,
            gr.update(visible=True),
            gr.update(choices=kinds, value=kinds[0]),
            gr.update(visible=False),
            heat(found, found.measures[0]),
            most_changed(found),
            by_block(found),
            self._files(found),
        ]

    def _files(self, found: Findings) -> list[str]:
        # as the LoRA, without what a file's name cannot have everywhere
        name = re.sub(r"[^\w .()+-]", "_", found.name)
        written = {f"{name}-why.csv": found.csv(), f"{name}-why.json": json.dumps(found.public(), indent=1)}
        for file, text in written.items():
            Path(self._folder.name, file).write_text(text, encoding="utf-8")
        return [str(Path(self._folder.name, file)) for file in written]

    def _turn(self, job_id: str, choice: str) -> list:
        """Another kind of number: whose there are, and the map of the first."""
        measures = self._measures(job_id, choice)
        titles = [measure.of for measure in measures if measure.of]
        first = titles[0] if titles else None
        return [gr.update(choices=titles, value=first, visible=len(titles) > 1), self._draw(job_id, choice, first)]

    def _draw(self, job_id: str, choice: str, of: str | None) -> str:
        measures = self._measures(job_id, choice)
        if not measures:
            return words.line("These numbers are not kept any more: press Look again.")
        return heat(self.place.jobs[job_id].result, next((m for m in measures if m.of == (of or "")), measures[0]))

    def _measures(self, job_id: str, choice: str) -> list[Measure]:
        job = self.place.jobs.get(job_id)
        return [m for m in job.result.measures if words.capital(m.kind) == choice] if job and job.result else []


def build(place: Place) -> Why:
    return Why(place)


def heat(found: Findings, measure: Measure) -> str:
    """The heat map of one measure over blocks and groups; what is of one kind has one scale."""
    alike = [m for m in found.measures if _scale(m) == _scale(measure)]
    tops = (m.value(layers) for m in alike for layers in found.cells.values())
    return charts.heat_map(
        f"{words.capital(measure.title)}: {findings.KINDS[measure.kind]}",
        list(found.blocks),
        list(found.groups),
        {cell: measure.value(layers) for cell, layers in found.cells.items()},
        top=max((value for value in tops if value is not None), default=0.0),
    )


def _scale(measure: Measure) -> str:
    return ONE_SCALE.get(measure.kind, measure.kind)


def most_changed(found: Findings) -> str:
    """The layers that changed most, in a table."""
    keys = found.most_changed()
    if not keys:
        return ""
    titles = ["change", "overlap before", "overlap after", "norm of plain sum", "norm of merge"]
    rows = []
    for key in keys:
        values = found.values(effect.Layers((found.layers[key],)))
        rows.append([key, *(_number(values[title]) for title in titles)])
    head = words.line("The layers that changed most:")
    return head + _scrolled(words.table(["Layer", *map(words.capital, titles)], rows))


def by_block(found: Findings) -> str:
    """Every number of every block, of the groups and of all, in a table."""
    titles = [measure.title for measure in found.measures]
    named = {**found.blocks, **{f"all {group}": layers for group, layers in found.groups.items()}, "all": found.all}
    rows = []
    for name, layers in named.items():
        values = found.values(layers)
        rows.append([name, *(_number(values[title]) for title in titles)])
    explained = "".join(words.line(f"{kind}: {what}.", small=True) for kind, what in findings.KINDS.items())
    return _scrolled(words.table(["", *map(words.capital, titles)], rows)) + explained


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value >= 0.001 else f"{value:.3f}"


def _scrolled(table: str) -> str:
    return f"<div class='ziplora_heat_scroll'>{table}</div>"
