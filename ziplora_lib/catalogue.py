"""What is known of every LoRA that the host lists, for lists of hundreds: from headers, looked at once for each file."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Entry, Host
from ziplora_lib.lora.keys import span
from ziplora_lib.lora.metadata import made_by
from ziplora_lib.lora.reader import BASES, glance
from ziplora_lib.naming import sendable


@dataclass(frozen=True)
class Facts:
    """base, kind and rank in words, "" where not known; recipe: what ZipLoRA made it by, {} for other LoRAs; when: mtime."""

    base: str = ""
    kind: str = ""
    rank: str = ""
    problem: str = ""
    recipe: dict = field(default_factory=dict)
    when: float = 0.0


_Key = tuple[Path, int, int]


def _key(entry: Entry) -> _Key | None:
    """What a file is known by: path, time in nanoseconds, size. None where there is none any more."""
    try:
        stat = entry.path.stat()
    except OSError:
        return None
    return entry.path, stat.st_mtime_ns, stat.st_size


class Catalogue:
    """Facts by file, kept for as long as the file is the same one."""

    def __init__(self, host: Host):
        self.host = host
        self._known: dict[_Key, Facts] = {}
        self._looking = threading.Lock()

    def facts(self, entry: Entry) -> Facts:
        """Of one LoRA; looks at its file if that was not done yet. A file that cannot be read has a problem."""
        if (key := _key(entry)) is None:
            return Facts(problem="the file is gone")
        if key not in self._known:
            self._known[key] = _facts(entry, key[1] / 1e9)
        return self._known[key]

    def known(self, entry: Entry) -> Facts | None:
        """The same, but None rather than a look at the file."""
        key = _key(entry)
        return None if key is None else self._known.get(key)

    def look(self) -> list[tuple[Entry, Facts]]:
        """All that the host lists; a few milliseconds for each file that is new."""
        with self._looking:  # two pages at once: the second finds what the first has read
            return [(entry, self.facts(entry)) for entry in _listing(self.host)]

    def at_once(self, seconds: float = 0.3) -> list[tuple[Entry, Facts]]:
        """All that the host lists, with what is known or found within the time; the rest is looked at meanwhile."""
        end, found, whole = time.monotonic() + seconds, [], True
        for entry in _listing(self.host):
            facts = self.known(entry)
            if facts is None and time.monotonic() < end:
                facts = self.facts(entry)
            whole = whole and facts is not None
            found.append((entry, facts or Facts()))
        if not whole and not self._looking.locked():
            threading.Thread(target=self.look, name="ziplora catalogue", daemon=True).start()
        return found

    def zipped(self) -> list[tuple[Entry, Facts]]:
        """The LoRAs that ZipLoRA merged, the newest first."""
        made = [(entry, facts) for entry, facts in self.look() if facts.recipe]
        return sorted(made, key=lambda found: -found[1].when)


def _listing(host: Host) -> Sequence[Entry]:
    try:
        return [entry for entry in host.listing() if sendable(entry.name)]
    except BadInput:  # no Lora extension: the tab says so itself
        return []


def _facts(entry: Entry, when: float) -> Facts:
    try:
        lora = glance(entry.path, whole=False)
    except BadInput as error:
        return Facts(problem=str(error), when=when)
    kind = next((kind for kind in lora.kinds if kind != "LoRA"), "LoRA") if lora.kinds else ""
    base = BASES[lora.base] if lora.base != "unknown" else ""
    # a half keeps the recipe of the whole, but is no merge
    recipe = {} if "ziplora.split_from" in lora.metadata else made_by(lora)
    return Facts(base, kind, span(lora.ranks), "", recipe, when)
