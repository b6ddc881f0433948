"""Layer names: every spelling of a layer in a file, and back again, as data.

A layer key is kohya's name with sgm's block numbers, `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`,
`lora_te1_text_model_encoder_layers_0_self_attn_q_proj`: the spelling that SDXL's trainers write and every loader reads.
SD 1.x and 2.x have one text encoder, `lora_te_…`, and the same UNet numbers but for the first upsampler.
The block numbers follow from two resnets a block (three on the way up), see sgm's openaimodel.UNetModel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from ziplora_lib.errors import BadInput

# how a file may begin a layer's name -> the part of the pipeline; "te" is the encoder of a pipeline that has only one
PREFIXES = {
    # kohya's tools, LyCORIS, OneTrainer
    "lora_unet_": "unet",
    "lora_te_": "te",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    # kohya's OFT
    "oft_unet_": "unet",
    "oft_te_": "te",
    "oft_te1_": "te1",
    "oft_te2_": "te2",
    # LyCORIS around one module, which SimpleTuner saves
    "lycoris_": "unet",
    "lycoris_text_model_": "te",
    # diffusers, PEFT on a whole pipeline
    "unet.": "unet",
    "text_encoder.": "te1",
    "text_encoder_2.": "te2",
    # ComfyUI, and OneTrainer's later formats
    "diffusion_model.": "unet",
    "text_encoders.clip_l.": "te1",
    "text_encoders.clip_g.": "te2",
    "text_encoders.clip_h.": "te",
    "clip_l.": "te1",
    "clip_g.": "te2",
    "clip_h.": "te",
    # the UNet alone
    "": "unet",
}
_PREFIXES = sorted(PREFIXES, key=len, reverse=True)
# what PEFT puts before all of these
_CONTAINER = "base_model.model."

# base model -> part -> how its layer keys begin
KEY_STARTS = {
    "sdxl": {"unet": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_"},
    "sd1": {"unet": "lora_unet_", "te": "lora_te_", "te1": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "te": "lora_te_", "te1": "lora_te_"},
}

_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


def _down(m: re.Match) -> str:
    block, kind, i, rest = int(m[1]), m[2], int(m[3]), m[4]
    return f"input_blocks_{1 + 3 * block + i}_" + (f"1_{rest}" if kind == "attentions" else f"0_{_RESNET[rest]}")


def _middle(m: re.Match) -> str:
    kind, i, rest = m[1], int(m[2]), m[3]
    return "middle_block_" + (f"1_{rest}" if kind == "attentions" else f"{2 * i}_{_RESNET[rest]}")


def _up(m: re.Match) -> str:
    block, kind, i, rest = int(m[1]), m[2], int(m[3]), m[4]
    return f"output_blocks_{3 * block + i}_" + (f"1_{rest}" if kind == "attentions" else f"0_{_RESNET[rest]}")


Rules = list[tuple[str, Callable[[re.Match], str]]]

# a UNet layer in diffusers' spelling, dots written as underscores -> in sgm's
UNET_RULES: Rules = [
    (r"conv_in", lambda m: "input_blocks_0_0"),
    (r"conv_out", lambda m: "out_2"),
    (r"conv_norm_out", lambda m: "out_0"),
    (r"time_embedding_linear_([12])", lambda m: f"time_embed_{2 * int(m[1]) - 2}"),
    (r"add_embedding_linear_([12])", lambda m: f"label_emb_0_{2 * int(m[1]) - 2}"),
    (r"down_blocks_([0-9]{1,3})_(attentions)_([0-9]{1,3})_(.+)", _down),
    (rf"down_blocks_([0-9]{{1,3}})_(resnets)_([0-9]{{1,3}})_({'|'.join(_RESNET)})", _down),
    (r"down_blocks_([0-9]{1,3})_downsamplers_0_conv", lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op"),
    (r"mid_block_(attentions)_([0-9]{1,3})_(.+)", _middle),
    (rf"mid_block_(resnets)_([0-9]{{1,3}})_({'|'.join(_RESNET)})", _middle),
    (r"up_blocks_([0-9]{1,3})_(attentions)_([0-9]{1,3})_(.+)", _up),
    (rf"up_blocks_([0-9]{{1,3}})_(resnets)_([0-9]{{1,3}})_({'|'.join(_RESNET)})", _up),
    (r"up_blocks_([0-9]{1,3})_upsamplers_0_conv", lambda m: f"output_blocks_{2 + 3 * int(m[1])}_2_conv"),
    (r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_[0-9]{1,3}(?![0-9]).*", lambda m: m[0]),
]
# sgm counts what stands before it in its block, and the attention there is SDXL's alone
_FIRST_UPSAMPLER = {
    "sdxl": "output_blocks_2_2_conv",
    "sd1": "output_blocks_2_1_conv",
    "sd2": "output_blocks_2_1_conv",
}

_OPEN_CLIP = {
    "attn": "self_attn",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp_c_fc": "mlp_fc1",
    "mlp_c_proj": "mlp_fc2",
}

# a text encoder's layer, dots written as underscores -> in transformers' spelling, as kohya names it
TEXT_RULES: Rules = [
    (r"(?:transformer_)?(text_model_.+|text_projection)", lambda m: m[1]),
    # newer transformers leave out the wrapper that every other tool names
    (r"(?:encoder_layers|embeddings)_.+|final_layer_norm", lambda m: f"text_model_{m[0]}"),
    (
        rf"(?:model_)?transformer_resblocks_([0-9]{{1,3}})_({'|'.join(_OPEN_CLIP)})(.*)",
        lambda m: f"text_model_encoder_layers_{m[1]}_{_OPEN_CLIP[m[2]]}{m[3]}",
    ),
    (r"(?:model_)?ln_final", lambda m: "text_model_final_layer_norm"),
]


def layer_key(name: str, base: str = "sdxl") -> str | None:
    """The layer key of a layer's name in any known spelling, or None for a name of no known kind.

    base: "sdxl", "sd1" or "sd2". A text encoder that the base does not have has no known name.
    """
    name = name.removeprefix(_CONTAINER)
    prefix = next(p for p in _PREFIXES if name.startswith(p))
    part, rest = PREFIXES[prefix], name[len(prefix) :].replace(".", "_")
    start = KEY_STARTS[base].get(part)
    if start is None:
        return None
    if part != "unet":
        rest = _renamed(rest, TEXT_RULES)
        return rest and start + rest
    # diffusers once named attention by its processor, and the output by its list
    rest = rest.replace("_processor_", "_") + ("_0" if rest.endswith("_to_out") else "")
    rest = _renamed(rest, UNET_RULES)
    if rest in _FIRST_UPSAMPLER.values():  # OneTrainer numbers SD 1.x's as SDXL's
        rest = _FIRST_UPSAMPLER[base]
    return rest and start + rest


def _renamed(name: str, rules: Rules) -> str | None:
    for pattern, rename in rules:
        if match := re.fullmatch(pattern, name):
            return rename(match)
    return None


def is_unet(key: str) -> bool:
    return key.startswith("lora_unet_")


def listed(keys: Sequence[str]) -> str:
    """How many layers, and the first of them by name, for a message."""
    return f"{len(keys)} layer{'s' * (len(keys) != 1)} ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''})"


def span(ranks: Sequence[int]) -> str:
    """Ranks in words, smallest first: "8", "4 to 16", "" for none."""
    return "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


# The spellings that a file can be saved in.
LAYER_NAMES = ("kohya", "diffusers", "peft")


def spelled(key: str, base: str = "sdxl", names: str = "kohya") -> str:
    """The name under which a file of that spelling (one of LAYER_NAMES) holds a layer's tensors.

    kohya: what kohya's tools write for the base, the layer key for SDXL and diffusers' numbers for SD 1.x and 2.x.
    diffusers: `unet.down_blocks.1.…`. peft: `base_model.model.down_blocks.1.…`, as a PEFT adapter of the UNet.
    Raises BadInput for a layer that no pipeline of the base has, whose dots are not known.
    """
    if names == "kohya" and (base == "sdxl" or not is_unet(key)):
        return key
    name = _dotted_names(base).get(_COUNTED.sub("#", key))
    if number := _COUNTED.search(key):
        name = name and name.replace("#", number[0])
    if names == "kohya":
        # the WebUI does not know conv_norm_out, but reads sgm's name of it
        return key if name in (None, "unet.conv_norm_out") else "lora_" + name.replace(".", "_")
    if name is None:
        raise BadInput(
            f"is no layer of a pipeline, and has no name in {names}'s spelling",
            key=key,
            remedy="Save it with kohya's names",
        )
    return name if names == "diffusers" else _CONTAINER + name.removeprefix("unet.")


# the numbers of which a pipeline may have any, # below
_COUNTED = re.compile(r"(?<=transformer_blocks_)\d+|(?<=encoder_layers_)\d+")


# base model -> how many levels its UNet has, and on which of them there is attention
_LEVELS = {"sdxl": (3, (1, 2)), "sd1": (4, (0, 1, 2)), "sd2": (4, (0, 1, 2))}
_WIDENED = (1, 2)  # the levels that begin with more channels than the one before
_ENDS = ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
_SDXL_ENDS = ("add_embedding.linear_1", "add_embedding.linear_2")
_TRANSFORMER = (
    "norm",
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.{layer}" for layer in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")),
    *(f"transformer_blocks.#.attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
)
_TEXT = (
    "embeddings.token_embedding",
    "embeddings.position_embedding",
    "final_layer_norm",
    *(f"encoder.layers.#.{layer}" for layer in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")),
    *(f"encoder.layers.#.self_attn.{layer}_proj" for layer in ("q", "k", "v", "out")),
)


def _blocks(base: str) -> Iterator[tuple[str, int, int, tuple[int, ...], str]]:
    """diffusers' blocks of a UNet: (name, resnets, attentions, the resnets with a shortcut, sampler or "")."""
    levels, attended = _LEVELS[base]
    for level in range(levels):
        last = level == levels - 1
        attentions = 2 if level in attended else 0
        yield f"down_blocks.{level}", 2, attentions, (0,) if level in _WIDENED else (), "" if last else "downsamplers"
        attentions = 3 if levels - 1 - level in attended else 0
        yield f"up_blocks.{level}", 3, attentions, (0, 1, 2), "" if last else "upsamplers"
    yield "mid_block", 2, 1, (), ""


def _unet_names(base: str) -> Iterator[str]:
    yield from (*_ENDS, *(_SDXL_ENDS if base == "sdxl" else ()))
    for block, resnets, attentions, shortcuts, sampler in _blocks(base):
        for i in range(resnets):
            yield from (f"{block}.resnets.{i}.{part}" for part in _RESNET if i in shortcuts or part != "conv_shortcut")
        for i in range(attentions):
            yield from (f"{block}.attentions.{i}.{part}" for part in _TRANSFORMER)
        if sampler:
            yield f"{block}.{sampler}.0.conv"


@cache
def _dotted_names(base: str) -> dict[str, str]:
    """Every layer of the base's pipeline: layer key -> diffusers' name with its part, counted numbers as #."""
    names = [f"unet.{name}" for name in _unet_names(base)]
    for encoder in ("text_encoder", "text_encoder_2") if base == "sdxl" else ("text_encoder",):
        names += [f"{encoder}.text_model.{name}" for name in _TEXT]
    if base == "sdxl":
        names.append("text_encoder_2.text_projection")
    return {layer_key(name, base): name for name in names}
