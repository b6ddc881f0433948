"""The tab, in sections: Zip, Strengths, Why, Many, History; one running job for all of them."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from ziplora_lib.hosts.host import Host
from ziplora_lib.jobs import Job
from ziplora_lib.tab import history, many, strengths, why
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import QUIET, Runner, flat
from ziplora_lib.tab.zip import Zip


def build(host: Host, jobs: dict[str, Job], overwriting: bool = True) -> None:
    """The tab, into the blocks that are being made.

    jobs: shared with the API; overwriting: whether a LoRA that is there may be replaced.
    """
    place = Place(host, jobs, Runner(host, jobs), overwriting)
    with gr.Column(elem_id="ziplora_tab"):
        place.runner.area()
        with gr.Tabs(elem_id="ziplora_sections") as sections:
            with gr.Tab("Zip", id="zip", elem_id="ziplora_section_zip"):
                zipping = Zip(place)
            with gr.Tab("Strengths", id="strengths", elem_id="ziplora_section_strengths") as to_strengths:
                strength = strengths.build(place)
            with gr.Tab("Why", id="why", elem_id="ziplora_section_why") as to_why:
                reasons = why.build(place)
            with gr.Tab("Many", id="many", elem_id="ziplora_section_many") as to_many:
                batch = many.build(place, zipping.settings)
            with gr.Tab("History", id="history", elem_id="ziplora_section_history") as to_history:
                past = history.build(
                    place,
                    lambda recipe: [*zipping.use(recipe), gr.update(selected="zip")],
                    [*zipping.filled, sections],
                )
    place.runner.connect()
    # their lists are read when they are looked at, not while the WebUI starts
    to_strengths.select(lambda: flat(strength.updates()), None, strength.filled, **QUIET)
    to_why.select(lambda: flat(reasons.updates()), None, reasons.filled, **QUIET)
    to_many.select(batch.listed, None, batch.pickers, **QUIET).then(*batch.looking, **QUIET)
    to_history.select(past.listed, None, past.outputs, **QUIET)
    for button, section, name in (
        (zipping.result.to_strengths, strength, "strengths"),
        (zipping.result.to_why, reasons, "why"),
    ):
        button.click(_onward(section.updates, name), zipping.result.tag, [*section.filled, sections], **QUIET)


def _onward(updates: Callable[[str], list], section: str) -> Callable[[str], list]:
    """From the result to another section, with the merged LoRA picked there."""

    def go(tag: str) -> list:
        return [*updates(tag.removeprefix("<lora:").rpartition(":")[0]), gr.update(selected=section)]

    return go
