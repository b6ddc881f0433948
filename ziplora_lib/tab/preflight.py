"""What is said of the LoRAs that are picked, before any work: side by side, with what is wrong in red."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from ziplora_lib import effort
from ziplora_lib.jobs import Job
from ziplora_lib.lora.keys import span
from ziplora_lib.merge import BY_STEPS, NEEDS_MODEL
from ziplora_lib.recipe import Recipe
from ziplora_lib.tab import words
from ziplora_lib.tab.controls import in_labels


def ready(report: Mapping, recipe: Recipe, jobs: Sequence[Job], whole: bool) -> str:
    """The preflight: a line, a table with a column for each LoRA, what it takes, and what is worth knowing.

    whole: the files were read, and not their headers alone.
    """
    parents = report["parents"]
    model = report["model"]
    on = f" on {model['name']}" if model else ""
    done = "learned" if recipe.method in NEEDS_MODEL else "added as they are"
    said = f"{report['learned_layers']} layers are {done}{on}, {report['shared_layers']} of them are in all LoRAs."
    if not model:
        said += " No checkpoint is loaded yet: whether it fits will be seen then."
    head = f"<p><b>Ready:</b> {html.escape(said)}</p>"
    return (
        head
        + _side_by_side(parents, recipe.strengths, whole)
        + words.line(_effort(report, recipe, jobs))
        + words.warnings(map(in_labels, report["warnings"]))
    )


def _side_by_side(parents: Sequence[Mapping], strengths: Sequence[float], whole: bool) -> str:
    def row(title: str, cells: Sequence[str]) -> str:
        return f"<tr><th scope='row'>{title}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

    def plain(values: Sequence[object]) -> list[str]:
        return [html.escape(str(value)) for value in values]

    heads = "".join(f"<th scope='col'>{html.escape(words.capital(p['title']))}</th>" for p in parents)
    rows = [
        row("LoRA", plain([p["name"] for p in parents])),
        row("Base", plain([p["base"] for p in parents])),
        row("Kind", plain([", ".join(p["kinds"]) for p in parents])),
        row("Rank", plain([span(p["ranks"]) or "none" for p in parents])),
        row("Layers", plain([_matched(p) for p in parents])),
        row("Norm", _bars([p["norm"] and p["norm"] * w for p, w in zip(parents, strengths)], whole)),
    ]
    return (
        f"<table class='ziplora_table'><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _matched(parent: Mapping) -> str:
    if parent["matched"] == parent["layers"]:
        return str(parent["layers"])
    return f"{parent['layers']}, {parent['matched']} of them in the model"


def _bars(norms: Sequence[float | None], whole: bool) -> list[str]:
    """‖ΔW‖ at its strength as bars, the strongest full; "…" while only headers are read."""
    known = [norm for norm in norms if norm]
    unknown = "known when the model has opened it" if whole else "…"
    return [
        unknown
        if norm is None
        else f"<span class='ziplora_bar' style='--part: {norm / max(known, default=1):.3f}'></span> {norm:.3g}"
        for norm in norms
    ]


def _effort(report: Mapping, recipe: Recipe, jobs: Sequence[Job]) -> str:
    timed = [(job.asked, job.seconds) for job in jobs if job.kind == "merge" and job.state == "done"]
    seconds = effort.expected(recipe, timed)
    if seconds is None:
        pictures = effort.as_pictures(recipe)
        time = f"as long as about {pictures} picture{'s' * (pictures > 1)} of {recipe.resolution} pixels"
    else:
        time = f"about {words.duration(seconds)}, by the last merge here"
    factors = 4 * report["bytes"] / {"fp16": 2, "bf16": 2, "fp32": 4}[recipe.dtype]
    said = (
        f"The new file will have {words.size(report['bytes'])}. It takes {time}; memory, beside what the model itself "
        f"needs, {words.size(factors)} for the LoRAs."
    )
    if recipe.method in BY_STEPS and recipe.memory == "auto" and report["free_memory"] is not None:
        said += f" Free now: {words.size(report['free_memory'])}; how the steps save memory is chosen when they begin."
    return said
