"""`zip-many`: a list of pairs, merged one after another into one folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from ziplora_lib.batch import Batch
from ziplora_lib.commands.watching import watched
from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.reader import glance, peek
from ziplora_lib.many import Chosen, Pair, Planned, drafted, run_many, with_preflight
from ziplora_lib.naming import ROLES

COLUMNS = ("subject", "style", "subject_prompt", "style_prompt", "output", "subject_strength", "style_strength")
SHEET = "contact-sheet"


def zip_many(
    pairs: Path,
    folder: Path,
    model: str,
    device: str,
    pattern: str,
    settings: Mapping,
    existing: str,
    report: Path | None,
    ray: str | None = None,
) -> int:
    """The command, after what the parser has checked; its exit status. Raises BadInput before any model is loaded.

    ray: the address of a Ray cluster to work on; "local" for one on this machine.
    """
    if ray:  # workers have folders of their own to work in
        pairs, folder = pairs.resolve(), folder.resolve()
        model = str(Path(model).resolve()) if Path(model).exists() else model
    planned = planned_of(pairs, folder, pattern, settings, existing)
    if report and report.resolve() in {one.file.with_suffix(".json").resolve() for one in planned}:
        raise BadInput(f"--report {report} is the name of a LoRA's own card", remedy="Give the report another name")
    if ray and any(one.to_do for one in planned):
        from ziplora_lib.commands.on_ray import run_on_ray

        with watched() as show:
            batch = run_on_ray(planned, (model, folder, device), ray, show)
    elif any(one.to_do for one in planned):
        from ziplora_lib.hosts.diffusers import DiffusersHost

        host = DiffusersHost(model, folder, device)
        with watched() as show:
            batch = run_many(with_preflight(planned, host, show), host, show)
    else:
        batch = run_many(planned, None)
    if report:
        report.write_text(json.dumps(batch.public(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(summary(batch))
    if sheet := batch.sheet():
        from ziplora_lib.pictures import png

        writer.write_beside(folder / f"{SHEET}.safetensors", ".png", png(sheet))
        print(f"look at {folder / SHEET}.png")
    if batch.stopped:
        return 130
    return 0 if batch.complete else 1


def summary(batch: Batch) -> str:
    """A line for each pair: what came of it, or why not."""
    lines = [f"{one.state}: {one.name}  {one.tag or one.said}".rstrip() for one in batch.outcomes]
    return "\n".join([*lines, f"{len(batch.outcomes)} pairs: {batch.counted()}"])


def planned_of(path: Path, folder: Path, pattern: str, settings: Mapping, existing: str) -> list[Planned]:
    """The merges that a list asks for. Raises BadInput, with line and column, for a row that cannot be done."""
    rows = rows_of(path)
    planned = drafted(
        [pair for _, pair in rows],
        pattern,
        settings,
        existing,
        lambda lora: peek(Path(lora)),
        lambda output: folder / f"{output}.safetensors",
    )
    readable: set[str] = set()
    for (line, pair), one in zip(rows, planned):
        if one.refusal:
            raise _in_line(path, line, one.where, one.refusal)
        if one.output.lower() == SHEET:
            error = BadInput(
                f"{SHEET}.png is what the pictures of all pairs go into", remedy="Give the LoRA another name"
            )
            raise _in_line(path, line, "output", error)
        for role, lora in zip(ROLES, (pair.subject.lora, pair.style.lora)):
            if lora not in readable:
                try:
                    glance(Path(lora))
                except BadInput as error:
                    raise _in_line(path, line, role, error) from error
            readable.add(lora)
    return planned


def _in_line(path: Path, line: int, column: str, error: BadInput) -> BadInput:
    """The same, with where it stands in the list."""
    of = f"{error.file}: " if error.file else ""
    at = f", column {column}" if column else ""
    return BadInput(f"line {line}{at}: {of}{error.problem}", file=str(path), remedy=error.remedy)


def rows_of(path: Path) -> list[tuple[int, Pair]]:
    """The pairs of a list with their lines. LoRAs: paths from the list's folder, or absolute. Raises BadInput."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", file=str(path), remedy="Give a CSV file") from error
    except UnicodeDecodeError as error:
        raise BadInput("is not text in UTF-8", file=str(path), remedy="Save it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    # spreadsheets write semicolons where the comma is the decimal sign
    reader = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=first.count), strict=True)
    rows: list[tuple[int, list[str]]] = []
    begins = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((begins, [cell.strip() for cell in cells]))
            begins = reader.line_num + 1
    except csv.Error as error:
        remedy = "Put cells with commas or quotes into double quotes"
        raise BadInput(f"line {begins}: is not CSV ({error})", file=str(path), remedy=remedy) from error
    header = _header(path, rows)
    if len(rows) < 2:
        raise BadInput("has no pair", file=str(path), remedy="Give each pair a line below the names of the columns")
    return [(line, _pair(path, line, header, cells)) for line, cells in rows[1:]]


def _header(path: Path, rows: list[tuple[int, list[str]]]) -> list[str]:
    line, header = rows[0] if rows else (1, [])
    known = f"The columns are {', '.join(COLUMNS)}, of which the first two must be there"
    for column in header:
        if column not in COLUMNS or header.count(column) > 1:
            problem = "stands there twice" if column in COLUMNS else "is not a column that is known"
            raise _in_line(path, line, repr(column), BadInput(problem, remedy=known))
    for column in ROLES:
        if column not in header:
            raise _in_line(path, line, column, BadInput("is missing", remedy=known))
    return header


def _pair(path: Path, line: int, header: list[str], cells: list[str]) -> Pair:
    if len(cells) > len(header):
        error = BadInput(
            f"{len(cells)} cells for {len(header)} columns", remedy="Put cells with commas into double quotes"
        )
        raise _in_line(path, line, "", error)
    given = dict(zip(header, cells))
    loras = []
    for role in ROLES:
        if not given.get(role):
            raise _in_line(path, line, role, BadInput("is empty", remedy=f"Name the {role}'s file"))
        text = given.get(f"{role}_strength") or "1"
        try:
            strength = float(text)
        except ValueError as error:
            refusal = BadInput(f"{text!r} is not a number", remedy="For instance 0.8")
            raise _in_line(path, line, f"{role}_strength", refusal) from error
        loras.append(Chosen(str(path.parent / given[role]), given.get(f"{role}_prompt", ""), strength))
    return Pair(*loras, given.get("output", "").removesuffix(".safetensors"))
