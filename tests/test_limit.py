"""A smaller rank for a merge: what it says that it lost is what was lost, and the parents' halves stay apart."""

import pytest
import torch

from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.limit import Loss, limit
from ziplora_lib.lora.stack import Stack

SHAPES = {"linear": (12, 20), "wide": (6, 30), "conv": (8, 5, 3, 3)}


def stacks(ranks=(5, 4), seed=0, falling=0.6):
    """Layers whose singular values fall, so that a cut has something to choose."""
    generator, made = torch.Generator().manual_seed(seed), {}

    def delta(shape, rank, size):
        values = size * falling ** torch.arange(rank)
        up = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator)).Q * values
        return LowRankDelta(up, torch.randn(rank, *shape[1:], generator=generator), 0.5)

    for key, shape in SHAPES.items():
        made[key] = Stack.of([delta(shape, rank, 1.0 + i) if rank else None for i, rank in enumerate(ranks)])
    return made


def dense(stack):
    return (stack.up.double() @ stack.down.double().flatten(1)).reshape(stack.shape)


def half(stack, i):
    part = stack.part(i)
    return torch.zeros(stack.shape).double() if part is None else (part.up.double() @ part.down.double().flatten(1))


def shares(before, after):
    return {
        key: float((dense(before[key]) - dense(after[key])).square().sum() / dense(before[key]).square().sum())
        for key in before
    }


def assert_told(before, after, loss):
    """The loss that is told is the one that the dense matrices have."""
    smaller = [key for key in before if sum(after[key].ranks) < sum(before[key].ranks)]
    lost = shares(before, after)
    energies = {key: float(dense(before[key]).square().sum()) for key in before}
    total = sum(lost[key] * energies[key] for key in smaller) / sum(energies[key] for key in smaller)
    assert loss.layers == len(smaller)
    assert loss.share == pytest.approx(total, rel=1e-3, abs=1e-7)
    assert loss.worst == pytest.approx(max(lost.values()), rel=1e-3, abs=1e-7)
    assert lost[loss.worst_key] == max(lost.values())
    assert f"{total:.2%}" in str(loss)
    assert loss.worst_key in str(loss)
    for key in before:
        if key not in smaller:
            assert lost[key] < 1e-10


@pytest.mark.parametrize("options", [{}, {"max_rank": None, "keep": 1.0}])
def test_where_no_limit_is_asked_nothing_happens(options):
    before = stacks()
    after, loss = limit(before, **options)
    assert loss is None
    for key, stack in before.items():
        assert torch.equal(after[key].up, stack.up)
        assert torch.equal(after[key].down, stack.down)
        assert after[key].ranks == stack.ranks


def test_a_limit_that_no_layer_reaches_changes_nothing():
    before = stacks()
    after, loss = limit(before, max_rank=9)
    assert loss is None
    assert all(torch.equal(after[key].down, stack.down) for key, stack in before.items())


@pytest.mark.parametrize("max_rank", [1, 2, 5, 8])
@pytest.mark.parametrize("ranks", [(5, 4), (0, 6), (6, 0), (2, 3, 4)], ids=str)
def test_a_largest_rank(ranks, max_rank):
    before = stacks(ranks)
    after, loss = limit(before, max_rank=max_rank)
    for key, stack in after.items():
        assert sum(stack.ranks) == stack.up.shape[1] == stack.down.shape[0] == min(max_rank, sum(ranks))
        assert stack.shape == before[key].shape
        assert len(stack.ranks) == len(ranks)
        assert all(given <= had for given, had in zip(stack.ranks, ranks))
    if max_rank >= sum(ranks):
        assert loss is None
    else:
        assert_told(before, after, loss)


def test_each_half_is_its_own_best_of_that_rank():
    """The halves stay apart: the ranks of one are its own first singular values, whatever the other has."""
    before = stacks((5, 4))
    after, _ = limit(before, max_rank=4)
    for key, stack in after.items():
        kept = []
        for i, rank in enumerate(stack.ranks):
            u, s, vh = torch.linalg.svd(half(before[key], i), full_matrices=False)
            torch.testing.assert_close(half(stack, i), (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-4, atol=1e-4)
            kept.append((s[:rank], s[rank:]))
        least = min(float(values.min()) for values, _ in kept if len(values))
        assert all(float(values.max()) <= least + 1e-4 for _, values in kept if len(values)), (
            "the largest of both halves"
        )


def test_one_lora_alone_is_cut_as_well_as_any_rank_can():
    """For one parent the halves' choice is the best there is (Eckart-Young)."""
    before = stacks((6,))
    after, loss = limit(before, max_rank=3)
    for key, stack in before.items():
        best = float(torch.linalg.svdvals(dense(stack).flatten(1))[3:].square().sum())
        assert float((dense(stack) - dense(after[key])).square().sum()) == pytest.approx(best, rel=1e-3)
    assert_told(before, after, loss)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_a_share_of_the_energy_is_kept_with_no_more_ranks_than_it_takes(keep):
    before = stacks((5, 4))
    after, loss = limit(before, keep=keep)
    for key, stack in after.items():
        squares = torch.cat([torch.linalg.svdvals(half(before[key], i).flatten(1))[:5].square() for i in (0, 1)])
        had = sum(float(torch.linalg.norm(half(stack, i)).square()) for i in (0, 1))
        assert had >= keep * float(squares.sum()) * (1 - 1e-5)
        fewer = squares.sort(descending=True).values[: sum(stack.ranks) - 1].sum()
        assert float(fewer) < keep * float(squares.sum())
    assert_told(before, after, loss)


def test_the_stricter_of_a_number_and_a_share_counts():
    before = stacks((5, 4))
    by_share = limit(before, keep=0.9)[0]
    both = limit(before, max_rank=2, keep=0.9)[0]
    assert all(sum(stack.ranks) == 2 for stack in both.values())
    assert all(sum(stack.ranks) > 2 for stack in by_share.values())
    roomy = limit(before, max_rank=8, keep=0.9)[0]
    assert all(roomy[key].ranks == by_share[key].ranks for key in before)


def test_energy_and_norm_are_two_names_of_one_share():
    from ziplora_lib.recipe import parse

    parents = [{"lora": name, "role": "subject", "prompt": name} for name in "ab"]

    def kept(**fields):
        return parse({"parents": parents, "output": "c", **fields}).kept_share

    assert kept() == 1.0
    assert kept(keep_energy=0.9) == 0.9
    assert kept(keep_norm=0.9) == pytest.approx(0.81)
    assert kept(keep_energy=0.5, keep_norm=0.9) == pytest.approx(0.81)
    assert kept(keep_energy=0.95, keep_norm=0.9) == pytest.approx(0.95)


def test_a_zero_layer_is_cut_without_a_loss():
    before = {"zero": Stack(torch.zeros(6, 4), torch.zeros(4, 8), (2, 2))}
    after, loss = limit(before, max_rank=1)
    assert sum(after["zero"].ranks) == 1
    assert loss.share == loss.worst == 0


def test_the_same_cut_twice_is_the_same():
    first, second = (limit(stacks(), max_rank=3)[0] for _ in range(2))
    for key in first:
        assert torch.equal(first[key].up, second[key].up)
        assert torch.equal(first[key].down, second[key].down)


def test_a_layer_that_is_next_to_zero_is_not_the_one_that_lost_most():
    """Two halves that cancel leave nothing of which a share could be told."""
    loss = Loss.of({"usual": 0.02, "cancelling": 37.0}, {"usual": 5.0, "cancelling": 1e-9})
    assert (loss.worst_key, loss.worst, loss.layers) == ("usual", 0.02, 2)
    assert loss.share == pytest.approx(0.02, rel=1e-6)


def test_a_half_with_more_ranks_than_its_layer_is_limited_too():
    """conv_out has four outputs, and files have it at rank 32 as everything else."""
    generator = torch.Generator().manual_seed(0)
    halves = [
        LowRankDelta(torch.randn(4, 32, generator=generator), torch.randn(32, 8, 3, 3, generator=generator))
        for _ in "abc"
    ]
    stack = Stack.of(halves)
    for rank, sum_of_ranks in ((16, 12), (12, 12), (7, 7)):
        smaller, loss = limit({"conv_out": stack}, max_rank=rank)
        assert sum(smaller["conv_out"].ranks) == sum_of_ranks
        lost = (stack.total().dense() - smaller["conv_out"].total().dense()).norm() ** 2 / stack.total().norm() ** 2
        assert loss.share == pytest.approx(float(lost), abs=1e-6)
    assert limit({"conv_out": stack}, max_rank=96)[1] is None
