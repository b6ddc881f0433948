"""LoRA files for the miniature with random factors, in kohya's format, written with safetensors alone."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ziplora_lib.lora.keys import layer_key

# by base: how kohya's tools begin the names of each part's layers, and what they say of the base model
_PARTS = {
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
}
_BASE = {
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0"},
    "sd1": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "sd2": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
}


def _kohya_name(base: str, part: str, dotted: str) -> str:
    if part != "unet" and not dotted.startswith("text_"):
        dotted = f"text_model.{dotted}"  # newer transformers have lost this wrapper
    name = _PARTS[base][part] + dotted.replace(".", "_")
    # kohya's SDXL trainer writes sgm's block numbers, its other trainers diffusers'
    return layer_key(name, base) if base == "sdxl" else name


def write_lora(path: Path, pipe, seed: int, rank: int, alpha: float, only: str = "", strength: float = 0.3, **metadata):
    """Every linear and convolution layer whose key contains `only`; ‖ΔW‖ = strength·‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    other = "sd2" if pipe.unet.config.use_linear_projection else "sd1"
    base = "sdxl" if hasattr(pipe, "text_encoder_2") else other
    for part in _PARTS[base]:
        for name, module in getattr(pipe, part).named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or name == "text_projection":
                continue
            key, weight = _kohya_name(base, part, name), module.weight
            if only not in key:
                continue
            up = torch.randn(weight.shape[0], rank, generator=generator)
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            size = (strength * weight.norm() / ((up @ down.flatten(1)).norm() * alpha / rank)).sqrt().item()
            up = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
            tensors[f"{key}.lora_up.weight"] = (up * size).half()
            tensors[f"{key}.lora_down.weight"] = (down * size).half()
            tensors[f"{key}.alpha"] = torch.tensor(alpha).half()
    save_file(tensors, path, {**_BASE[base], "ss_output_name": path.stem, **metadata})
