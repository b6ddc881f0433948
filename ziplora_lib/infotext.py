"""Infotext: a picture's prompt and settings as the WebUI writes them into its pictures, and reads them back."""

from __future__ import annotations

import json
from collections.abc import Mapping


def infotext(prompt: str, settings: Mapping[str, object]) -> str:
    """The prompt, and the settings in a line below it."""
    return f"{prompt}\n{', '.join(_said(settings))}"


def extended(text: str, settings: Mapping[str, object]) -> str:
    """An infotext with more settings at its end."""
    return ", ".join([text, *_said(settings)])


def _said(settings: Mapping[str, object]) -> list[str]:
    return [f"{name}: {_quoted(str(value))}" for name, value in settings.items()]


def _quoted(value: str) -> str:
    """A value with a comma, a colon or a new line stands in quotes, so that its reader sees where it ends."""
    return json.dumps(value, ensure_ascii=False) if any(letter in value for letter in ',:\n"') else value
