"""ΔW of one layer: every operation on the factors is the same operation on the dense matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import DenseDelta, LowRankDelta

SHAPES = [(5, 7), (4, 3, 3, 3), (4, 6, 1, 1)]


def delta(shape, rank=3, scale=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        torch.randn(shape[0], rank, generator=generator), torch.randn(rank, *shape[1:], generator=generator), scale
    )


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-6, check_dtype=False)


def by_hand(d):
    """Σ_r scale · up[:, r] ⊗ down[r], entry by entry in float64."""
    total = torch.zeros(d.shape, dtype=torch.float64)
    for r in range(d.rank):
        for i in range(d.shape[0]):
            total[i] += d.scale * float(d.up[i, r]) * d.down[r].double()
    return total


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_norm_and_strength(shape):
    d = delta(shape)
    assert (d.shape, d.rank) == (shape, 3)
    close(d.dense(), by_hand(d))
    close(d.norm(), by_hand(d).norm())
    close(d.strength(-0.5).dense(), -0.5 * by_hand(d))
    close(d.strength(-0.5).norm(), 0.5 * by_hand(d).norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients_scale_columns_of_the_input_axis(shape):
    d = delta(shape)
    m = torch.randn(shape[1:])
    wanted = by_hand(d) * m  # broadcast over the first, the output axis
    close(d.scaled_columns(m).dense(), wanted)
    close(d.scaled_columns(m.flatten()).dense(), wanted)
    close(DenseDelta(d.dense()).scaled_columns(m).dense(), wanted)
    close(DenseDelta(d.dense()).strength(2.0).dense(), 2 * by_hand(d))


def test_one_column_of_a_layer_is_one_input_feature():
    d, m = delta((5, 7)), torch.ones(7)
    m[2] = 0
    x = torch.zeros(7)
    x[2] = 1.0
    assert float((d.scaled_columns(m).dense() @ x).norm()) == 0.0
    assert float((d.dense() @ x).norm()) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_column_products_and_cosine(shape):
    a, b = delta(shape, 3, 0.7, 1), delta(shape, 2, -1.3, 2)
    da, db = by_hand(a).flatten(1), by_hand(b).flatten(1)
    close(a.column_products(b), (da * db).sum(0))
    close(a.column_cosine(b), torch.nn.functional.cosine_similarity(da, db, dim=0))
    close(a.column_cosine(a), torch.ones(da.shape[1]))
    assert a.column_products(b).shape == (da.shape[1],)


def test_the_cosine_of_a_zero_column_is_zero():
    a, b = delta((5, 7), seed=1), delta((5, 7), seed=2)
    m = torch.ones(7)
    m[3] = 0.0
    cosine = a.scaled_columns(m).column_cosine(b)
    assert float(cosine[3]) == 0.0
    assert torch.isfinite(cosine).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_is_the_best_of_its_rank_and_tells_its_loss(shape, rank):
    d = delta(shape)
    singular = torch.linalg.svdvals(by_hand(d).flatten(1))
    for kind in (d, DenseDelta(d.dense())):
        short, lost = kind.low_rank(rank)
        assert short.rank == rank
        assert short.shape == shape
        error = (short.dense().double() - by_hand(d)).square().sum() / by_hand(d).square().sum()
        close(lost, error)
        close(lost, singular[rank:].square().sum() / singular.square().sum())


def test_low_rank_of_enough_rank_is_exact():
    d = delta((5, 7))
    assert d.low_rank() == (d, 0.0)
    assert d.low_rank(3) == (d, 0.0)
    full, lost = DenseDelta(d.dense()).low_rank()
    close(full.dense(), d.dense())
    assert lost < 1e-9


@pytest.mark.parametrize(
    ("mine", "model"),
    [((5, 7), (5, 7, 1, 1)), ((5, 7, 1, 1), (5, 7)), ((5, 7, 3, 3), (5, 7, 3, 3)), ((5, 7), (5, 7))],
)
def test_pointwise_kernels_come_and_go(mine, model):
    d = delta(mine)
    fitted = d.fitted(model)
    assert fitted.shape == model
    close(fitted.dense().flatten(), by_hand(d).flatten())


@pytest.mark.parametrize(
    ("mine", "model"),
    [((5, 7), (5, 8)), ((5, 7), (6, 7)), ((5, 7), (7, 5)), ((5, 64), (5, 7, 3, 3)), ((5, 7, 3, 3), (5, 63)),
     ((5, 7, 1, 1), (5, 7, 3, 3)), ((5, 7, 3, 3), (5, 7)), ((5, 7, 3, 1), (5, 7, 1, 3))],
)  # fmt: skip
def test_other_shapes_are_refused(mine, model):
    with pytest.raises(BadInput, match=r"shape \["):
        delta(mine).fitted(model)


@settings(max_examples=50, deadline=None)
@given(
    out=st.integers(1, 6),
    width=st.integers(1, 6),
    rank=st.integers(1, 8),
    scale=st.floats(-4, 4, allow_nan=False),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_norm_and_products_of_any_factors(out, width, rank, scale, dtype, seed):
    d = delta((out, width), rank, scale, seed)
    d = LowRankDelta(d.up.to(dtype), d.down.to(dtype), scale)
    dense = by_hand(d)
    close(d.norm(), dense.norm())
    # in fp32 as exact as the sizes of what is added up allow, also where it cancels
    sizes = (d.up.float().abs() @ d.down.float().abs() * abs(scale)).square().sum(0)
    assert ((d.column_products(d) - dense.square().sum(0)).abs() <= 2e-6 * sizes + 1e-12).all()
