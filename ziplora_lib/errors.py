"""The ways a merge is refused, fails or ends, in words for whoever reads them; and which errors mean too little memory."""

from __future__ import annotations

import torch


class BadInput(ValueError):
    """Input that is refused before any work: says what is wrong, where (file, key), and what to do.

    `str()` is one line, fit for a terminal, an API's `error` field or the tab's red text.
    """

    def __init__(self, problem: str, *, file: str | None = None, key: str | None = None, remedy: str | None = None):
        self.problem, self.file, self.key, self.remedy = problem, file, key, remedy
        where = "".join(f"{part}: " for part in (file, key and f"key '{key}'") if part)
        super().__init__(f"{where}{problem}." + (f" {remedy}." if remedy else ""))


class MergeFailed(RuntimeError):
    """A merge that began and could not give a right result (for instance: gradients all zero). Nothing is saved."""


class NotFinite(MergeFailed):
    """A merge whose numbers left what the model's precision can hold: in another one it may go well."""


class Stopped(Exception):
    """The user stopped a merge before there was anything to keep."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whichever device: each says it in another way."""
    said = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in said for word in words))
