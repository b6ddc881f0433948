"""What LoRAs do to each other: every measure on matrices done by hand, and from factors as from the dense ΔW."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import Lora
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge import analysis
from ziplora_lib.merge.analysis import Overlap, block_of, block_order, overlap

KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
SHAPES = [(5, 7), (4, 3, 3, 3), (4, 6, 1, 1)]


def delta(rows, scale=1.0):
    """A LowRankDelta whose ΔW is scale times this matrix: the identity is its up."""
    weight = torch.tensor(rows, dtype=torch.float32)
    return LowRankDelta(torch.eye(len(weight)), weight, scale)


def lora(deltas, name="a", **more):
    return Lora(name=name, path=Path(f"{name}.safetensors"), deltas=deltas, **more)


def random_deltas(shape, ranks=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRankDelta(
            torch.randn(shape[0], r, generator=generator), torch.randn(r, *shape[1:], generator=generator), 0.7 * r
        )
        for r in ranks
    ]


def met(*deltas):
    return overlap(Stack.of(deltas).column_grams())


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        (KEY, ("in 4", "attn1")),
        ("lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0", ("mid", "attn2")),
        ("lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_0_proj", ("out 0", "ff")),
        ("lora_unet_output_blocks_11_1_proj_in", ("out 11", "proj")),
        ("lora_unet_input_blocks_10_0_in_layers_2", ("in 10", "resnet")),
        ("lora_unet_input_blocks_4_0_skip_connection", ("in 4", "resnet")),
        ("lora_unet_middle_block_0_emb_layers_1", ("mid", "time")),
        ("lora_unet_input_blocks_3_0_op", ("in 3", "sampler")),
        ("lora_unet_output_blocks_2_2_conv", ("out 2", "sampler")),
        ("lora_unet_output_blocks_2_1_conv", ("out 2", "sampler")),
        ("lora_unet_input_blocks_0_0", ("in 0", "conv")),
        ("lora_unet_out_2", ("end", "conv")),
        ("lora_unet_out_0", ("end", "norm")),
        ("lora_unet_input_blocks_4_0_in_layers_0", ("in 4", "norm")),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_norm2", ("in 4", "norm")),
        ("lora_unet_time_embed_0", ("time", "time")),
        ("lora_unet_label_emb_0_2", ("time", "time")),
        ("lora_te1_text_model_encoder_layers_0_self_attn_out_proj", ("te1", "attn")),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", ("te2", "mlp")),
        ("lora_te2_text_projection", ("te2", "projection")),
        ("lora_te_text_model_embeddings_token_embedding", ("te", "embedding")),
        ("lora_te_text_model_final_layer_norm", ("te", "norm")),
        ("anything", ("other", "other")),
    ],
)
def test_the_block_and_group_of_a_layer(key, wanted):
    assert block_of(key) == wanted


def test_blocks_sort_as_a_picture_passes_through_them():
    blocks = ["out 10", "out 2", "mid", "in 10", "in 4", "time", "te2", "te1", "te", "end", "other"]
    wanted = ["te", "te1", "te2", "time", "in 4", "in 10", "mid", "out 2", "out 10", "end", "other"]
    assert sorted(blocks, key=block_order) == wanted


def test_every_layer_of_the_miniature_has_a_block_and_a_group(layers):
    found = [block_of(layer_key(f"{part}.{name}")) for part, name in layers]
    assert "other" not in {word for pair in found for word in pair}
    assert {"te1", "te2", "time", "in 0", "in 8", "mid", "out 0", "out 8", "end"} <= {block for block, _ in found}


def test_norms_by_block():
    one = lora({
        KEY: delta([[3.0, 0.0], [0.0, 4.0]]),
        KEY.replace("to_q", "to_k"): delta([[0.0, 6.0], [0.0, 0.0]], scale=2.0),
        "lora_unet_middle_block_1_proj_in": delta([[1.0]], scale=-2.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": delta([[5.0]]),
    })  # fmt: skip
    assert analysis.norms_by_block(one) == pytest.approx({"te1": 5.0, "in 4": 13.0, "mid": 2.0})
    assert list(analysis.norms_by_block(one)) == ["te1", "in 4", "mid"]


def test_a_lora_with_itself_and_with_its_opposite():
    one = delta([[1.0, 2.0], [3.0, -4.0]])
    same = met(one, one)
    assert (same.column_cosine, same.interference, same.cosine) == pytest.approx((1.0, 1.0, 1.0))
    opposite = met(one, one.strength(-0.5))
    assert (opposite.column_cosine, opposite.interference, opposite.cosine) == pytest.approx((1.0, 1.0, -1.0))


def test_orthogonal_columns_do_not_interfere():
    nothing = met(delta([[1.0, 0.0], [0.0, 2.0]]), delta([[0.0, 3.0], [4.0, 0.0]]))
    assert (nothing.column_cosine, nothing.interference, nothing.cosine) == (0.0, 0.0, 0.0)


def test_known_cosines_of_two_columns():
    # column 0: (1, 0) against (1, 1), cosine 1/√2; column 1: (0, 2) against (0, -3), cosine -1
    found = met(delta([[1.0, 0.0], [0.0, 2.0]]), delta([[1.0, 0.0], [1.0, -3.0]]))
    assert found.columns == 2
    assert found.column_cosine == pytest.approx((1 / math.sqrt(2) + 1) / 2)
    assert found.interference == pytest.approx((1 + 6) / (math.sqrt(2) + 6))
    assert found.cosine == pytest.approx((1 - 6) / (math.sqrt(5) * math.sqrt(11)))


def test_columns_that_cancel_in_the_sum_still_interfere():
    found = met(delta([[1.0, 1.0]]), delta([[1.0, -1.0]]))
    assert (found.column_cosine, found.interference, found.cosine) == pytest.approx((1.0, 1.0, 0.0))


def test_a_zero_column_and_a_zero_lora_have_no_cosine():
    half = met(delta([[1.0, 1.0]]), delta([[2.0, 0.0]]))
    assert (half.columns, half.column_cosine, half.interference) == pytest.approx((2, 0.5, 1.0))
    zero = met(delta([[1.0, 1.0]]), delta([[0.0, 0.0]]))
    assert (zero.column_cosine, zero.interference, zero.cosine) == (0.0, 0.0, 0.0)
    assert Overlap().column_cosine == Overlap().interference == Overlap().cosine == 0.0


def test_layers_add_up_to_the_whole():
    shape = (5, 7)
    parts = [random_deltas(shape, seed=seed) for seed in (0, 1)]
    whole = [LowRankDelta(torch.eye(5), torch.cat([p[i].dense() for p in parts], dim=1)) for i in (0, 1)]
    added, wanted = met(*parts[0]) + met(*parts[1]), met(*whole)
    for field in ("columns", "column_cosine", "interference", "cosine", "energy_c", "energy_s"):
        assert getattr(added, field) == pytest.approx(getattr(wanted, field), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_factors_say_what_the_dense_matrices_say(shape, seed, ranks):
    deltas = random_deltas(shape, ranks, seed)
    c, s = (d.dense().flatten(1).double() for d in deltas)
    found = met(*deltas)
    products, lengths = (c * s).sum(0), c.norm(dim=0) * s.norm(dim=0)
    assert found.column_cosine == pytest.approx(float((products.abs() / lengths).mean()), abs=1e-4)
    assert found.interference == pytest.approx(float(products.abs().sum() / lengths.sum()), abs=1e-4)
    assert found.cosine == pytest.approx(float((c * s).sum() / (c.norm() * s.norm())), abs=1e-4)
    assert abs(found.inner) <= found.crossed * (1 + 1e-9) <= found.lengths * (1 + 1e-5)
    assert 0 <= found.column_cosine <= 1


@settings(max_examples=25, deadline=None)
@given(m=st.lists(st.floats(0.1, 2.0), min_size=14, max_size=14))
def test_coefficients_leave_the_column_cosine_and_change_the_weighted_overlap(m):
    """METHOD: scaling two columns by positive numbers leaves their cosine as it was."""
    m = torch.tensor(m).reshape(2, 7)
    before = Stack.of(random_deltas((5, 7)))
    after = before.merged(m)
    grams = before.column_grams()
    assert overlap(after.column_grams()).column_cosine == pytest.approx(overlap(grams).column_cosine, abs=1e-4)
    products = grams[0, 1].abs()
    wanted = float(((m[0] * m[1]).abs() * products).sum() / products.sum())
    assert analysis.weighted_overlap({KEY: before}, {KEY: after}) == pytest.approx(
        {"in 4": wanted, "all": wanted}, rel=1e-4
    )


def test_the_weighted_overlap_is_the_objectives():
    from ziplora_lib.merge import objective

    stacks = {
        KEY: Stack.of(random_deltas((5, 7), (3, 2, 4))),
        "lora_unet_out_2": Stack.of(random_deltas((4, 6), (1, 2, 2))),
    }
    m = {
        key: torch.randn(3, stack.columns, generator=torch.Generator().manual_seed(1)) for key, stack in stacks.items()
    }
    grams = torch.cat([stack.column_grams() for stack in stacks.values()], dim=-1)
    columns = objective.Columns(grams, [7, 6], torch.ones(3, 13, dtype=torch.bool))
    wanted = float(objective.overlap(torch.cat(list(m.values()), dim=1), columns))
    found = analysis.weighted_overlap(stacks, {key: stack.merged(m[key]) for key, stack in stacks.items()})
    assert list(found) == ["in 4", "end", "all"]
    assert found["all"] == pytest.approx(wanted, rel=1e-5)
    assert analysis.weighted_overlap(stacks, stacks)["all"] == 1.0
    assert analysis.weighted_overlap({}, {}) == {}


def test_kernels_of_one_and_flat_ones_are_the_same_layer():
    flat, kernel = random_deltas((4, 6))[0], random_deltas((4, 6, 1, 1))[1]
    assert analysis.stacked([lora({KEY: flat}), lora({KEY: kernel}, "b")], KEY).shape == (4, 6, 1, 1)
    wide, kernel = random_deltas((4, 27))[0], random_deltas((4, 3, 3, 3))[1]
    assert analysis.stacked([lora({KEY: wide}), lora({KEY: kernel}, "b")], KEY).shape == (4, 3, 3, 3)


def test_layers_that_do_not_fit_are_refused_by_file_and_key():
    deltas = [random_deltas((4, 6))[0], random_deltas((4, 7))[0]]
    with pytest.raises(BadInput, match=rf"b.safetensors: key '{KEY}': made for a layer of shape \[4, 7\].*\[4, 6\]"):
        analysis.stacked([lora({KEY: d}, name) for name, d in zip("ab", deltas)], KEY)


@pytest.mark.parametrize(
    ("energies", "parts", "wanted"),
    [
        ([1.0, 1.0, 1.0, 1.0], (0.25, 0.5, 0.8, 1.0), (0.25, 0.5, 1.0, 1.0)),
        ([1.0, 9.0], (0.5, 0.9, 0.95), (0.5, 0.5, 1.0)),
        ([0.0, 0.0, 0.0, 5.0], (0.5, 0.95), (0.25, 0.25)),
    ],
)
def test_the_share_of_the_largest(energies, parts, wanted):
    assert analysis.shares_of_largest(torch.tensor(energies), parts) == wanted


@pytest.mark.parametrize(
    ("energies", "parts", "wanted"),
    [
        ([1.0, 1.0, 1.0, 1.0], (0.1, 0.25, 0.5), (0.0, 0.25, 0.5)),
        ([98.0, 1.0, 1.0], (0.01, 0.02, 0.5), (1 / 3, 2 / 3, 2 / 3)),
        ([0.0, 0.0, 0.0, 5.0], (0.01, 0.1), (0.75, 0.75)),
    ],
)
def test_the_share_of_the_smallest(energies, parts, wanted):
    assert analysis.shares_of_smallest(torch.tensor(energies), parts) == wanted


def test_sparsity_by_hand():
    # columns of energy 16, 4, 0, 0; of the eight elements six are zero, and the 2 holds a fifth of the energy
    found = analysis.sparsity(delta([[4.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]], scale=-3.0))
    assert found.columns == (0.25, 0.25, 0.5)
    assert found.elements == (0.75, 0.75)
    assert (found.rows, found.out) == (2, 2)
    assert analysis.sparsity(delta([[0.0, 0.0]])) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_sparsity_from_factors_is_that_of_the_dense_matrix(shape):
    d = random_deltas(shape)[0]
    found, square = analysis.sparsity(d), d.dense().flatten(1).square()
    assert found.columns == analysis.shares_of_largest(square.sum(0), analysis.COLUMN_ENERGIES)
    assert found.elements == pytest.approx(
        analysis.shares_of_smallest(square.flatten(), analysis.ELEMENT_ENERGIES), abs=1 / square.numel()
    )


def test_a_large_layer_is_counted_in_some_of_its_rows(monkeypatch):
    d = random_deltas((400, 64), (8, 8))[0]
    whole = analysis.sparsity(d)
    monkeypatch.setattr(analysis, "_ELEMENTS", 100 * 64)
    some = analysis.sparsity(d)
    assert (whole.rows, some.rows, some.out) == (400, 100, 400)
    assert some.columns == whole.columns
    assert some.elements == pytest.approx(whole.elements, abs=0.02)


def test_mean_sparsity_counts_a_layer_as_often_as_it_has_columns():
    a = analysis.Sparsity((0.1, 0.2, 0.3), (0.4, 0.5), 3, 4)
    b = analysis.Sparsity((0.5, 0.6, 0.7), (0.8, 0.9), 5, 50)
    found = analysis.mean_sparsity([(1, a), (3, b)])
    assert found.columns == pytest.approx((0.4, 0.5, 0.6))
    assert found.elements == pytest.approx((0.7, 0.8))
    assert (found.rows, found.out) == (8, 54)
    assert analysis.mean_sparsity([]) is None
