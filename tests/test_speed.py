"""The benchmark of the cost: both ways learn the same, so that their seconds and bytes can be held against each other."""

import pytest
import torch


@pytest.fixture(scope="module")
def measured():
    pytest.importorskip("diffusers")
    from benchmarks import speed
    from benchmarks.scale import Size

    # fp64: Adam makes a gradient's rounding large where the gradient is small
    small = Size((32, 64, 64), (1, 1), 8)
    return speed.measured(small, rank=4, steps=10, device=torch.device("cpu"), dtype=torch.float64, times=1)


def test_the_dense_way_learns_the_same_coefficients(measured):
    told = measured["coefficients"]
    assert told["mean way"] > 0.02
    assert told["largest difference"] < 1e-3


def test_the_factors_are_a_small_part_of_the_dense_deltas(measured):
    memory = measured["LoRAs in memory, MB"]
    assert 0 < memory["ours"] < memory["dense"]
    assert measured["of dense's memory"] == pytest.approx(memory["ours"] / memory["dense"], rel=1e-2)
