"""Whole merges killed at random moments; 200 of them: tests/kills.py."""

import os

import pytest

pytest.importorskip("diffusers")

from failures import small_recipes
from kills import OLDER, Killing

KILLS = 16


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_dozen_kills(tmp_path, pair_files):
    from ziplora_lib.hosts.diffusers import DiffusersHost

    killing = Killing(DiffusersHost("miniature", tmp_path, "cpu"), small_recipes(*pair_files))
    for _ in range(KILLS):
        killing.kill()
    assert killing.wrong == []
    assert killing.counts["old file"] + killing.counts["new file"] == KILLS
    assert killing.counts["while saving"] > 2


def test_half_a_file_is_noticed(tmp_path, pair_files):
    killing = object.__new__(Killing)
    killing.destination, killing.whole, killing.wrong = tmp_path / "merged.safetensors", {OLDER}, []
    from collections import Counter

    killing.counts = Counter()
    killing.destination.write_bytes(OLDER[:5])
    (tmp_path / "merged.json").write_text('{"half')
    (tmp_path / "merged.tmp").write_text("left")
    killing._look()
    assert len(killing.wrong) == 3
