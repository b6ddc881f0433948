"""Two LoRAs side by side: every layer of either is in the merge, and what does not belong is refused with file and key."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.kinds import DenseLayer
from ziplora_lib.lora.reader import Lora
from ziplora_lib.lora.vectors import Vectors
from ziplora_lib.merge.pairing import equalising, pair, refuse_unfit, report, unmatched

Q, K, V, MISSING = (f"lora_unet_input_blocks_4_1_{name}" for name in ("to_q", "to_k", "to_v", "not_there"))
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {Q: (6, 8), K: (6, 8), V: (6, 8, 1, 1), TEXT: (6, 8)}


def lora(name, ranks, base="sdxl", size=1.0, shape=(6, 8)):
    generator = torch.Generator().manual_seed(len(name))
    deltas = {
        key: LowRankDelta(
            torch.randn(shape[0], rank, generator=generator) * size, torch.randn(rank, *shape[1:], generator=generator)
        )
        for key, rank in ranks.items()
    }
    return Lora(name, Path(f"/somewhere/{name}.safetensors"), deltas, base=base)


SUBJECT = {Q: 2, K: 3, TEXT: 2, MISSING: 1}
STYLE = {Q: 4, V: 1}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_union_of_the_layers_is_in_the_merge():
    subject, style = lora("dog", SUBJECT), lora("ink", STYLE)
    pairing = pair([subject, style], [0.8, 1.5], SHAPES)
    assert pairing.stacks.keys() == {Q, K, V, TEXT, MISSING}
    assert pairing.learned == sorted([Q, K, V]), "every UNet layer that the model has, also those of one alone"
    assert pairing.vectors == {}
    assert pairing.stacks[Q].ranks == (2, 4)
    assert pairing.stacks[V].ranks == (0, 1)
    assert pairing.stacks[V].shape == (6, 8, 1, 1), "as the model has it, whatever the file says"
    close(pairing.stacks[Q].total().dense(), 0.8 * subject.deltas[Q].dense() + 1.5 * style.deltas[Q].dense())
    close(pairing.stacks[K].total().dense(), 0.8 * subject.deltas[K].dense())
    close(pairing.stacks[TEXT].total().dense(), 0.8 * subject.deltas[TEXT].dense())
    close(pairing.stacks[MISSING].total().dense(), 0.8 * subject.deltas[MISSING].dense())


def test_layers_that_neither_the_model_nor_both_files_agree_on_are_refused():
    subject, style = lora("dog", {MISSING: 2}), lora("ink", {MISSING: 2}, shape=(6, 9))
    with pytest.raises(BadInput) as caught:
        pair([subject, style], [1, 1], SHAPES)
    assert caught.value.file == "ink.safetensors"
    assert caught.value.key == MISSING


def test_a_layer_of_another_width_is_refused_with_file_and_key():
    wrong = lora("dog", {Q: 2}, shape=(6, 9))
    for attempt in (lambda: pair([wrong], [1], SHAPES), lambda: refuse_unfit(wrong, SHAPES, "the model", "sdxl")):
        with pytest.raises(BadInput, match=r"\[6, 9\].*\[6, 8\]") as caught:
            attempt()
        assert (caught.value.file, caught.value.key) == ("dog.safetensors", Q)
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("base", "word", "wanted", "wanted_word"),
    [("sd1", "SD 1.5", "sdxl", "SDXL"), ("sd2", "SD 2", "sdxl", "SDXL"), ("sdxl", "SDXL", "sd1", "SD 1.5")],
)
def test_a_lora_for_another_base_is_refused_even_if_it_would_fit(base, word, wanted, wanted_word):
    with pytest.raises(BadInput, match=f"{word}.*the model is {wanted_word}") as caught:
        refuse_unfit(lora("dog", {Q: 2}, base=base), SHAPES, "the model", wanted)
    assert caught.value.file == "dog.safetensors"
    assert caught.value.key == Q
    assert wanted_word in caught.value.remedy


def test_a_lora_without_one_layer_of_the_model_is_refused():
    with pytest.raises(BadInput, match="none of its 1 layers") as caught:
        refuse_unfit(lora("flux", {MISSING: 2}, base="unknown"), SHAPES, "the model", "sdxl")
    assert caught.value.key == MISSING


def test_a_lora_that_fits_is_not_refused():
    refuse_unfit(lora("dog", SUBJECT), SHAPES, "the model", "sdxl")
    refuse_unfit(lora("dog", SUBJECT, base="sd1"), SHAPES, "the model", "sd1")
    refuse_unfit(lora("dog", {Q: 1}, base="unknown"), SHAPES, "the model", "sdxl")
    refuse_unfit(lora("dog", {TEXT: 1}), SHAPES, "the model", "sdxl")
    assert unmatched(lora("dog", SUBJECT), SHAPES) == [MISSING]


def test_text_encoder_layers_are_learned_where_that_is_asked_for():
    loras = [lora("dog", SUBJECT), lora("ink", STYLE)]
    assert pair(loras, [1, 1], SHAPES, learn_text=True).learned == sorted([Q, K, V, TEXT])
    assert report(loras, [1, 1], SHAPES, learn_text=True)["learned_layers"] == 4


def test_a_lora_of_the_models_own_base_is_not_refused():
    old = lora("dog", {Q: 1}, base="sd1")
    refuse_unfit(old, SHAPES, "the model", "sd1")
    with pytest.raises(BadInput, match="SDXL"):
        refuse_unfit(lora("dog", {Q: 1}), SHAPES, "the model", "sd1")


NORM = "lora_unet_input_blocks_4_1_norm"
WITH_NORM = {**SHAPES, NORM: (6,)}


def with_vectors(subject, **vectors):
    return replace(subject, vectors={key: Vectors(bias=torch.ones(1, n)) for key, n in vectors.items()})


def test_norms_and_biases_are_summed_at_their_strengths():
    subject, style = with_vectors(lora("dog", {Q: 2}), **{NORM: 6, Q: 6}), with_vectors(lora("ink", STYLE), **{NORM: 6})
    pairing = pair([subject, style], [0.8, 1.5], WITH_NORM)
    assert pairing.learned == [Q, V]
    close(pairing.vectors[NORM].bias, torch.tensor([[0.8] * 6, [1.5] * 6]))
    close(pairing.vectors[Q].bias, torch.tensor([[0.8] * 6, [0.0] * 6]))
    told = report([subject, style], [0.8, 1.5], WITH_NORM)
    assert told["vectors"] == 2
    assert "2 norms and biases are summed" in " ".join(told["warnings"])


def test_a_norm_of_another_width_is_refused_with_file_and_key():
    with pytest.raises(BadInput, match=r"7 outputs.*6") as caught:
        refuse_unfit(with_vectors(lora("dog", {Q: 2}), **{NORM: 7}), WITH_NORM, "the model", "sdxl")
    assert (caught.value.file, caught.value.key) == ("dog.safetensors", NORM)


def reported(*loras, strengths=None, **options):
    return report(loras, strengths or [1.0] * len(loras), SHAPES, **options)


def test_the_report_counts_everything():
    told = reported(lora("dog", SUBJECT), lora("ink", STYLE))
    # Q of both, K of one, V of the other
    assert (told["learned_layers"], told["learned_coefficients"]) == (3, 2 * 8 + 8 + 8)
    assert (told["shared_layers"], told["text_layers"], told["vectors"]) == (1, 1, 0)
    dog, ink = told["parents"]
    assert (dog["name"], dog["file"], dog["base"]) == ("dog", "dog.safetensors", "SDXL")
    assert (dog["layers"], dog["matched"], dog["ranks"]) == (4, 3, [1, 2, 3])
    assert (ink["layers"], ink["matched"], ink["ranks"]) == (2, 2, [1, 4])
    assert told["values"] == sum(rank * (6 + 8) for ranks in (SUBJECT, STYLE) for rank in ranks.values())


def test_the_report_counts_what_the_model_has_yet_to_work_out():
    dora = replace(lora("dog", {Q: 2}), dense={K: DenseLayer("DoRA of LoRA", {}), MISSING: DenseLayer("full", {})})
    told = reported(dora, lora("ink", STYLE), dense_rank=4)
    assert (told["learned_layers"], told["learned_coefficients"]) == (3, 2 * 8 + 8 + 8)
    assert told["parents"][0]["norm"] is None
    assert told["values"] == (2 + 4 + 4 + 1) * (6 + 8), "of the missing one nothing can be known"
    assert reported(dora, lora("ink", STYLE))["values"] == (2 + 6 + 4 + 1) * (6 + 8), "whole: the layer's full rank"
    warnings = " | ".join(told["warnings"])
    assert "dog: 2 layers (DoRA of LoRA, full) have no factors of their own" in warnings
    assert "rank 4 or less" in warnings
    assert "1 of them cannot be kept" in warnings
    assert "times as strong" not in warnings, "not known yet"


def test_the_report_warns_of_all_that_is_not_learned():
    warnings = " | ".join(reported(lora("dog", SUBJECT), lora("ink", STYLE, base="unknown"))["warnings"])
    assert "dog has 1 layer (" in warnings
    assert "that this model does not have; the rest is kept in the file but not learned" in warnings
    assert MISSING in warnings
    assert "2 UNet layers are in dog alone" in warnings
    assert "1 UNet layers are in ink alone" in warnings
    assert "1 text encoder layers are summed" in warnings
    assert "ink does not say which base model" in warnings
    assert "share no UNet layer" not in warnings
    assert "text encoder" not in " ".join(
        reported(lora("dog", SUBJECT), lora("ink", STYLE), learn_text=True)["warnings"]
    )


def test_a_pair_without_a_common_layer_is_told():
    told = reported(lora("dog", {K: 2}), lora("ink", {V: 2}))
    assert "share no UNet layer" in " ".join(told["warnings"])
    assert told["learned_layers"] == 2


def test_lopsided_strengths_are_pointed_out():
    pairs = [lora("dog", {Q: 2}, size=20), lora("ink", {Q: 2})]
    said = " ".join(reported(*pairs)["warnings"])
    assert "dog is" in said
    assert "times as strong as ink" in said
    even = [float(number) for number in re.findall(r"(?:dog|ink) ([\d.]+)(?=[,;])", said)]
    assert len(even) == 2
    norms = [one.norm() * w for one, w in zip(pairs, even)]
    assert norms[0] == pytest.approx(norms[1], rel=0.1), "the strengths that it says make them even"
    assert "times as strong" not in " ".join(reported(*pairs, strengths=even)["warnings"])
    assert reported(lora("dog", {Q: 2}), lora("ink", {Q: 2}))["warnings"] == []


def test_a_lora_that_is_zero_is_pointed_out():
    assert "dog changes nothing" in " ".join(reported(lora("dog", {Q: 2}, size=0), lora("ink", {Q: 2}))["warnings"])


@pytest.mark.parametrize("norms", [[1.0, 4.0], [0.5, 2.0, 8.0], [3.0]])
def test_equalising_brings_all_to_their_geometric_mean(norms):
    brought = [norm * factor for norm, factor in zip(norms, equalising(norms))]
    assert brought == pytest.approx([math.prod(norms) ** (1 / len(norms))] * len(norms))


def test_equalising_leaves_zeros_alone():
    assert equalising([0.0, 2.0, 8.0]) == pytest.approx([1.0, 2.0, 0.5])
    assert equalising([0.0, 0.0]) == [1.0, 1.0]
