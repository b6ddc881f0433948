"""Layer names: every spelling of a layer gives one key, and no two layers share one."""

import pytest

from ziplora_lib.lora.keys import is_unet, layer_key


def sgm_twins(levels=3, resnets=2, transformers=(1, 2), depth=(1, 1, 2)):
    """(diffusers' module name, sgm's) of SDXL's blocks, by walking sgm's openaimodel.UNetModel as its constructor does."""
    parts = [("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("conv2", "out_layers.3")]

    def resnet(ours, theirs, shortcut):
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in parts)
        if shortcut:
            yield f"{ours}.conv_shortcut", f"{theirs}.skip_connection"

    def transformer(ours, theirs, level):
        inner = ["proj_in", "proj_out"]
        for d in range(depth[level]):
            inner += [f"transformer_blocks.{d}.ff.net.0.proj", f"transformer_blocks.{d}.ff.net.2"]
            for attention in ("attn1", "attn2"):
                inner += [f"transformer_blocks.{d}.{attention}.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
        yield from ((f"{ours}.{p}", f"{theirs}.{p}") for p in inner)

    yield "conv_in", "input_blocks.0.0"
    yield "conv_out", "out.2"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    yield "add_embedding.linear_1", "label_emb.0.0"
    yield "add_embedding.linear_2", "label_emb.0.2"
    n = 1
    for level in range(levels):
        for i in range(resnets):
            yield from resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{n}.0", level > 0 and i == 0)
            if level in transformers:
                yield from transformer(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{n}.1", level)
            n += 1
        if level < levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
            n += 1
    yield from resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from transformer("mid_block.attentions.0", "middle_block.1", levels - 1)
    yield from resnet("mid_block.resnets.1", "middle_block.2", False)
    n = 0
    for up, level in enumerate(reversed(range(levels))):
        for i in range(resnets + 1):
            here = 1
            yield from resnet(f"up_blocks.{up}.resnets.{i}", f"output_blocks.{n}.0", True)
            if level in transformers:
                yield from transformer(f"up_blocks.{up}.attentions.{i}", f"output_blocks.{n}.1", level)
                here = 2
            if level > 0 and i == resnets:
                yield f"up_blocks.{up}.upsamplers.0.conv", f"output_blocks.{n}.{here}.conv"
            n += 1


TWINS = dict(sgm_twins())


def test_the_list_of_twins_is_the_whole_unet(layers):
    assert TWINS.keys() == {name for part, name in layers if part == "unet"}


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(lambda ours, sgm: "lora_unet_" + sgm.replace(".", "_"), id="kohya-sgm"),
        pytest.param(lambda ours, sgm: "lora_unet_" + ours.replace(".", "_"), id="kohya-diffusers"),
        pytest.param(lambda ours, sgm: f"unet.{ours}", id="diffusers-peft"),
        pytest.param(lambda ours, sgm: f"base_model.model.{ours}", id="peft"),
        pytest.param(lambda ours, sgm: f"base_model.model.unet.{ours}", id="peft-whole-pipeline"),
        pytest.param(lambda ours, sgm: f"diffusion_model.{sgm}", id="comfyui"),
    ],
)
def test_every_spelling_of_a_unet_layer_gives_its_key(spelling):
    keys = {sgm: layer_key(spelling(ours, sgm)) for ours, sgm in TWINS.items()}
    assert keys == {sgm: "lora_unet_" + sgm.replace(".", "_") for sgm in TWINS.values()}


def test_bare_names_of_blocks_are_unet_layers():
    blocks = {ours: sgm for ours, sgm in TWINS.items() if "block" in ours}
    assert len(blocks) > 200
    for ours, sgm in blocks.items():
        assert layer_key(ours) == "lora_unet_" + sgm.replace(".", "_")


def test_every_layer_has_a_key_of_its_own(layers):
    keys = [layer_key(f"{part}.{name}") for part, name in layers]
    assert None not in keys
    assert len(set(keys)) == len(keys) > 300
    assert [is_unet(key) for key in keys] == [part == "unet" for part, _ in layers]


def test_every_layer_is_found_in_the_model_by_its_key(host, layers):
    keys = {layer_key(f"{part}.{name}"): (part, name) for part, name in layers}
    slots = host.slots([*keys, "lora_unet_input_blocks_77_1_proj_in"])
    assert slots.keys() == keys.keys()
    for key, (part, name) in keys.items():
        assert slots[key].module is getattr(host.pipe, part).get_submodule(name)
        assert slots[key].shape == layers[part, name]


@pytest.mark.parametrize("encoder", [1, 2])
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"])
def test_every_spelling_of_a_text_encoder_layer_gives_its_key(encoder, layer):
    dotted, part = f"text_model.encoder.layers.11.{layer}", "text_encoder" + ("_2" if encoder == 2 else "")
    wanted = f"lora_te{encoder}_{dotted.replace('.', '_')}"
    assert layer_key(wanted) == wanted
    assert layer_key(f"{part}.{dotted}") == wanted
    assert layer_key(f"base_model.model.{part}.{dotted}") == wanted
    assert layer_key(f"{part}.{dotted.removeprefix('text_model.')}") == wanted  # transformers 5


def test_the_second_encoders_projection_is_not_taken_for_an_encoder_layer():
    assert layer_key("text_encoder_2.text_projection") == "lora_te2_text_projection"
    assert layer_key("lora_te2_text_projection") == "lora_te2_text_projection"


@pytest.mark.parametrize("name", ["transformer.single_transformer_blocks.0.attn.to_q", "model.norm", "lora_t5_x", ""])
def test_names_of_other_models_have_no_key(name):
    assert layer_key(name) is None


def test_diffusers_own_translation_from_sgm_agrees(layers):
    """diffusers renames sgm's layers back to its own: our key of each of its layers must come back as that layer."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    import torch

    from ziplora_lib.hosts.miniature import build_miniature

    names = {name for part, name in layers if part == "unet"}
    file = {}
    for name in names:
        for part in ("lora_down", "lora_up"):
            file[f"{layer_key('unet.' + name)}.{part}.weight"] = torch.zeros(1, 1)
    mapped = conversion._maybe_map_sgm_blocks_to_diffusers(dict(file), build_miniature().unet.config)
    converted, _ = conversion._convert_non_diffusers_lora_to_diffusers(mapped)
    back = {
        key.removeprefix("unet.").split(".lora")[0].split("_lora")[0].replace(".processor", "") for key in converted
    }
    back = {name + ".0" if name.endswith("to_out") else name for name in back}
    assert back == names
