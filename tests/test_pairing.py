"""Two LoRAs side by side: every layer of either is in the merge, and what does not belong is refused with file and key."""

from pathlib import Path

import pytest
import torch

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.reader import Lora
from ziplora_lib.merge.pairing import pair, refuse_unfit, report, unmatched

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
    assert pairing.learned == [Q]
    assert [set(keys) for keys in pairing.alone] == [{K, MISSING}, {V}]
    assert pairing.text == [TEXT]
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


@pytest.mark.parametrize("ranks", [{MISSING: 2}, {TEXT: 2}, {MISSING: 1, TEXT: 1}])
def test_a_lora_without_one_unet_layer_of_the_model_is_refused(ranks):
    with pytest.raises(BadInput, match="none of its") as caught:
        refuse_unfit(lora("flux", ranks, base="unknown"), SHAPES, "the model", "sdxl")
    assert caught.value.key in ranks


def test_a_lora_that_fits_is_not_refused():
    refuse_unfit(lora("dog", SUBJECT), SHAPES, "the model", "sdxl")
    refuse_unfit(lora("dog", SUBJECT, base="sd1"), SHAPES, "the model", "sd1")
    refuse_unfit(lora("dog", {Q: 1}, base="unknown"), SHAPES, "the model", "sdxl")
    assert unmatched(lora("dog", SUBJECT), SHAPES) == [MISSING]


def reported(subject, style, strengths=(1.0, 1.0)):
    pairing = pair([subject, style], strengths, SHAPES)
    return report([subject, style], pairing, SHAPES)


def test_the_report_counts_everything():
    told = reported(lora("dog", SUBJECT), lora("ink", STYLE))
    assert (told["learned_layers"], told["learned_coefficients"]) == (1, 2 * 8)
    assert (told["alone_layers"], told["text_layers"]) == ([2, 1], 1)
    dog, ink = told["parents"]
    assert (dog["name"], dog["file"], dog["base"]) == ("dog", "dog.safetensors", "SDXL")
    assert (dog["layers"], dog["matched"], dog["ranks"]) == (4, 3, [1, 2, 3])
    assert (ink["layers"], ink["matched"], ink["ranks"]) == (2, 2, [1, 4])
    assert told["values"] == sum(rank * (6 + 8) for ranks in (SUBJECT, STYLE) for rank in ranks.values())


def test_the_report_warns_of_all_that_is_not_learned():
    warnings = " | ".join(reported(lora("dog", SUBJECT), lora("ink", STYLE, base="unknown"))["warnings"])
    assert "dog: 1 of 4 layers are not in this model" in warnings
    assert MISSING in warnings
    assert "2 UNet layers are in dog alone" in warnings
    assert "1 UNet layers are in ink alone" in warnings
    assert "1 text encoder layers are summed" in warnings
    assert "ink does not say which base model" in warnings
    assert "nothing to learn" not in warnings


def test_a_pair_without_a_common_layer_is_the_plain_sum_and_says_so():
    assert "nothing to learn" in " ".join(reported(lora("dog", {K: 2}), lora("ink", {V: 2}))["warnings"])


def test_lopsided_strengths_are_pointed_out():
    assert "times as strong" in " ".join(reported(lora("dog", {Q: 2}, size=20), lora("ink", {Q: 2}))["warnings"])
    assert reported(lora("dog", {Q: 2}), lora("ink", {Q: 2}))["warnings"] == []
