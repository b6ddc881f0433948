"""The list of pairs to evaluate: a JSON file, read and checked with every file that it names before any work."""

from __future__ import annotations

import json
from pathlib import Path

from ziplora_lib.calibration import references
from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.reader import read

# pydantic 1's interface, wherever it is
from ziplora_lib.recipe import BaseModel, Extra, Field, ValidationError

# what the rows that every pair has are called in tables and JSON
SUBJECT_ALONE, STYLE_ALONE, PLAIN_SUM = ROWS = ("subject alone", "style alone", "plain sum")

FILES = ("subject", "style")
PICTURES = ("subject_pictures", "style_pictures")


class Pair(BaseModel, extra=Extra.forbid):
    """A subject LoRA and a style LoRA, with what they are judged by. Paths: from the list's folder, or absolute."""

    name: str = Field("", description="what it is called in the results; SUBJECT-STYLE by their file names if empty")
    subject: str = Field(..., min_length=1, description="the subject LoRA's file")
    style: str = Field(..., min_length=1, description="the style LoRA's file")
    subject_prompt: str = Field(
        ..., min_length=1, max_length=2000, description="the prompt the subject was trained with"
    )
    style_prompt: str = Field(..., min_length=1, max_length=2000, description="the prompt the style was trained with")
    prompts: list[str] = Field(..., min_items=1, description="prompts of the subject in the style, in several contexts")
    subject_pictures: str = Field(..., min_length=1, description="pictures of the subject: a folder, or a file")
    style_pictures: str = Field(..., min_length=1, description="pictures in the style: a folder, or a file")
    merged: dict[str, str] = Field({}, description="LoRAs made of the two, by the name of their row")


class _Pairs(BaseModel):
    __root__: list[Pair] = Field(..., min_items=1)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a list, with names, and with paths as seen from here.

    Every LoRA and every picture that it names is read once. All pairs have the same rows: means over different pairs
    would compare nothing. Raises BadInput, with file and key, for anything wrong in it.
    """
    remedy = "The README shows such a list"

    def bad(problem: str, key: str | None = None, remedy: str = remedy) -> BadInput:
        return BadInput(problem, file=str(path), key=key, remedy=remedy)

    try:
        pairs = _Pairs.parse_obj(json.loads(path.read_text(encoding="utf-8"))).__root__
    except OSError as error:
        raise bad(f"cannot be read ({error.strerror})", remedy="Give the list of pairs, a JSON file") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "__root__")
        known = ", ".join(Pair.__fields__)
        unknown = first["type"] == "value_error.extra"
        raise bad(
            "no such field" if unknown else first["msg"], key or None, f"The fields are {known}" if unknown else remedy
        ) from error
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
        raise bad(f"is not JSON ({error})") from error

    checked: set[str] = set()
    for i, pair in enumerate(pairs):
        for field in ("subject_prompt", "style_prompt"):
            if not getattr(pair, field).strip():
                raise bad("is empty", f"{i}.{field}", "Write the prompt it was trained with, trigger word included")
        if not all(prompt.strip() for prompt in pair.prompts):
            raise bad("has an empty prompt", f"{i}.prompts", "Name the subject and the style in each")
        for field in (*FILES, *PICTURES):
            setattr(pair, field, str(path.parent / getattr(pair, field)))
        pair.merged = {row: str(path.parent / file) for row, file in pair.merged.items()}
        pair.name = pair.name or f"{Path(pair.subject).stem}-{Path(pair.style).stem}"
        try:
            writer.check_name(pair.name)  # files are named after it
        except BadInput as error:
            raise bad(error.problem, f"{i}.name", str(error.remedy)) from error
        if any(row in ROWS or not row.strip() for row in pair.merged):
            raise bad("a row cannot have this name", f"{i}.merged", f"Choose others than {', '.join(ROWS)}")
        if pair.merged.keys() != pairs[0].merged.keys():
            raise bad("has other rows than the first pair", f"{i}.merged", "Give every pair the same")
        if pair.name in (other.name for other in pairs[:i]):
            raise bad(f"two pairs are called {pair.name}", f"{i}.name", "Give each a name of its own")
        # a subject is usually in several pairs
        for file in (pair.subject, pair.style, *pair.merged.values()):
            if file not in checked:
                read(Path(file))
            checked.add(file)
        for field in PICTURES:
            given = getattr(pair, field)
            if not Path(given).exists():
                raise bad(f"{given} does not exist", f"{i}.{field}", "Give a folder of pictures, or a picture")
            if given not in checked:
                references([given], 64)
            checked.add(given)
    return pairs
