"""Stacked factors: a sum of LoRAs, with coefficients folded in, is one LoRA and equals Eq. 2 on dense matrices."""

import pytest
import torch

from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.stack import Stack

SHAPES = [(5, 7), (4, 3, 3, 3), (4, 6, 1, 1)]


def deltas(shape, ranks=(3, 2), scales=(0.7, -1.4), sizes=(1.0, 1.0)):
    generator = torch.Generator().manual_seed(0)
    return [
        LowRankDelta(
            torch.randn(shape[0], r, generator=generator) * size,
            torch.randn(r, *shape[1:], generator=generator) / size,
            scale,
        )
        for r, scale, size in zip(ranks, scales, sizes)
    ]


def dense(delta):
    return (delta.scale * delta.up.double() @ delta.down.double().flatten(1)).reshape(delta.shape)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stack_is_the_plain_sum_and_its_parts_are_the_loras(shape):
    parents = deltas(shape)
    stack = Stack.of(parents)
    assert (stack.shape, stack.ranks, stack.up.shape[1]) == (shape, (3, 2), 5)
    close(stack.total().dense(), sum(map(dense, parents)))
    for i, parent in enumerate(parents):
        close(stack.part(i).dense(), dense(parent))


@pytest.mark.parametrize("shape", SHAPES)
def test_folded_coefficients_are_equation_2(shape):
    parents = deltas(shape)
    stack = Stack.of(parents)
    m = torch.randn(2, stack.columns)
    wanted = sum(dense(p) * mi.reshape(shape[1:]).double() for p, mi in zip(parents, m))
    merged = stack.merged(m)
    assert merged.ranks == stack.ranks
    close(merged.total().dense(), wanted)
    close(LowRankDelta(stack.up, stack.folded_down(m)).dense(), wanted)
    # subject ranks first, style ranks after
    close(merged.part(0).dense(), dense(parents[0]) * m[0].reshape(shape[1:]))


def test_one_number_a_lora():
    parents = deltas((5, 7))
    close(Stack.of(parents).merged([0.8, 1.2]).total().dense(), 0.8 * dense(parents[0]) + 1.2 * dense(parents[1]))


@pytest.mark.parametrize("absent", [0, 1])
def test_a_layer_that_one_lora_lacks(absent):
    parents = deltas((5, 7))
    parents[absent] = None
    present = 1 - absent
    stack = Stack.of(parents)
    assert stack.part(absent) is None
    assert stack.ranks[absent] == 0
    m = torch.randn(2, 7)
    close(stack.merged(m).total().dense(), dense(parents[present]) * m[present])
    assert stack.column_grams()[absent].abs().sum() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_column_grams(shape):
    parents = deltas(shape, ranks=(3, 2, 1), scales=(0.7, -1.4, 2.0), sizes=(1.0, 1.0, 1.0))
    flat = torch.stack([dense(p).flatten(1) for p in parents])
    grams = Stack.of(parents).column_grams()
    torch.testing.assert_close(grams.double(), torch.einsum("ioc,koc->ikc", flat, flat), rtol=1e-5, atol=1e-5)


def test_strengths_repeat_over_ranks():
    stack = Stack.of(deltas((5, 7)))
    assert stack.per_rank(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]


def test_folding_is_differentiable_in_its_own_precision():
    stack = Stack.of(deltas((5, 7)))
    m = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: stack.up.double() @ stack.folded_down(m), (m,))


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_lopsided_factors_survive_half_precision(size):
    """Trainers leave one factor tiny: balanced halves lose no more in fp16 than fp16's own rounding."""
    parent = deltas((16, 16), sizes=(size, 1 / size))
    stack = Stack.of(parent)
    half = LowRankDelta(stack.up.half(), stack.down.half()).dense()
    wanted = sum(map(dense, parent))
    bound = 2.0**-10 * (stack.up.abs() @ stack.down.abs()) + 1e-7  # two roundings of half an ulp, 2^-11 each
    assert ((half - wanted).abs() <= bound).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_a_lora_that_does_nothing_is_no_trouble(scale):
    parents = deltas((5, 7), scales=(scale, 1.0))
    stack = Stack.of(parents)
    assert torch.isfinite(stack.up).all()
    assert torch.isfinite(stack.down).all()
    close(stack.total().dense(), sum(map(dense, parents)))


def test_half_precision_parents_are_stacked_in_full():
    parents = [LowRankDelta(d.up.half(), d.down.half(), d.scale) for d in deltas((5, 7))]
    stack = Stack.of(parents)
    assert stack.up.dtype == stack.down.dtype == torch.float32
    close(stack.total().dense(), sum(map(dense, parents)))
