"""The balance and the sheet of pictures along it."""

import numpy as np
import pytest
from PIL import Image

from ziplora_lib.merge.balance import points, weights
from ziplora_lib.pictures import strip


def test_the_ends_and_the_middle():
    assert weights(-1) == pytest.approx((1.2, 0.75))
    assert weights(0) == (1.0, 1.0)
    assert weights(1) == pytest.approx((0.7, 1.15))


def test_more_style_is_always_a_larger_share_of_style():
    shares = [style / subject for subject, style in map(weights, points(9))]
    assert shares == sorted(shares)
    assert len(set(shares)) == 9


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
