"""A LoRA file, read: file -> Lora. Kinds that are not read are refused by name, never skipped.

Spellings: kohya-ss (lora_up/lora_down/alpha), PEFT (lora_A/lora_B) and diffusers' older ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import is_unet, layer_key

# how a tensor's name ends -> which part of its layer it is
PARTS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".alpha": "alpha",
}

# what a name holds -> the kind that it belongs to, which is not read
UNREAD_KINDS = {
    ".hada_w": "LoHa",
    ".hada_t": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".on_input": "IA3",
    ".lora_mid.": "LoCon with a Tucker core (lora_mid)",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".diff_b": "full difference with biases",
    ".diff": "full difference",
    ".w_norm": "norm layers",
    ".b_norm": "norm layers",
    "bundle_emb.": "bundled embeddings",
    ".bias": "LoRA with biases",
    ".scale": "LoRA with its own scale",
    ".reshape_weight": "LoRA that reshapes the layer",
}

BASES = {"sdxl": "SDXL", "sd1": "SD 1.5", "sd2": "SD 2.x", "unknown": "unknown"}


@dataclass(frozen=True)
class Lora:
    """A LoRA as read: ΔW by layer key, what its metadata says, and where it came from."""

    name: str
    path: Path
    deltas: dict[str, LowRankDelta]
    metadata: dict[str, str] = field(default_factory=dict)
    sidecar: dict = field(default_factory=dict)
    dtype: str = "F32"
    hash: str = ""
    base: str = "unknown"

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, smallest first."""
        return sorted({d.rank for d in self.deltas.values()})

    def norm(self) -> float:
        """‖ΔW‖_F over all layers."""
        return sum(d.norm() ** 2 for d in self.deltas.values()) ** 0.5


def read(path: Path) -> Lora:
    """Reads a LoRA file whole, in the dtype it was saved in.

    Raises BadInput for anything that is not a readable LoRA or LoCon: no such file, damaged, of another kind, an
    incomplete layer, values that are not finite.
    """
    path = Path(path)
    tensors, metadata = _tensors(path)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for name, tensor in tensors.items():
        key, part = _parse(path, name)
        if part in layers[key]:
            raise BadInput(
                f"layer '{key}' stands twice in the file",
                file=path.name,
                key=name,
                remedy="Save the LoRA again with the tool that made it",
            )
        layers[key][part] = tensor
        names[key][part] = name
    scales = _adapter_scales(path, metadata)
    deltas = {key: _delta(path, names[key], parts, scales) for key, parts in sorted(layers.items())}
    if not deltas:
        raise BadInput("holds no LoRA layer", file=path.name, remedy="Pick a LoRA file")
    dtypes = [str(parts["down"].dtype).removeprefix("torch.") for parts in layers.values()]
    return Lora(
        name=path.stem,
        path=path,
        deltas=deltas,
        metadata=metadata,
        sidecar=_sidecar(path),
        dtype=max(sorted(set(dtypes)), key=dtypes.count),
        hash=tensor_sha256(path),
        base=_base(deltas, metadata),
    )


def peek(path: Path) -> Lora:
    """A LoRA's metadata and card without its layers, for lists and suggestions. Raises BadInput as `read` does."""
    path = Path(path)
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
    return Lora(path.stem, path, {}, metadata, _sidecar(path))


def tensor_sha256(path: Path) -> str:
    """sha256 of the bytes after the header: the hash that kohya's tools and the WebUI know a LoRA by."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _opened(path: Path):
    if path.suffix.lower() != ".safetensors":
        raise BadInput(
            "is not a .safetensors file",
            file=path.name,
            remedy="Convert it to safetensors first; pickled files (.pt, .ckpt) are never opened",
        )
    if not path.is_file():
        raise BadInput("there is no such file", file=str(path), remedy="Check the name, or refresh the list")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(
            f"is not a readable safetensors file ({error})",
            file=path.name,
            remedy="The file is damaged or of another format: download or save it again",
        ) from error


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"its tensors cannot be read ({error})",
                file=path.name,
                remedy="The file is damaged: download or save it again",
            ) from error


def _parse(path: Path, name: str) -> tuple[str, str]:
    """A tensor's name -> (layer key, part)."""
    suffix = next((s for s in PARTS if name.endswith(s)), None)
    kind = next((k for mark, k in UNREAD_KINDS.items() if mark in name), None)
    if kind and not (suffix and kind == "LoRA with biases"):
        raise BadInput(f"{kind}, not supported yet", file=path.name, key=name, remedy="Pick a LoRA or LoCon file")
    if suffix is None:
        raise BadInput(
            "is no part of a LoRA that is known here",
            file=path.name,
            key=name,
            remedy="Pick a LoRA file, not a checkpoint, embedding or VAE",
        )
    layer = name[: -len(suffix)]
    if suffix.startswith("_lora."):
        layer = layer.replace(".processor.", ".") + (".0" if layer.endswith("to_out") else "")
    if layer.startswith(("lora_te_", "lora_te_text")):
        return layer, PARTS[suffix]
    key = layer_key(layer)
    if key is None:
        raise BadInput(
            "names a layer of a model that is not Stable Diffusion XL",
            file=path.name,
            key=name,
            remedy="Pick a LoRA that was trained on SDXL",
        )
    return key, PARTS[suffix]


def _delta(
    path: Path, names: dict[str, str], parts: dict[str, Tensor], adapter_scale: Callable[[str, int], float | None]
) -> LowRankDelta:
    damaged = "The file is damaged or unfinished: download or save it again"

    def bad(problem: str, remedy: str = damaged, part: str = "down") -> BadInput:
        return BadInput(problem, file=path.name, key=names.get(part, next(iter(names.values()))), remedy=remedy)

    if "up" not in parts or "down" not in parts:
        raise bad(f"the layer has no {'up' if 'up' not in parts else 'down'} part")
    up, down = parts["up"], parts["down"]
    if up.ndim not in (2, 4) or down.ndim not in (2, 4) or up.shape[2:].numel() != 1:
        raise bad(f"factors of shape {list(up.shape)} and {list(down.shape)} are not those of a LoRA")
    up = up.reshape(up.shape[:2])
    if up.shape[1] != down.shape[0]:
        raise bad(f"its factors do not fit: up has rank {up.shape[1]}, down has rank {down.shape[0]}")
    if 0 in up.shape or 0 in down.shape:
        raise bad("has no values (rank or width 0)")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise bad(f"alpha must be one number, but has shape {list(alpha.shape)}")
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and part != "alpha":
            raise bad(f"holds {tensor.dtype}, not floating point numbers", part=part)
        if not torch.isfinite(tensor.float()).all():
            raise bad(
                "has values that are not finite (NaN or infinity)",
                "The training of this LoRA failed: use another file or an earlier epoch",
                part,
            )
    rank = down.shape[0]
    scale = float(alpha) / rank if alpha is not None else adapter_scale(names["down"], rank)
    return LowRankDelta(up, down, 1.0 if scale is None else scale)


def _adapter_scales(path: Path, metadata: dict[str, str]) -> Callable[[str, int], float | None]:
    """What PEFT keeps beside the weights: (name, rank) -> scale or None.

    Newer diffusers store PEFT's settings in one JSON field of the metadata, PEFT itself in a file of its own.
    """
    settings = _json(metadata.get("lora_adapter_metadata", ""))
    if path.name == "adapter_model.safetensors" and (file := path.with_name("adapter_config.json")).is_file():
        own = _json(file.read_text(encoding="utf-8", errors="replace"))
        settings |= {f"base_model.model.{field}": value for field, value in own.items()}

    def scale(name: str, rank: int) -> float | None:
        parts = ("unet.", "text_encoder.", "text_encoder_2.", "base_model.model.")
        part = next((p for p in parts if name.startswith(p)), "")
        layer = name[len(part) :].split(".lora_")[0]
        # as in peft: a pattern is a regular expression on the end of the layer's name, and the first that fits counts
        patterns = settings.get(f"{part}alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        try:
            own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
            alpha = next(own, settings.get(f"{part}lora_alpha"))
            found = None if alpha is None else float(alpha)
        except (ValueError, TypeError, re.error):
            found = float("nan")
        if found is None:
            return None
        if not math.isfinite(found):
            raise BadInput(
                "PEFT's settings give it no usable alpha",
                file=path.name,
                key=name,
                remedy="Save the LoRA again with PEFT",
            )
        return found / (rank**0.5 if settings.get(f"{part}use_rslora") else rank)

    return scale


def _json(text: str) -> dict:
    """A JSON object, or {} for text that is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _sidecar(path: Path) -> dict:
    """The WebUI's own notes beside a LoRA (NAME.json); {} where there are none or they cannot be read."""
    try:
        return _json(path.with_suffix(".json").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


# the width of what cross-attention reads tells the base model
_CONTEXT_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# block names that SDXL's UNet does not have
_NOT_SDXL = (
    "lora_unet_input_blocks_1_1_",
    "lora_unet_input_blocks_2_1_",
    "lora_unet_input_blocks_10_",
    "lora_unet_input_blocks_11_",
    "lora_unet_output_blocks_9_",
    "lora_unet_output_blocks_10_",
    "lora_unet_output_blocks_11_",
    "lora_te_",
)


def _base(deltas: dict[str, LowRankDelta], metadata: dict[str, str]) -> str:
    """Which base model the LoRA was trained on, from its layers first and its metadata where they do not say."""
    widths = {d.shape[1] for key, d in deltas.items() if is_unet(key) and key.endswith(("attn2_to_k", "attn2_to_v"))}
    by_width = {_CONTEXT_WIDTH[w] for w in widths if w in _CONTEXT_WIDTH}
    if len(by_width) == 1:
        return by_width.pop()
    if any(key.startswith(_NOT_SDXL) for key in deltas):
        return "sd2" if metadata.get("ss_v2") == "True" else "sd1"
    if any(key.startswith("lora_te2_") for key in deltas):
        return "sdxl"
    version = metadata.get("ss_base_model_version", "")
    return "sdxl" if version.startswith("sdxl") else "sd1" if version.startswith("sd_v1") else "unknown"
