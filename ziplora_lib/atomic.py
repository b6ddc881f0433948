"""Files that appear whole or not at all: written under a name that nobody lists, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import time
from functools import cache
from pathlib import Path

import psutil

MARK = ".ziplora-part"
BLOCK = 2**20

# .NAME.MACHINE-PROCESS-SINCE.ziplora-part
_OWNER = re.compile(r"\.([0-9a-f]{4})-(\d+)-(\d+)" + re.escape(MARK) + r"\Z")
# what another machine's process writes into a shared folder is left alone for so long
A_DAY = 24 * 3600


def part_of(path: Path, ending: str = "") -> Path:
    """Where a file is written before it has its name: in the same folder, hidden, and telling whose it is."""
    return path.with_name(f".{path.stem}{ending}.{_owner()}{MARK}")


def write_synced(part: Path, *pieces: bytes | memoryview) -> None:
    """Writes the pieces one after another, down to the disk."""
    with open(part, "wb") as file:
        for piece in map(memoryview, pieces):
            for begin in range(0, len(piece), BLOCK):  # one call with hundreds of megabytes can take six times as long
                file.write(piece[begin : begin + BLOCK])
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes a rename last, where the system lets one ask for it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):  # some network drives cannot; the file is whole and in its place
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def replace(path: Path, *pieces: bytes | memoryview) -> None:
    """Writes a file, or in place of another: whole, or not at all. Raises OSError."""
    part = part_of(path, path.suffix)
    try:
        write_synced(part, *pieces)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Removes what killed runs have left in a folder; with a name, of that file alone. Returns what went.

    What a process that still runs is writing stays, and for a day what another machine's may be. With a name nobody else
    may be writing that file.
    """
    gone = []
    for part in folder.iterdir():
        if not (owner := _OWNER.search(part.name)):
            continue
        mine = name is not None and re.fullmatch(rf"\.{re.escape(name)}(\.[a-z.]+)?", part.name[: owner.start()])
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
            if mine or (name is None and _left(part, *owner.groups())):
                part.unlink()
                gone.append(part)
    return gone


def remove_leftovers_below(folder: Path) -> None:
    """The same in a folder and all below it; says what went."""
    gone = [part for place, _, _ in os.walk(folder) for part in _removed(Path(place))]
    if gone:
        print(f"ZipLoRA: removed what {len(gone)} runs had left that were killed while they wrote")


def _removed(folder: Path) -> list[Path]:
    try:
        return remove_leftovers(folder)
    except OSError:  # gone meanwhile, or not ours to look into
        return []


def _left(part: Path, machine: str, process: str, since: str) -> bool:
    if machine != _machine():
        return time.time() - part.stat().st_mtime > A_DAY
    try:
        # a number is given again, in a container to the very same program: the start tells them apart
        return abs(_started(int(process)) - int(since)) > 2
    except (psutil.Error, OverflowError):
        return True


@cache
def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]


def _started(process: int) -> int:
    return int(psutil.Process(process).create_time())


def _owner() -> str:
    process = os.getpid()
    return f"{_machine()}-{process}-{_started(process)}"
