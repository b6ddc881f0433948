"""What the tab says, as HTML. Names, prompts and messages may be a stranger's: all of it is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ziplora_lib.naming import whole

# of a drawing whose memory was given to newer ones
GONE = "These pictures are gone: newer ones took their place. Draw them again."


def escaped(text: str) -> str:
    """As text between tags, or as an attribute."""
    return html.escape(whole(text), quote=True)


def error(text: str, what: str = "Cannot zip") -> str:
    """In red."""
    return f"<div class='error' role='alert'>{what}: {escaped(text)}</div>"


def line(text: str, small: bool = False) -> str:
    """A paragraph."""
    kind = " class='ziplora_small'" if small else ""
    return f"<p{kind}>{escaped(text)}</p>"


def warnings(said: Iterable[str]) -> str:
    """A list, nothing where there is nothing to say."""
    items = "".join(f"<li>{escaped(warning)}</li>" for warning in said)
    return f"<p>Worth knowing:</p><ul class='ziplora_warnings'>{items}</ul>" if items else ""


class Wrong(str):
    """What a table shows in red."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "ziplora_table") -> str:
    """The first column is the rows' headings."""
    head = "".join(f"<th scope='col'>{escaped(str(cell))}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope='row'>{escaped(str(row[0]))}</th>"
        + "".join(f"<td{_red(cell)}>{escaped(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _red(cell: object) -> str:
    return " class='error'" if isinstance(cell, Wrong) else ""


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def size(n: float) -> str:
    """Bytes in MB or GB."""
    if n >= 1e9:
        return f"{n / 1e9:.1f} GB"
    return f"{n / 1e6:.0f} MB" if n >= 1e7 else f"{n / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
