"""The parts of the loss, on matrices small enough to work out by hand."""

import math

import pytest
import torch

from ziplora_lib.merge.objective import (
    OBJECTIVES,
    Columns,
    cosine,
    l2_error,
    overlap,
    product,
    relative_error,
    retained_energy,
)


def columns(sizes=(2, 1)):
    """ΔW_c and ΔW_s of two layers, 2x2 and 2x1, and their columns' inner products."""
    c = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0], [0.0]])]
    s = [torch.tensor([[2.0, -1.0], [5.0, 0.0]]), torch.tensor([[0.0], [4.0]])]
    flat = [torch.cat(parts, dim=1) for parts in (c, s)]
    grams = torch.stack([torch.stack([(a * b).sum(0) for b in flat]) for a in flat])
    return c, s, Columns(grams, list(sizes), torch.ones(2, grams.shape[-1]))


M = torch.tensor([[1.0, 0.5, 2.0], [-1.0, 2.0, 0.25]])


def test_the_example_is_what_it_says():
    _, _, known = columns()
    assert known.grams.tolist() == [[[1, 5, 9], [2, -2, 0]], [[2, -2, 0], [29, 1, 16]]]


def test_relative_error_by_hand():
    prediction = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    target = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    bare = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(relative_error(prediction, target, bare), torch.tensor([5 / 9, 25 / 9, 1.0]))


def test_relative_error_is_0_for_the_lora_alone_and_1_for_no_lora():
    target, bare = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    assert relative_error(target, target, bare).tolist() == [0, 0, 0]
    assert relative_error(bare, target, bare).tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_lora_that_does_nothing_on_a_sample_gives_a_finite_error(size):
    target = torch.ones(1, 4) * size
    prediction = (target + 0.1).requires_grad_()
    error = relative_error(prediction, target, target.clone())
    error.sum().backward()
    assert torch.isfinite(error).all()
    assert torch.isfinite(prediction.grad).all()
    if size:
        torch.testing.assert_close(error, torch.tensor([0.04 / (1e-6 * 4)]))


def test_l2_error_by_hand():
    prediction, target = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert l2_error(prediction, target, target).tolist() == [5.0, 2.0]
    same = target.clone().requires_grad_()
    l2_error(same, target, target).sum().backward()
    assert same.grad.abs().sum() == 0, "no NaN where the error is zero"


def test_errors_are_of_each_sample_and_in_full_precision():
    half = torch.full((2, 100_000), 0.01, dtype=torch.float16)
    target = torch.zeros_like(half)
    for error in (relative_error, l2_error):
        value = error(half, target, torch.ones_like(half))
        assert value.shape == (2,)
        assert value.dtype == torch.float32
    torch.testing.assert_close(
        l2_error(half, target, target), torch.full((2,), 0.01 * math.sqrt(1e5)), rtol=1e-3, atol=0
    )


def test_overlap_by_hand():
    # |m_c m_s| = 1, 1, .5; |inner| = 2, 2, 0
    _, _, known = columns()
    assert float(overlap(M, known)) == pytest.approx((1 * 2 + 1 * 2 + 0.5 * 0) / (2 + 2 + 0))
    assert float(overlap(torch.ones(2, 3), known)) == 1.0
    assert float(overlap(torch.tensor([[1.0, 1, 1], [0, 0, 0]]), known)) == 0.0


def test_overlap_is_of_the_merged_columns_themselves():
    c, s, known = columns()
    merged_c, merged_s = torch.cat(c, 1) * M[0], torch.cat(s, 1) * M[1]
    inner = (merged_c * merged_s).sum(0).abs().sum() / (torch.cat(c, 1) * torch.cat(s, 1)).sum(0).abs().sum()
    assert float(overlap(M, known)) == pytest.approx(float(inner))


def test_cosine_by_hand():
    # layer 1: (1·-1 + .5·2) / … = 0; layer 2: one column each, so ±1
    _, _, known = columns()
    assert float(cosine(M, known)) == pytest.approx(1.0, abs=1e-6)
    assert float(cosine(torch.ones(2, 3), known)) == pytest.approx(2.0)
    m = torch.tensor([[3.0, 4.0, 1.0], [4.0, -3.0, -2.0]])
    assert float(cosine(m, known)) == pytest.approx(0.0 + 1.0, abs=1e-6)
    assert float(cosine(5 * m, known)) == pytest.approx(float(cosine(m, known))), "no scale to shrink"


def test_product_by_hand():
    _, _, known = columns()
    assert float(product(M, known)) == pytest.approx(1 + 1 + 0.5)


def test_retained_energy_by_hand():
    c, s, known = columns()
    merged, whole = torch.cat(c, 1) * M[0] + torch.cat(s, 1) * M[1], torch.cat(c, 1) + torch.cat(s, 1)
    assert retained_energy(M, known) == pytest.approx(float(merged.norm() / whole.norm()))
    assert retained_energy(torch.ones(2, 3), known) == pytest.approx(1.0)
    assert retained_energy(torch.zeros(2, 3), known) == 0.0


@pytest.mark.parametrize("penalty", [overlap, cosine, product])
def test_every_penalty_is_differentiable_and_agrees_with_finite_differences(penalty):
    _, _, known = columns()
    known = Columns(known.grams.double(), known.sizes, known.present)
    m = torch.tensor([[1.0, 0.5, 2.0], [-0.9, 2.1, 0.25]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: penalty(m, known), (m,))


@pytest.mark.parametrize("penalty", [overlap, cosine, product])
def test_no_penalty_fails_at_zero(penalty):
    _, _, known = columns()
    m = torch.zeros(2, 3, requires_grad=True)
    value = penalty(m, known)
    value.backward()
    assert float(value) == 0.0
    assert torch.isfinite(m.grad).all()


@pytest.mark.parametrize("penalty", [overlap, cosine, product])
def test_three_loras_are_all_pairs(penalty):
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 5, 3, generator=generator)
    known = Columns(torch.einsum("ioc,koc->ikc", deltas, deltas), [2, 1], torch.ones(3, 3))
    m = torch.randn(3, 3, generator=generator)

    def of(*pair):
        return float(
            penalty(m[list(pair)], Columns(known.grams[list(pair)][:, list(pair)], known.sizes, torch.ones(2, 3)))
        )

    if penalty is overlap:
        inner = {(i, k): float(known.grams[i, k].abs().sum()) for i, k in ((0, 1), (0, 2), (1, 2))}
        wanted = sum(of(*pair) * weight for pair, weight in inner.items()) / sum(inner.values())
    else:
        wanted = of(0, 1) + of(0, 2) + of(1, 2)
    assert float(penalty(m, known)) == pytest.approx(wanted, rel=1e-5)


def test_the_presets():
    assert OBJECTIVES["guided"].error is OBJECTIVES["paper"].error is OBJECTIVES["paper-literal"].error is l2_error
    assert OBJECTIVES["guided"].penalty is overlap
    assert OBJECTIVES["paper"].penalty is cosine
    assert OBJECTIVES["paper-literal"].penalty is product
    assert [name for name, o in OBJECTIVES.items() if o.warm_start] == ["guided"], "the paper begins with the LoRAs"
    assert {(name, o.lam, o.start, o.guidance) for name, o in OBJECTIVES.items()} == {
        ("guided", 0.0, 1.0, 3.0), ("paper", 0.01, 1.0, 1.0), ("paper-literal", 0.01, 1.0, 1.0)
    }  # fmt: skip
