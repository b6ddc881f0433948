"""What became of many merges: as a contact sheet, as a table for a spreadsheet, as JSON."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass, field

from PIL import Image

from ziplora_lib.contact_sheet import contact_sheet


@dataclass(frozen=True)
class Outcome:
    """What became of a pair.

    state: done, failed, refused, stopped, skipped or not begun; said: why it is not done, or the verdict on it; picture: its
    preview, made smaller.
    """

    name: str
    subject: str
    style: str
    state: str
    tag: str = ""
    said: str = ""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    picture: Image.Image | None = field(default=None, repr=False)

    @property
    def cell(self) -> Image.Image | str:
        """What a contact sheet shows of it."""
        return self.picture or f"{self.state}: {self.name}"

    def public(self) -> dict:
        """As JSON: all but the picture."""
        return {name: value for name, value in vars(self).items() if name != "picture"}


@dataclass(frozen=True)
class Batch:
    """What became of all pairs, in the plan's order."""

    outcomes: list[Outcome]

    @property
    def stopped(self) -> bool:
        return any(one.state in ("stopped", "not begun") for one in self.outcomes)

    @property
    def complete(self) -> bool:
        """All that was asked for is there."""
        return all(one.state in ("done", "skipped") for one in self.outcomes)

    def counted(self) -> str:
        """How many ended how, in words."""
        states = Counter(one.state for one in self.outcomes)
        return ", ".join(f"{n} {state}" for state, n in states.items())

    def public(self) -> dict:
        """As JSON."""
        return {"stopped": self.stopped, "counted": self.counted(), "outcomes": [one.public() for one in self.outcomes]}

    def csv(self) -> str:
        """As a table for a spreadsheet."""
        columns = ("name", "subject", "style", "state", "tag", "seconds", "said", "warnings")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for one in self.outcomes:
            row = {**one.public(), "warnings": "; ".join(one.warnings)}
            writer.writerow([row[column] for column in columns])
        return text.getvalue()

    def sheet(self) -> Image.Image | None:
        """The previews side by side, a row a subject, a column a style; words where there is none. None without any."""
        cells: dict[tuple[str, int], dict[str, Outcome]] = {}
        times: Counter = Counter()
        for one in self.outcomes:  # a pair that comes again, at another strength say, gets another row
            cells.setdefault((one.subject, times[one.subject, one.style]), {})[one.style] = one
            times[one.subject, one.style] += 1
        styles = list(dict.fromkeys(one.style for one in self.outcomes))
        rows = [[row[style].cell if style in row else "" for style in styles] for row in cells.values()]
        labels = [f"{subject} ({again + 1})" if again else subject for subject, again in cells]
        return contact_sheet(rows, labels, styles)
