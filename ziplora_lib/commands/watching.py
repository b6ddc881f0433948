"""A long command on a terminal: one line that is kept up to date, and Ctrl-C that stops at the next step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ziplora_lib.merge.method import Callback


@contextmanager
def watched() -> Iterator[Callback]:
    """A job's callback: shows the step on stderr, and is true once Ctrl-C was pressed."""
    interrupted = shown = False

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True

    def show(info: dict) -> bool:
        nonlocal shown
        if info["phase"] != "preflight":  # which is over at once, or ends in a line of its own
            print(progress_line(info), end="", file=sys.stderr, flush=True)
            shown = True
        return interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield show
    finally:
        signal.signal(signal.SIGINT, before)
        if shown:
            print(file=sys.stderr)


def progress_line(info: dict) -> str:
    """A step in a line that is written over the one before."""
    loss = f"  loss {info['loss']:.3f}" if "loss" in info else ""
    what = info["what"][:60] if info["phase"] == "many" else info["phase"]
    return f"\r{what} {info.get('step', 0)}/{info.get('steps', 1)}{loss}".ljust(78)
