"""The real SDXL, SD 1.5 and SD 2.1, at full size and without memory: diffusers' and transformers' own classes on `meta`."""

from functools import cache

import pytest
import torch

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}
UNETS = {
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (_PLAIN, _CROSS, _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sd1": {**_SD, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {
        **_SD,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
# part -> (hidden size, layers, whether there is a projection)
ENCODERS = {
    "sdxl": {"text_encoder": (768, 12, False), "text_encoder_2": (1280, 32, True)},
    "sd1": {"text_encoder": (768, 12, False)},
    "sd2": {"text_encoder": (1024, 23, False)},
}


@cache
def layers(base: str) -> dict[tuple[str, str], str]:
    """Every layer with weights of its own: (part, name in the module) -> its class' name."""
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        parts = {"unet": UNet2DConditionModel(**UNETS[base])}
        for part, (width, depth, projected) in ENCODERS[base].items():
            config = CLIPTextConfig(
                hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, projection_dim=1280
            )
            parts[part] = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return {
        (part, name): type(module).__name__
        for part, root in parts.items()
        for name, module in root.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def text_name(name: str) -> str:
    """A text encoder's layer as every file calls it: newer transformers have lost this wrapper."""
    return name if name.startswith("text_") else f"text_model.{name}"
