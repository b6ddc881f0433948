"""The strength inside a file: alpha / rank, whatever alpha is written as, and rank where there is none."""

import json

import pytest
import torch
from loras import lora_tensors
from safetensors.torch import save_file

from ziplora_lib.lora.reader import peek, read

LINEAR = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
POINTWISE = "lora_unet_input_blocks_4_0_skip_connection"
TEXT_1 = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
TEXT_2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {LINEAR: (10, 12), CONV: (6, 4, 3, 3), POINTWISE: (6, 4, 1, 1), TEXT_1: (8, 4), TEXT_2: (8, 6)}


def dense(tensors, layer, scale):
    up, down = (tensors[f"{layer}.lora_{part}.weight"].double() for part in ("up", "down"))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def assert_reads_as(path, tensors, scales):
    lora = read(path)
    assert lora.deltas.keys() == scales.keys()
    for layer, scale in scales.items():
        torch.testing.assert_close(
            lora.deltas[layer].dense().double(), dense(tensors, layer, scale), rtol=1e-5, atol=1e-7
        )
    return lora


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_alpha_of_every_number_format(tmp_path, dtype, shape):
    tensors = lora_tensors(SHAPES, rank=4)
    for layer in SHAPES:
        tensors[f"{layer}.alpha"] = torch.full(shape, 2).to(dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    assert_reads_as(tmp_path / "a.safetensors", tensors, dict.fromkeys(SHAPES, 0.5))


def test_a_missing_alpha_is_the_rank(tmp_path):
    tensors = lora_tensors(SHAPES, rank=4)
    save_file(tensors, tmp_path / "a.safetensors")
    assert_reads_as(tmp_path / "a.safetensors", tensors, dict.fromkeys(SHAPES, 1.0))


def test_each_layer_has_its_own_rank_and_alpha(tmp_path):
    tensors, scales = {}, {}
    for i, (layer, shape) in enumerate(SHAPES.items()):
        rank, alpha = i + 1, [None, 3.0, 0.5, 8.0, None][i]
        tensors |= lora_tensors({layer: shape}, rank=rank, alpha=alpha, seed=i)
        scales[layer] = 1.0 if alpha is None else alpha / rank
    save_file(tensors, tmp_path / "a.safetensors")
    lora = assert_reads_as(tmp_path / "a.safetensors", tensors, scales)
    assert lora.ranks == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_of_every_number_format_are_read_as_they_stand(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in lora_tensors(SHAPES, rank=3, alpha=6.0).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    lora = assert_reads_as(tmp_path / "a.safetensors", tensors, dict.fromkeys(SHAPES, 2.0))
    assert lora.dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(lora.deltas[CONV].down, tensors[f"{CONV}.lora_down.weight"])


def test_a_convolution_keeps_its_shape_and_a_pointwise_one_may_be_written_flat(tmp_path):
    tensors = lora_tensors(SHAPES, rank=3)
    for part in ("up", "down"):
        name = f"{POINTWISE}.lora_{part}.weight"
        tensors[name] = tensors[name].flatten(1)
    save_file(tensors, tmp_path / "a.safetensors")
    deltas = read(tmp_path / "a.safetensors").deltas
    assert deltas[CONV].shape == (6, 4, 3, 3)
    assert deltas[POINTWISE].shape == (6, 4)
    assert deltas[POINTWISE].fitted((6, 4, 1, 1)).shape == (6, 4, 1, 1)


def peft_file(path, config, rank=4):
    """A LoRA as diffusers saves it since it keeps PEFT's settings in the metadata."""
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("attn1.to_q", "attn1.to_k", "attn2.to_k"):
        tensors[f"{name}.{layer}.lora_A.weight"] = torch.randn(rank, 12, generator=generator)
        tensors[f"{name}.{layer}.lora_B.weight"] = torch.randn(10, rank, generator=generator)
    save_file(tensors, path, metadata={"lora_adapter_metadata": config})
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_"
    return {
        layer: (read(path).deltas[key + layer.replace(".", "_")], tensors[f"{name}.{layer}.lora_B.weight"].double()
                @ tensors[f"{name}.{layer}.lora_A.weight"].double())
        for layer in ("attn1.to_q", "attn1.to_k", "attn2.to_k")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"unet.lora_alpha": 2}, (0.5, 0.5, 0.5)),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, (0.25, 2.0, 2.0)),
        # patterns are regular expressions on the end of a layer's name, the first that fits counts
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 1, "attn2.to_k": 2}}, (2.0, 0.25, 0.25)),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {r"attn\d\.to_k": 1}}, (2.0, 0.25, 0.25)),
        ({"unet.lora_alpha": 2, "unet.use_rslora": True}, (1.0, 1.0, 1.0)),
        ({"text_encoder.lora_alpha": 2}, (1.0, 1.0, 1.0)),
        ({}, (1.0, 1.0, 1.0)),
    ],
)
def test_alphas_in_diffusers_metadata(tmp_path, config, scales):
    read_back = peft_file(tmp_path / "a.safetensors", json.dumps(config))
    for (delta, plain), scale in zip(read_back.values(), scales):
        torch.testing.assert_close(delta.dense().double(), scale * plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", ["", "no json", "3", "null", "[]", '"unet.lora_alpha"', '{"unet.lora_alpha": null}'])
def test_unreadable_adapter_metadata_counts_as_none(tmp_path, config):
    for delta, plain in peft_file(tmp_path / "a.safetensors", config).values():
        torch.testing.assert_close(delta.dense().double(), plain, rtol=1e-5, atol=1e-6)


def test_metadata_and_card_are_kept_and_peek_sees_them_too(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(lora_tensors({LINEAR: (4, 4)}), path, metadata={"ss_output_name": "cat"})
    (tmp_path / "a.json").write_text('{"activation text": "sks cat"}', encoding="utf-8")
    for lora in (read(path), peek(path)):
        assert (lora.name, lora.path) == ("a", path)
        assert lora.metadata == {"ss_output_name": "cat"}
        assert lora.sidecar == {"activation text": "sks cat"}
    assert peek(path).deltas == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_an_unreadable_card_counts_as_none(tmp_path, text):
    path = tmp_path / "a.safetensors"
    save_file(lora_tensors({LINEAR: (4, 4)}), path)
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    assert read(path).sidecar == {}


def old_diffusers(layer, style):
    if style == "processor":
        block, _, projection = layer.rpartition(".")
        if projection == "0":
            block, _, _ = block.rpartition(".")
            projection = "to_out"
        return [f"unet.{block}.processor.{projection}_lora.{part}.weight" for part in ("up", "down")]
    return [f"unet.{layer}.{style}.{part}.weight" for part in ("up", "down")]


@pytest.mark.parametrize("style", ["processor", "lora", "lora_linear_layer"])
@pytest.mark.parametrize("projection", ["to_q", "to_k", "to_v", "to_out.0"])
def test_diffusers_older_spellings(tmp_path, style, projection):
    up, down = torch.randn(5, 2), torch.randn(2, 7)
    names = old_diffusers(f"mid_block.attentions.0.transformer_blocks.3.attn2.{projection}", style)
    save_file(dict(zip(names, (up, down))), tmp_path / "a.safetensors")
    lora = read(tmp_path / "a.safetensors")
    key = f"lora_unet_middle_block_1_transformer_blocks_3_attn2_{projection.replace('.', '_')}"
    assert list(lora.deltas) == [key]
    torch.testing.assert_close(lora.deltas[key].dense(), up @ down)


@pytest.mark.parametrize(
    ("layer", "width", "base"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, "sdxl"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 768, "sd1"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 1024, "sd2"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", 320, "sd1"),
        ("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_q", 320, "sd1"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, "sd1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, "sdxl"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k", 640, "unknown"),
    ],
)
def test_the_base_model_is_told_from_the_layers(tmp_path, layer, width, base):
    save_file(lora_tensors({layer: (8, width)}), tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").base == base


@pytest.mark.parametrize(("version", "base"), [("sdxl_base_v1-0", "sdxl"), ("sd_v1", "sd1"), ("", "unknown")])
def test_the_metadata_tells_the_base_model_where_the_layers_do_not(tmp_path, version, base):
    tensors = lora_tensors({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k": (8, 640)})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_base_model_version": version})
    assert read(tmp_path / "a.safetensors").base == base
