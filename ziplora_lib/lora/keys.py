"""Layer names: kohya's, sgm's and diffusers'/PEFT's spellings of the same layer, as data.

A layer key is kohya's name with sgm's block numbers, `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`,
`lora_te1_text_model_encoder_layers_0_self_attn_q_proj`: the spelling that SDXL's trainers write and every loader reads.
The block numbers follow from SDXL's two resnets a block (three on the way up), see sgm's openaimodel.UNetModel.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# how a file may begin a layer's name -> how its layer key begins
PREFIXES = {
    "lora_unet_": "lora_unet_",
    "lora_te1_": "lora_te1_",
    "lora_te2_": "lora_te2_",
    "base_model.model.unet.": "lora_unet_",
    "base_model.model.text_encoder.": "lora_te1_",
    "base_model.model.text_encoder_2.": "lora_te2_",
    "base_model.model.": "lora_unet_",
    "unet.": "lora_unet_",
    "diffusion_model.": "lora_unet_",
    "text_encoder.": "lora_te1_",
    "text_encoder_2.": "lora_te2_",
    "down_blocks.": "lora_unet_down_blocks_",
    "mid_block.": "lora_unet_mid_block_",
    "up_blocks.": "lora_unet_up_blocks_",
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


# a UNet layer in diffusers' spelling, dots written as underscores -> in sgm's
DIFFUSERS_TO_SGM: list[tuple[str, Callable[[re.Match], str]]] = [
    (r"conv_in", lambda m: "input_blocks_0_0"),
    (r"conv_out", lambda m: "out_2"),
    (r"conv_norm_out", lambda m: "out_0"),
    (r"time_embedding_linear_([12])", lambda m: f"time_embed_{2 * int(m[1]) - 2}"),
    (r"add_embedding_linear_([12])", lambda m: f"label_emb_0_{2 * int(m[1]) - 2}"),
    (r"down_blocks_(\d+)_(attentions)_(\d+)_(.+)", _down),
    (rf"down_blocks_(\d+)_(resnets)_(\d+)_({'|'.join(_RESNET)})", _down),
    (r"down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op"),
    (r"mid_block_(attentions)_(\d+)_(.+)", _middle),
    (rf"mid_block_(resnets)_(\d+)_({'|'.join(_RESNET)})", _middle),
    (r"up_blocks_(\d+)_(attentions)_(\d+)_(.+)", _up),
    (rf"up_blocks_(\d+)_(resnets)_(\d+)_({'|'.join(_RESNET)})", _up),
    (r"up_blocks_(\d+)_upsamplers_0_conv", lambda m: f"output_blocks_{2 + 3 * int(m[1])}_2_conv"),
]
_RULES = [(re.compile(pattern), rename) for pattern, rename in DIFFUSERS_TO_SGM]


def layer_key(name: str) -> str | None:
    """The layer key of a layer's name in any known spelling, or None for a name of no known kind."""
    prefix = next((p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith(p)), None)
    if prefix is None:
        return None
    head, rest = PREFIXES[prefix], name[len(prefix) :].replace(".", "_")
    if head.startswith("lora_te"):
        # newer transformers leave out the wrapper that every other tool names
        return head + (rest if rest.startswith(("text_model_", "text_projection")) else f"text_model_{rest}")
    part, rest = "lora_unet_", head[len("lora_unet_") :] + rest
    for pattern, rename in _RULES:
        if match := pattern.fullmatch(rest):
            return part + rename(match)
    return part + rest


def is_unet(key: str) -> bool:
    return key.startswith("lora_unet_")
