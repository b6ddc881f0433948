"""LoRA files for the miniature with random factors, in kohya's format, written with safetensors alone."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ziplora_lib.lora.keys import layer_key


def write_lora(path: Path, pipe, seed: int, rank: int, alpha: float, only: str = "", strength: float = 0.3, **metadata):
    """Every linear and convolution layer whose key contains `only`; ‖ΔW‖ = strength·‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(pipe, part).named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or name == "text_projection":
                continue
            key, weight = layer_key(f"{part}.{name}"), module.weight
            if only not in key:
                continue
            up = torch.randn(weight.shape[0], rank, generator=generator)
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            size = (strength * weight.norm() / ((up @ down.flatten(1)).norm() * alpha / rank)).sqrt().item()
            up = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
            tensors[f"{key}.lora_up.weight"] = (up * size).half()
            tensors[f"{key}.lora_down.weight"] = (down * size).half()
            tensors[f"{key}.alpha"] = torch.tensor(alpha).half()
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0", "ss_output_name": path.stem, **metadata})
