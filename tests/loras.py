"""LoRA files with random factors, written here by hand in kohya's format; torch and safetensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_KOHYA_PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def kohya_name(part: str, dotted: str) -> str:
    """kohya's spelling of a layer that diffusers and transformers call `dotted`."""
    if part != "unet" and not dotted.startswith("text_"):
        dotted = f"text_model.{dotted}"  # newer transformers have lost this wrapper
    return _KOHYA_PARTS[part] + dotted.replace(".", "_")


def factors(shape: tuple[int, ...], rank: int, generator: torch.Generator, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """Random up (out, rank) and down (rank, in…) whose product sends unit input to output of about `size`."""
    fan_in = torch.Size(shape[1:]).numel()
    up = torch.randn(shape[0], rank, generator=generator) * size / rank**0.5
    return up, torch.randn(rank, *shape[1:], generator=generator) / fan_in**0.5


def lora_tensors(
    shapes: Mapping[str, tuple[int, ...]], rank: int = 4, alpha: float | None = None, seed: int = 0, size: float = 0.3
) -> dict[str, Tensor]:
    """Factors for every layer; ‖ΔW‖ does not depend on rank and alpha."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        up, down = factors(shape, rank, generator, size / ((alpha if alpha is not None else rank) / rank))
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (len(shape) - 2))
        tensors[f"{name}.lora_down.weight"] = down
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def write_lora(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata=None, **options) -> Path:
    save_file(lora_tensors(shapes, **options), path, metadata=metadata)
    return path


def dense_deltas(path: Path) -> dict[str, Tensor]:
    """ΔW of a kohya file in float64, (out, in…) by the file's own layer names: read with safetensors, not with the reader."""
    tensors, deltas = load_file(path), {}
    for name in tensors:
        if not name.endswith(".lora_down.weight"):
            continue
        layer = name.removesuffix(".lora_down.weight")
        up, down = tensors[f"{layer}.lora_up.weight"].double().flatten(1), tensors[name].double()
        alpha = tensors.get(f"{layer}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        deltas[layer] = scale * (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return deltas
