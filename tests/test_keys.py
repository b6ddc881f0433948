"""Layer names: every spelling of a layer gives one key, and no two layers share one."""

import ast
import os
import re
from pathlib import Path

import pytest
from architectures import layers as real_layers
from architectures import text_name

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.keys import LAYER_NAMES, is_unet, layer_key, spelled

BASES = ("sdxl", "sd1", "sd2")


def sgm_twins(base):
    """(diffusers' module name, sgm's) of a UNet's layers, by walking sgm's UNetModel as its constructor does."""
    if base == "sdxl":
        levels, transformers, depth = 3, (1, 2), (0, 2, 10)
    else:
        levels, transformers, depth = 4, (0, 1, 2), (1, 1, 1, 1)
    parts = [
        ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
    ]  # fmt: skip

    def resnet(ours, theirs, shortcut):
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in parts)
        if shortcut:
            yield f"{ours}.conv_shortcut", f"{theirs}.skip_connection"

    def transformer(ours, theirs, level):
        inner = ["norm", "proj_in", "proj_out"]
        for d in range(depth[level]):
            inner += [f"transformer_blocks.{d}.{p}" for p in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")]
            for attention in ("attn1", "attn2"):
                inner += [f"transformer_blocks.{d}.{attention}.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
        yield from ((f"{ours}.{p}", f"{theirs}.{p}") for p in inner)

    yield "conv_in", "input_blocks.0.0"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    if base == "sdxl":
        yield "add_embedding.linear_1", "label_emb.0.0"
        yield "add_embedding.linear_2", "label_emb.0.2"
    n = 1
    for level in range(levels):
        for i in range(2):
            yield from resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{n}.0", level in (1, 2) and i == 0)
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
        for i in range(3):
            here = 1
            yield from resnet(f"up_blocks.{up}.resnets.{i}", f"output_blocks.{n}.0", True)
            if level in transformers:
                yield from transformer(f"up_blocks.{up}.attentions.{i}", f"output_blocks.{n}.1", level)
                here = 2
            if level > 0 and i == 2:
                yield f"up_blocks.{up}.upsamplers.0.conv", f"output_blocks.{n}.{here}.conv"
            n += 1


TWINS = {base: dict(sgm_twins(base)) for base in BASES}


def names_of(base):
    """Every layer of the real pipeline as diffusers' files call it."""
    return [f"{part}.{name if part == 'unet' else text_name(name)}" for part, name in real_layers(base)]


@pytest.mark.parametrize("base", BASES)
def test_the_list_of_twins_is_the_whole_unet(base):
    assert TWINS[base].keys() == {name for part, name in real_layers(base) if part == "unet"}
    assert len(set(TWINS[base].values())) == len(TWINS[base]) > 300


def processors(name):
    """The name of attention's layers in diffusers' first LoRA files, without what the reader takes for the part."""
    name = re.sub(r"(attn\d)\.", r"\1.processor.", name)
    return name.removesuffix(".0") if name.endswith("to_out.0") else name


UNET_SPELLINGS = {
    "kohya, sgm's numbers": lambda ours, sgm: "lora_unet_" + sgm.replace(".", "_"),
    "kohya and OneTrainer, diffusers' numbers": lambda ours, sgm: "lora_unet_" + ours.replace(".", "_"),
    "kohya's OFT, sgm's numbers": lambda ours, sgm: "oft_unet_" + sgm.replace(".", "_"),
    "kohya's OFT, diffusers' numbers": lambda ours, sgm: "oft_unet_" + ours.replace(".", "_"),
    "LyCORIS' wrapper": lambda ours, sgm: "lycoris_" + ours.replace(".", "_"),
    "diffusers": lambda ours, sgm: f"unet.{ours}",
    "diffusers' processors": lambda ours, sgm: f"unet.{processors(ours)}",
    "the UNet's processors": lambda ours, sgm: processors(ours),
    "PEFT": lambda ours, sgm: f"base_model.model.{ours}",
    "PEFT, whole pipeline": lambda ours, sgm: f"base_model.model.unet.{ours}",
    "OneTrainer's OMI": lambda ours, sgm: f"unet.{sgm}",
    "OneTrainer's original": lambda ours, sgm: sgm,
    "the UNet alone": lambda ours, sgm: ours,
    "ComfyUI": lambda ours, sgm: f"diffusion_model.{sgm}",
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("spelling", UNET_SPELLINGS)
def test_every_spelling_of_a_unet_layer_gives_its_key(spelling, base):
    keys = {sgm: layer_key(UNET_SPELLINGS[spelling](ours, sgm), base) for ours, sgm in TWINS[base].items()}
    assert keys == {sgm: "lora_unet_" + sgm.replace(".", "_") for sgm in TWINS[base].values()}


def test_onetrainers_number_of_the_first_upsampler_of_sd1():
    assert layer_key("unet.output_blocks.2.2.conv", "sd1") == "lora_unet_output_blocks_2_1_conv"
    assert layer_key("unet.output_blocks.2.2.conv", "sdxl") == "lora_unet_output_blocks_2_2_conv"
    assert layer_key("unet.output_blocks.5.2.conv", "sd1") == "lora_unet_output_blocks_5_2_conv"


@pytest.mark.parametrize("base", BASES)
def test_every_layer_has_a_key_of_its_own(base):
    names = names_of(base)
    keys = [layer_key(name, base) for name in names]
    assert None not in keys
    assert len(set(keys)) == len(keys) > 400
    assert [is_unet(key) for key in keys] == [name.startswith("unet.") for name in names]
    assert [layer_key(key, base) for key in keys] == keys


def test_every_layer_is_found_in_the_model_by_its_key(host, layers):
    keys = {layer_key(f"{part}.{name}"): (part, name) for part, name in layers}
    slots = host.slots([*keys, "lora_unet_input_blocks_77_1_proj_in"])
    assert slots.keys() == keys.keys()
    for key, (part, name) in keys.items():
        assert slots[key].module is getattr(host.pipe, part).get_submodule(name)
        assert slots[key].shape == layers[part, name]


# open_clip's name of a layer of the encoder -> transformers'
OPEN_CLIP = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@pytest.mark.parametrize("layer", OPEN_CLIP)
@pytest.mark.parametrize("encoder", [1, 2])
def test_every_spelling_of_a_text_encoder_layer_gives_its_key(encoder, layer):
    part, clip = ("text_encoder", "clip_l") if encoder == 1 else ("text_encoder_2", "clip_g")
    dotted = f"text_model.encoder.layers.11.{OPEN_CLIP[layer]}"
    wanted = f"lora_te{encoder}_{dotted.replace('.', '_')}"
    short = dotted.removeprefix("text_model.")  # transformers 5
    spellings = [
        wanted, f"lora_te{encoder}_{short.replace('.', '_')}", f"oft_te{encoder}_{dotted.replace('.', '_')}",
        f"{part}.{dotted}", f"{part}.{short}", f"base_model.model.{part}.{dotted}", f"base_model.model.{part}.{short}",
        f"text_encoders.{clip}.transformer.{dotted}", f"{clip}.transformer.{dotted}", f"{clip}.{dotted}",
        f"lora_te{encoder}_transformer_resblocks_11_{layer.replace('.', '_')}",
        f"{part}.transformer.resblocks.11.{layer}", f"text_encoders.{clip}.transformer.resblocks.11.{layer}",
        f"{clip}.model.transformer.resblocks.11.{layer}",
    ]  # fmt: skip
    assert {name: layer_key(name) for name in spellings} == dict.fromkeys(spellings, wanted)


@pytest.mark.parametrize("base", ["sd1", "sd2"])
def test_a_base_with_one_encoder_has_one_name_for_it(base):
    dotted = "text_model.encoder.layers.7.mlp.fc1"
    wanted = f"lora_te_{dotted.replace('.', '_')}"
    flat = wanted.removeprefix("lora_te_")
    spellings = [
        wanted, f"lora_te1_{flat}", f"oft_te_{flat}", f"lycoris_{flat}", f"text_encoder.{dotted}",
        f"base_model.model.text_encoder.{dotted}", f"text_encoders.clip_h.transformer.{dotted}",
        f"text_encoders.clip_l.transformer.{dotted}", f"clip_l.{dotted}",
        "text_encoder.transformer.resblocks.7.mlp.c_fc",
    ]  # fmt: skip
    assert {name: layer_key(name, base) for name in spellings} == dict.fromkeys(spellings, wanted)
    for other in (f"lora_te2_{flat}", f"text_encoder_2.{dotted}", f"clip_g.transformer.{dotted}"):
        assert layer_key(other, base) is None
    for one in (wanted, f"lycoris_{flat}", f"clip_h.transformer.{dotted}"):
        assert layer_key(one) is None


def test_what_stands_outside_the_encoders_layers():
    assert layer_key("text_encoder_2.text_projection") == "lora_te2_text_projection"
    assert layer_key("lora_te2_text_projection") == "lora_te2_text_projection"
    assert layer_key("text_encoders.clip_g.transformer.text_projection") == "lora_te2_text_projection"
    last = "text_model_final_layer_norm"
    for name in ("text_encoder_2.text_model.final_layer_norm", "text_encoder_2.final_layer_norm", "clip_g.ln_final"):
        assert layer_key(name) == f"lora_te2_{last}"
    assert layer_key("lora_te_text_model_final_layer_norm", "sd1") == f"lora_te_{last}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.norm",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "lora_t5_x",
        "lora_te1_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te3_text_model_encoder_layers_0_mlp_fc1",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_joint_blocks_0_context_block_attn_qkv",
        "lora_unet_down_blocks_0_2_attention_attn_to_q",
        "lora_unet_down_blocks_0_resnets_0_unheard_of",
        "lora_prior_unet_down_blocks_0_0_channelwise_0",
        "lora_prior_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_transformer_single_transformer_blocks_0_attn_to_q",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "base_model.model.transformer.transformer_blocks.0.attn.to_q",
        "first_stage_model.decoder.conv_in",
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_names_of_other_models_have_no_key(name, base):
    assert layer_key(name, base) is None


@pytest.mark.parametrize("names", LAYER_NAMES)
@pytest.mark.parametrize("base", BASES)
def test_every_layer_comes_back_from_every_spelling(base, names):
    keys = [layer_key(name, base) for name in names_of(base)]
    back = {key: spelled(key, base, names) for key in keys}
    assert len(set(back.values())) == len(keys)
    assert {key: layer_key(name, base) for key, name in back.items()} == dict(zip(keys, keys))


@pytest.mark.parametrize("base", BASES)
def test_the_names_are_those_of_the_pipelines_modules(base):
    for name in names_of(base):
        key = layer_key(name, base)
        assert spelled(key, base, "diffusers") == name
        assert spelled(key, base, "peft") == "base_model.model." + name.removeprefix("unet.")
        if base == "sdxl" or not is_unet(key):
            assert spelled(key, base, "kohya") == key
        elif name != "unet.conv_norm_out":
            assert spelled(key, base, "kohya") == "lora_" + name.replace(".", "_")


@pytest.mark.parametrize("names", ["diffusers", "peft"])
@pytest.mark.parametrize(
    ("base", "key"),
    [
        ("sdxl", "lora_unet_input_blocks_77_1_proj_in"),
        ("sdxl", "lora_unet_input_blocks_1_1_proj_in"),
        ("sdxl", "lora_unet_middle_block_0_skip_connection"),
        ("sdxl", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("sd1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        ("sd1", "lora_unet_label_emb_0_0"),
        ("sd1", "lora_unet_output_blocks_2_2_conv"),
        ("sd1", "lora_unet_input_blocks_10_0_skip_connection"),
        ("sd2", "lora_unet_input_blocks_10_1_proj_in"),
    ],
)
def test_a_layer_that_no_pipeline_has_is_refused_by_name(base, key, names):
    with pytest.raises(BadInput, match="no layer of a pipeline") as caught:
        spelled(key, base, names)
    assert caught.value.key == key
    assert caught.value.remedy
    assert spelled(key, base, "kohya") == key


@pytest.mark.parametrize("base", BASES)
def test_the_webui_finds_every_layer_under_kohyas_name(base):
    """Its own function that translates names, run on ours; what it leaves alone is looked up by sgm's name."""
    networks = Path(os.environ.get("WEBUI_DIR", "~/stable-diffusion-webui")).expanduser()
    networks = networks / "extensions-builtin" / "Lora" / "networks.py"
    if not networks.is_file():
        pytest.skip("no WebUI is installed")
    wanted = ("re_digits", "re_compiled", "suffix_conversion", "convert_diffusers_name_to_compvis")
    nodes = [
        node
        for node in ast.parse(networks.read_text(encoding="utf-8")).body
        if getattr(node, "name", None) in wanted
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted)
    ]
    assert len(nodes) == len(wanted)
    scope = {"re": re}
    exec(compile(ast.Module(nodes, []), str(networks), "exec"), scope)
    translate = scope["convert_diffusers_name_to_compvis"]
    for ours, sgm in TWINS[base].items():
        name = spelled(layer_key(f"unet.{ours}", base), base, "kohya")
        found = {translate(name, base == "sd2"), name.replace("lora_unet", "diffusion_model")}
        assert f"diffusion_model_{sgm.replace('.', '_')}" in found, name


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
