"""Whether a merge paid, in words."""

import pytest

from ziplora_lib.verdict import is_light, verdict

CAST = [("subject", "dog"), ("subject", "cat"), ("style", "ink")]
TOLD = [{"role": r, "name": n, "title": f"{r} {n}" if r == "subject" else r} for r, n in CAST]
PAIR = [TOLD[0], TOLD[2]]


def test_it_loops_over_the_parents():
    said = verdict([0.2, 3.0, 0.3], [2.0, 3.0, 0.2], TOLD, guided=True)
    assert "10 times smaller on the subject dog and as large on the subject cat and larger on the style" in said
    assert "gets along well" in said
    assert "<lora:dog:1> <lora:cat:1> <lora:ink:1>" in said


@pytest.mark.parametrize(("guided", "light", "strong"), [(True, 0.26, 0.28), (False, 0.19, 0.21)])
def test_the_style_of_the_plain_sum_tells_a_light_pair(guided, light, strong):
    said = verdict([0.1, 0.05], [2.0, light], PAIR, guided)
    assert "gets along well" in said
    assert "clash" not in said
    said = verdict([0.1, 0.05], [2.0, strong], PAIR, guided)
    assert "gets along well" not in said
    assert "that zipping is for" in said


@pytest.mark.parametrize("roles", [["subject"] * 2, ["style"] * 2])
def test_of_two_of_a_kind_nothing_is_known(roles):
    assert is_light([0.1, 0.1], roles, guided=True) is None
    told = [{"role": role, "name": name, "title": f"{role} {name}"} for role, name in zip(roles, "ab")]
    said = verdict([0.1, 0.1], [9.0, 9.0], told, guided=True)
    assert "90 times smaller" in said
    assert "clash" not in said


def test_a_zip_that_is_no_closer_did_not_pay():
    said = verdict([2.0, 0.1], [2.0, 0.1], PAIR, guided=True)
    assert "did not pay" in said
    assert "gets along" not in said, "once is enough"


def test_without_errors_nothing_is_claimed():
    assert "nothing was learned" in verdict([], [], PAIR, guided=True)
