"""Modules that are loaded when something of them is used: what only work needs shall not delay the WebUI's start."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class later:  # noqa: N801  # stands where an import would
    """`job = later("ziplora_lib.job")`: the module, loaded with its first use, from whichever thread that is."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
