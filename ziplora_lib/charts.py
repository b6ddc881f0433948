"""Charts as SVG and HTML: text in the page's own colours, which a theme may change, and no library to load for them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 170, 42, 22, 8
# told apart without colours too: every curve has its own dashes, and its name at the side
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")


def curves(title: str, series: dict[str, Sequence[float]]) -> str:
    """A line for each series over the steps, with its last value. "" without at least two steps."""
    known = {name: list(values) for name, values in series.items() if len(values) > 1}
    if not known:
        return ""
    steps = max(map(len, known.values()))
    lowest = min(0.0, *(min(values) for values in known.values()))
    highest = max(max(values) for values in known.values())
    span = (highest - lowest) or 1.0

    def point(i: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 6) * i / (steps - 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - lowest) / span)
        return f"{x:.1f},{y:.1f}"

    lines, legend = [], []
    for k, (name, values) in enumerate(known.items()):
        points = " ".join(point(i, value) for i, value in enumerate(values))
        look = f"class='ziplora_curve ziplora_curve_{k % 6}' stroke-dasharray='{DASHES[k % len(DASHES)]}'"
        lines.append(f"<polyline {look} points='{points}' fill='none'/>")
        swatch = f"<svg width='26' height='8' aria-hidden='true'><line x1='0' y1='4' x2='26' y2='4' {look}/></svg>"
        legend.append(f"<li>{swatch} {html.escape(name)} <b>{values[-1]:.3f}</b></li>")
    bottom = HEIGHT - BOTTOM
    axes = (
        f"<path class='ziplora_axis' d='M{LEFT} {TOP}V{bottom}H{WIDTH - 6}' fill='none'/>"
        f"<text x='{LEFT - 5}' y='{TOP + 8}' text-anchor='end'>{highest:.2g}</text>"
        f"<text x='{LEFT - 5}' y='{bottom}' text-anchor='end'>{lowest:.2g}</text>"
        f"<text x='{LEFT}' y='{HEIGHT - 6}'>1</text>"
        f"<text x='{WIDTH - 6}' y='{HEIGHT - 6}' text-anchor='end'>step {steps}</text>"
    )
    said = "; ".join(f"{name} {values[0]:.3f} to {values[-1]:.3f}" for name, values in known.items())
    return (
        f"<figure class='ziplora_chart'><figcaption>{html.escape(title)}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{html.escape(f'{title}: {said}', quote=True)}'>"
        f"{axes}{''.join(lines)}</svg><ul>{''.join(legend)}</ul></figure>"
    )


def learning(history: Sequence[dict], titles: Sequence[str], penalised: bool) -> str:
    """How a merge learns: the terms of its loss, and mean |m| of every LoRA. titles: the LoRAs'; penalised: λ is not 0."""
    if len(history) < 2:
        return ""
    of = dict(enumerate(titles))
    parents = len(history[-1].get("errors", []))
    terms = {f"on the {of.get(i, f'LoRA {i + 1}')}": [step["errors"][i] for step in history] for i in range(parents)}
    if penalised:
        terms["overlap, before its weight"] = [step.get("penalty", 0.0) for step in history]
    terms = {"loss": [step["loss"] for step in history], **terms}
    means = {
        of.get(i, f"LoRA {i + 1}"): [step["mean_m"][i] for step in history]
        for i in range(len(history[-1].get("mean_m", [])))
    }
    return f"<div class='ziplora_charts'>{curves('Loss', terms)}{curves('Mean |m|', means)}</div>"


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float | None],
    form: str = ".2f",
    unit: str = "",
    top: float | None = None,
) -> str:
    """A table whose cells are coloured by their values, from 0 to `top`, the largest one where it is not given.

    values: by (row, column); a cell without one stays empty. form: how a number is written; unit: what follows it. The
    numbers are there for a reader of the page, under the pointer, and for all to see once "Numbers" is opened.
    """
    known = {cell: value for cell, value in values.items() if value is not None and math.isfinite(value)}
    top = max(known.values(), default=0.0) if top is None else top

    def number(value: float) -> str:
        return html.escape(f"{value:{form}}{unit}")

    def cell(row: str, column: str) -> str:
        where = html.escape(f"{row}, {column}", quote=True)
        value = known.get((row, column))
        if value is None:
            return f"<td class='ziplora_heat_none' title='{where}: nothing'></td>"
        heat = min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
        shown = f"<span>{number(value)}</span>"
        return f"<td style='--ziplora-heat:{heat:.3f}' title='{where}: {number(value)}'>{shown}</td>"

    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(row)}</th>{''.join(cell(row, column) for column in columns)}</tr>"
        for row in rows
    )
    return (
        f"<figure class='ziplora_heat'><figcaption>{html.escape(title)}</figcaption>"
        f"<p class='ziplora_heat_legend'>{number(0)} <i aria-hidden='true'></i> {number(top)}</p>"
        "<details class='ziplora_heat_numbers'><summary>Numbers</summary></details>"
        f"<div class='ziplora_heat_scroll'><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        "</figure>"
    )
