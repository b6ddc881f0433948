"""The balance and the sheet of pictures along it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ziplora_lib.errors import BadInput
from ziplora_lib.merge.balance import caption, points, side, weights
from ziplora_lib.pictures import strip

PAIR = ("subject", "style")
CASTS = st.lists(st.sampled_from(PAIR), min_size=2, max_size=8)


def test_the_ends_and_the_middle():
    assert weights(-1, PAIR) == pytest.approx([1.2, 0.75])
    assert weights(0, PAIR) == [1.0, 1.0]
    assert weights(1, PAIR) == pytest.approx([0.7, 1.15])


def test_more_style_is_always_a_larger_share_of_style():
    shares = [style / subject for subject, style in (weights(point, PAIR) for point in points(9))]
    assert shares == sorted(shares)
    assert len(set(shares)) == 9


@given(CASTS, st.floats(-1, 1))
def test_every_cast_has_the_pairs_two_strengths(roles, balance):
    """Subjects against styles; where all have one role, the first LoRA against the others."""
    subject, style = weights(balance, PAIR)
    if len(set(roles)) == 1:
        assert weights(balance, roles) == [subject] + [style] * (len(roles) - 1)
    else:
        assert weights(balance, roles) == [subject if role == "subject" else style for role in roles]
    assert weights(0, roles) == [1.0] * len(roles)


@given(CASTS, st.floats(-1, 1))
def test_the_caption_says_what_there_is_more_of(roles, balance):
    names = [f"lora{i}" for i in range(len(roles))]
    said = caption(balance, roles, names)
    if balance == 0:
        assert said == "as learned"
    elif len(set(roles)) == 1:
        assert said.startswith(f"more {names[0] if balance < 0 else ' and '.join(names[1:])} (")
    else:
        assert said.startswith(f"more {'subject' if balance < 0 else 'style'} (")
    assert said.count(":") == (0 if balance == 0 else len(roles) - 1)


def test_captions():
    assert caption(-1, PAIR, ["dog", "ink"]) == "more subject (1.20 : 0.75)"
    assert caption(1, ("subject", "subject", "style"), ["dog", "cat", "ink"]) == "more style (0.70 : 0.70 : 1.15)"
    assert caption(-1, ("style", "style"), ["ink", "oil"]) == "more ink (1.20 : 0.75)"
    assert side(0.5, ("subject",) * 3, ["dog", "cat", "fox"]) == "cat and fox"


@pytest.mark.parametrize("balance", [-1.01, 2, math.nan, math.inf, -math.inf])
def test_what_is_no_balance_is_refused(balance):
    with pytest.raises(BadInput, match="between -1 and 1"):
        weights(balance, PAIR)


@pytest.mark.parametrize("n", range(1, 10))
def test_points_go_from_subject_to_style_and_odd_ones_have_the_middle(n):
    given = points(n)
    assert len(given) == n
    assert given == sorted(given)
    assert given == [-p for p in reversed(given)]
    assert (0.0 in given) == (n % 2 == 1)


def test_a_sheet_has_every_picture_in_its_place():
    rows = [[Image.new("RGB", (30, 20), (50 * r, 60 * c, 200)) for c in range(3)] for r in range(2)]
    for labels, columns in ((["", ""], []), (["first", "second"], ["a", "b", "c"])):
        sheet = strip(rows, labels, columns)
        colours = {tuple(colour) for colour in np.asarray(sheet).reshape(-1, 3).tolist()}
        assert {(50 * r, 60 * c, 200) for r in range(2) for c in range(3)} <= colours
        assert sheet.width >= 3 * 30
        assert sheet.height >= 2 * 20
    plain = strip(rows, ["", ""])
    assert plain.width < sheet.width
    assert plain.height < sheet.height
