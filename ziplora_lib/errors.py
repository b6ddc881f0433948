"""The ways a merge is refused, fails or ends, in words for whoever reads them; and which errors mean too little memory."""

from __future__ import annotations

import re

import torch

# what breaks a line, steers a terminal or turns a text around, and half characters
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: object, longest: int = 300) -> str:
    """A stranger's text in one line that can be shown: what cannot be seen as its escape, a long text without its middle."""
    text = str(text)
    if len(text) > 2 * longest:
        text = text[:longest] + text[-longest:]
    text = _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


# of a refusal's file, key, problem and remedy
_LENGTHS = (180, 180, 400, 200)


class BadInput(ValueError):
    """Input that is refused before any work: says what is wrong, where (file, key), and what to do.

    `str()` is one line of a thousand characters at most, fit for a terminal, an API's `error` field or the tab's red text,
    whatever file and key are called.
    """

    def __init__(self, problem: str, *, file: str | None = None, key: str | None = None, remedy: str | None = None):
        self.problem, self.file, self.key, self.remedy = problem, file, key, remedy
        file, key, problem, remedy = (
            part and one_line(part, longest) for part, longest in zip((file, key, problem, remedy), _LENGTHS)
        )
        where = "".join(f"{part}: " for part in (file, key and f"key '{key}'") if part)
        super().__init__(f"{where}{problem}." + (f" {remedy}." if remedy else ""))


class MergeFailed(RuntimeError):
    """A merge that began and could not give a right result (for instance: gradients all zero). Nothing is saved."""


class NotFinite(MergeFailed):
    """A merge whose numbers left what the model's precision can hold: in another one it may go well."""


class NotSaved(MergeFailed):
    """A merge that went well and could not be written. Run again it begins where its steps ended."""


class Stopped(Exception):
    """The user stopped a merge before there was anything to keep."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whichever device: each says it in another way."""
    said = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in said for word in words))
