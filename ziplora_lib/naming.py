"""What a LoRA is called, and a new one: by a pattern after the LoRAs that go in, or after what is made of a merged one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import PurePath

from ziplora_lib.errors import BadInput

ROLES = ("subject", "style")
_FIELD = re.compile(r"\{(\w*)\}")


def lora_name(lora: str) -> str:
    """A LoRA's name, also where a path stands for it."""
    return PurePath(lora).name.removesuffix(".safetensors")


def sendable(text: str) -> bool:
    """Whether a name can be written as JSON: on Linux a file's name can have bytes that are no characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def whole(text: str) -> str:
    """A stranger's text with a question mark for each half of a character: JSON can hold such, and no page."""
    return text.encode("utf-8", "replace").decode()


def named(pattern: str, parents: Sequence[Mapping], method: str) -> str:
    """The name that a pattern gives a merge of these parents. Raises BadInput for a pattern that is none."""
    known = {
        **{role: "-".join(lora_name(p["lora"]) for p in parents if p["role"] == role) for role in ROLES},
        "method": method,
        "date": date.today().isoformat(),
    }
    # no str.format: a pattern is typed into a page, and could ask for a width of gigabytes
    if not set(_FIELD.findall(pattern)) <= known.keys() or set("{}") & set(_FIELD.sub("", pattern)):
        raise BadInput(
            f"the name pattern {pattern!r} has something in braces that is not known",
            remedy="Use {subject}, {style}, {method} and {date}",
        )
    return _FIELD.sub(lambda field: known[field[1]], pattern).strip("- ")


def at_balance(name: str, balance: float, side: str) -> str:
    """What a merged LoRA is called at another balance, for instance dog-ink-style25. side: what there is more of."""
    return f"{name}-{side if balance else 'balance'}{abs(balance) * 100:.0f}"


def at_strengths(name: str, first: float, second: float) -> str:
    """What it is called at two strengths, for instance dog-ink-s80-t120."""
    return f"{name}-s{first * 100:.0f}-t{second * 100:.0f}"


def of_halves(name: str, parents: Sequence[Mapping[str, str]]) -> list[str]:
    """What its halves are called, by role where that tells them apart, else by LoRA. parents: each with name and role."""
    roles = [parent["role"] for parent in parents]
    ends = roles if len(set(roles)) == len(roles) else [parent["name"] for parent in parents]
    # the same LoRA can be in it twice
    return [f"{name}-{end}" if ends.count(end) == 1 else f"{name}-{end}-{i + 1}" for i, end in enumerate(ends)]
