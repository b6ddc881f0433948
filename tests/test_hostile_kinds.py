"""Small files that ask for a lot, or that are not what they say: a clear word at once, and no absurd allocation."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ziplora_lib.errors import BadInput
from ziplora_lib.job import run
from ziplora_lib.lora.bake import split
from ziplora_lib.lora.kinds import kind_of, read_layer
from ziplora_lib.lora.reader import read

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
NORM = "lora_unet_input_blocks_4_1_norm"


@pytest.fixture
def little_memory():
    """No more than 4 GB beyond what is there: Linux would promise a terabyte, and kill whoever uses it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path, tensors, word="", **metadata):
    save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()})
    with pytest.raises(BadInput) as caught:
        read(path)
    assert path.name in str(caught.value)
    assert word in str(caught.value)
    assert caught.value.remedy
    return caught.value


def named(**parts):
    return {f"{LAYER}.{part}": tensor for part, tensor in parts.items()}


ABSURD = {
    "LoHa of 10¹⁰": named(
        hada_w1_a=torch.ones(100_000, 1), hada_w1_b=torch.ones(1, 100_000),
        hada_w2_a=torch.ones(100_000, 1), hada_w2_b=torch.ones(1, 100_000),
    ),
    "LoKr of 10¹⁰": named(lokr_w1=torch.ones(100_000, 1), lokr_w2=torch.ones(1, 100_000)),
    "a Tucker core of 10¹²": {
        f"{LAYER}.lora_up.weight": torch.ones(8, 1, 1, 1),
        f"{LAYER}.lora_mid.weight": torch.ones(1, 1, 1000, 1000),
        f"{LAYER}.lora_down.weight": torch.ones(1, 1_000_000, 1, 1),
    },
    "a LoHa's Tucker core": named(
        hada_t1=torch.ones(1, 1, 1000, 1000), hada_w1_a=torch.ones(1, 8), hada_w1_b=torch.ones(1, 1_000_000),
        hada_t2=torch.ones(1, 1, 1000, 1000), hada_w2_a=torch.ones(1, 8), hada_w2_b=torch.ones(1, 1_000_000),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_a_small_file_cannot_ask_for_terabytes(tmp_path, little_memory, name):
    refused(tmp_path / "absurd.safetensors", ABSURD[name], "larger than any model's")


@pytest.mark.parametrize("kind", ["hada", "lokr"])
def test_ranks_above_the_layers_own_are_never_expanded(little_memory, kind):
    """r_1·r_2 = 10¹⁰ on a layer of 8 x 8: the same ΔW, at the layer's rank or for the host to work out."""
    a, b = torch.randn(8, 100_000) / 300, torch.randn(100_000, 8) / 300
    if kind == "hada":
        parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": -a, "hada_w2_b": b, "scale": torch.tensor(0.5)}
        delta = read_layer("LoHa", parts)
        assert delta.rank == 8
        torch.testing.assert_close(delta.dense(), -0.5 * (a @ b) ** 2)
    else:
        parts = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": a, "lokr_w2_b": b}
        layer = read_layer("LoKr", parts)
        assert kind_of(layer.parts) == "LoKr"
        assert layer.extent == (64, 64)


@pytest.mark.parametrize(
    "tensors",
    [
        named(lokr_w1=torch.ones(2, 2), lokr_w2_a=torch.ones(2, 2), lokr_w2_b=torch.tensor(1.0)),
        named(hada_w1_a=torch.tensor(1.0), **{f"hada_{n}": torch.ones(2, 2) for n in ("w1_b", "w2_a", "w2_b")}),
        named(dora_scale=torch.ones(5, 1), **{"lora_up.weight": torch.ones(5, 5), "lora_down.weight": torch.ones(4, 5)}),
        named(ziplora_bias=torch.tensor(1.0)),
        named(ziplora_up=torch.ones(2, 3), ziplora_down=torch.ones(2, 3)),
    ],
)  # fmt: skip
def test_parts_of_odd_dimensions(tmp_path, tensors):
    refused(tmp_path / "odd.safetensors", tensors)


PLAIN = {"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": torch.ones(2, 8),
         "unet.down_blocks.1.attentions.0.proj_in.lora_B.weight": torch.ones(8, 2)}  # fmt: skip


def test_a_pattern_in_a_file_cannot_hang_the_program(tmp_path):
    def out_of_time(*_):
        raise TimeoutError

    settings = {"unet.alpha_pattern": {"(([a-z_.0-9])+)+!": 4}, "unet.lora_alpha": 2}
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(20)
    try:
        refused(tmp_path / "slow.safetensors", PLAIN, "alpha", lora_adapter_metadata=settings)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(
    "pattern", ["proj_in", r"attentions\.0\.proj_in", "^down_blocks.1.*proj_in", ".*(proj_in|proj_out)"]
)
def test_patterns_that_peft_writes_are_read(tmp_path, pattern):
    settings = {"unet.alpha_pattern": {pattern: 6}, "unet.lora_alpha": 2, "unet.r": 2}
    save_file(PLAIN, tmp_path / "plain.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    (delta,) = read(tmp_path / "plain.safetensors").deltas.values()
    assert delta.scale == 3.0


def test_an_alpha_beyond_all_numbers(tmp_path):
    save_file(PLAIN, tmp_path / "big.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 1' + "0" * 400 + "}"})
    with pytest.raises(BadInput, match="alpha"):
        read(tmp_path / "big.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bundle_emb.foo.clip_l", torch.full((1, 4), float("nan"))),
        ("bundle_emb.foo.clip_l", torch.ones(1, 4, dtype=torch.int64)),
        ("bundle_emb.foo.clip_l", torch.ones(1, 1, 4)),
        ("bundle_emb.foo", torch.ones(1, 4)),
        ("bundle_emb.", torch.ones(1, 4)),
    ],
)
def test_an_embedding_that_is_none(tmp_path, name, tensor):
    error = refused(tmp_path / "emb.safetensors", {**PLAIN, name: tensor}, "embedding")
    assert error.key == name


def norm_only(path, weight: float, bias: float):
    tensors = {f"{NORM}.w_norm": torch.full((64,), weight), f"{NORM}.b_norm": torch.full((64,), bias)}
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    return path


def test_loras_of_norms_alone_are_added_and_split(host, recipe_of, tmp_path):
    """Also where only the bias of a norm is changed, which is nothing without a weight of zeros beside it."""
    parents = [norm_only(tmp_path / "one.safetensors", 0.25, 0.5), norm_only(tmp_path / "two.safetensors", 0.0, 0.125)]
    result = run(recipe_of(subject=parents[0], style=parents[1], dtype="fp32"), host)
    assert any("nothing to learn" in warning for warning in result.warnings)
    assert not any("changes nothing" in warning for warning in result.warnings)
    halves = [tmp_path / "half-one.safetensors", tmp_path / "half-two.safetensors"]
    split(host.destination("merged"), halves)
    for path, weight, bias in [
        (host.destination("merged"), 0.25, 0.625),
        (halves[0], 0.25, 0.5),
        (halves[1], 0.0, 0.125),
    ]:
        vectors = read(path).vectors[NORM]
        assert torch.equal(vectors.weight.sum(0), torch.full((64,), weight)), path.name
        assert torch.equal(vectors.bias.sum(0), torch.full((64,), bias)), path.name


def test_a_dora_of_another_width_is_refused_before_any_work(host, recipe_of, tmp_path):
    tensors = {f"{LAYER}.lora_up.weight": torch.ones(9, 2), f"{LAYER}.lora_down.weight": torch.ones(2, 9),
               f"{LAYER}.dora_scale": torch.ones(9, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "wide.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(BadInput, match="made for a layer of 9 x 9") as caught:
        run(recipe_of(subject=tmp_path / "wide.safetensors"), host)
    assert caught.value.key == LAYER


@pytest.mark.parametrize("names", ["diffusers", "peft"])
def test_nothing_but_norms_cannot_be_saved_in_names_that_have_no_place_for_them(host, recipe_of, tmp_path, names):
    parents = [norm_only(tmp_path / "one.safetensors", 0.25, 0.5), norm_only(tmp_path / "two.safetensors", 0.0, 0.125)]
    with pytest.raises(BadInput, match="norms and biases alone"):
        run(recipe_of(subject=parents[0], style=parents[1], layer_names=names, method="direct"), host)
    assert not host.destination("merged").exists()


def test_a_card_that_cannot_be_written_costs_no_merge(host, recipe_of, monkeypatch):
    from ziplora_lib.lora import writer

    real = writer.write_beside

    def full(path, ending, data):
        if ending == ".json":
            raise OSError(28, "No space left on device")
        real(path, ending, data)

    monkeypatch.setattr(writer, "write_beside", full)
    result = run(recipe_of(method="direct"), host)
    assert read(host.destination("merged")).deltas
    assert any("its card could not be written (No space left on device)" in warning for warning in result.warnings)


def test_equal_norms_are_kept_in_the_file_and_not_warned_of(host, recipe_of, pair_files):
    result = run(recipe_of(method="direct", equal_norms=True, dtype="fp32"), host)
    assert not any("times as strong" in warning for warning in result.warnings)
    kept = json.loads(read(host.destination("merged")).metadata["ziplora.recipe"])["parents"]
    norms = [read(path).norm() * parent["strength"] for path, parent in zip(pair_files, kept)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_stop_between_pictures_is_told(host, recipe_of):
    result = run(recipe_of(method="direct", balance_points=3), host, lambda info: info["phase"] == "preview")
    assert not result.pictures
    assert any("interrupted" in warning for warning in result.warnings)
    assert host.destination("merged").exists()
