"""A LoRA file, read: file -> Lora. What is not read is refused by name, never skipped.

Spellings: kohya-ss, LyCORIS, PEFT, diffusers (new and older ones), OneTrainer and ComfyUI; the kinds are in kinds.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, deserialize, safe_open
from torch import Tensor

from ziplora_lib.errors import BadInput, out_of_memory
from ziplora_lib.lora import kinds
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.kinds import DenseLayer
from ziplora_lib.lora.vectors import Vectors

# how a tensor's name ends -> which part of its layer it is, in LyCORIS' and the WebUI's words
PARTS = {f".{part}": part for own in kinds.KINDS.values() for part in own} | {
    f".{part}": part for part in kinds.MODIFIERS
}
PARTS |= {
    ".lora_B.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora_A.default.weight": "lora_down.weight",
    ".lora_B.default.bias": "lora_B.bias",
    ".lora.up.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
    "_lora.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    # what a merge keeps of its parents, beside what others read
    ".ziplora_up": "ziplora_up",
    ".ziplora_down": "ziplora_down",
    ".ziplora_weight": "ziplora_weight",
    ".ziplora_bias": "ziplora_bias",
}
# too short to tell a LoRA's tensor from any other
_ONLY_WITH = {".weight": ".on_input"}

# what a name holds -> the kind that it belongs to, which is not read
UNREAD_KINDS = {
    ".oft_R.": "PEFT's OFT",
    ".ia3_l": "PEFT's (IA)³",
    ".vera_lambda": "VeRA",
    ".boft_": "PEFT's BOFT",
    ".lambda_layer": "T-LoRA",
    ".q_layer.": "T-LoRA",
    ".p_layer.": "T-LoRA",
    ".bias_indices": "LyCORIS' old sparse biases",
    ".bias_values": "LyCORIS' old sparse biases",
    ".bias_size": "LyCORIS' old sparse biases",
    ".reshape_weight": "a LoRA that reshapes the layer",
    ".set_weight": "weights to be set rather than added",
    ".lokr_t1": "LoKr with two Tucker cores",
}
_BUNDLED = "bundle_emb."
_DAMAGED = "The file is damaged or unfinished: download or save it again"

# the largest value, of a part or of what parts make together, that a LoRA may have: a picture takes a fraction of one
LARGEST_VALUE = 1e15
# how many values a layer's factors may have for each byte of the file: the most that a LoKr has is a few hundred; and how
# many they may have anyway
_VALUES_A_BYTE, _ANYWAY = 2048, 2**24
# bytes of the largest JSON file beside a LoRA that is looked at
_LARGEST_BESIDE = 2**24

BASES = {"sdxl": "SDXL", "sd1": "SD 1.5", "sd2": "SD 2.x", "unknown": "unknown"}


@dataclass(frozen=True)
class Lora:
    """A LoRA as read, by layer key, what its metadata says, and where it came from.

    deltas: ΔW of the layers that are low rank by nature; dense: those that the host has to work out; vectors: what it adds
    to norms and biases, in one row (a merge: one a parent); embeddings: bundled textual inversions, by name; kinds: how many
    layers of each.
    """

    name: str
    path: Path
    deltas: dict[str, LowRankDelta]
    metadata: dict[str, str] = field(default_factory=dict)
    sidecar: dict = field(default_factory=dict)
    dtype: str = "F32"
    hash: str = ""
    base: str = "unknown"
    dense: dict[str, DenseLayer] = field(default_factory=dict)
    vectors: dict[str, Vectors] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The keys of all layers whose weight is changed."""
        return sorted([*self.deltas, *self.dense])

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, smallest first."""
        return sorted({d.rank for d in self.deltas.values()})

    def norm(self) -> float:
        """‖ΔW‖_F over all layers that are known already; NaN in a glance."""
        if any(d.down.is_meta for d in self.deltas.values()):
            return math.nan
        return sum(d.norm() ** 2 for d in self.deltas.values()) ** 0.5


def read(path: Path) -> Lora:
    """Reads a LoRA file whole, in the dtype it was saved in.

    Raises BadInput for anything that is not a readable LoRA: no such file, damaged, of a kind that is not read, an
    incomplete layer, values that are not finite.
    """
    path = Path(path)
    return _understood(path, *_tensors(path))


def glance(path: Path, whole: bool = True) -> Lora:
    """A LoRA by its header alone: what `read` says of layers, kinds, ranks and base, but no values.

    Its tensors are on the device "meta", but settings of one number, such as alpha, are 1: a value each, scattered over a
    file, costs more than all headers. Its `hash` is its path. whole: all layers, else a dozen, for a list of many files.
    Raises BadInput as `read` does, as far as shapes tell.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            names = sorted(file.keys())
            chosen = names if whole else _dozen(names)
            tensors = {name: _outline(file, name) for name in chosen}
            metadata = dict(file.metadata() or {})
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error
    return _understood(path, tensors, metadata, str(path.resolve()))


def _dozen(names: Sequence[str]) -> list[str]:
    """The tensors of a few layers that tell most: what cross-attention reads, text encoders, and some in between."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layers[_split(name)[0]].append(name)
    every = list(layers)
    told = [next((layer for layer in every if mark in layer), "") for mark in ("attn2_to_k", "attn2.to_k", "te", "te2")]
    kept = dict.fromkeys([*filter(None, told), *every[:: max(1, len(every) // 8)]])
    return [name for layer in kept for name in layers[layer]]


_SETTINGS = (".alpha", ".scale", ".on_input")
_OUTLINED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _outline(file, name: str) -> Tensor:
    """A tensor's shape and dtype without its values; a setting of one number as 1. A rare dtype is read."""
    outline = file.get_slice(name)
    shape, dtype = outline.get_shape(), _OUTLINED.get(outline.get_dtype())
    if name.endswith(_SETTINGS) and math.prod(shape) == 1:
        return file.get_tensor(name) if dtype is None else torch.ones(shape, dtype=dtype)
    return file.get_tensor(name).to("meta") if dtype is None else torch.empty(shape, dtype=dtype, device="meta")


def finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; of a tensor without values, true."""
    if tensor.is_meta or not tensor.numel():
        return True
    return math.isfinite(_largest(tensor))


def _largest(tensor: Tensor) -> float:
    """The largest magnitude of a tensor's values, NaN or infinity if one of them is; 0 of a tensor without values."""
    if tensor.is_meta or not tensor.numel():
        return 0.0
    # the least and the largest tell, NaN among them, faster than an answer for each
    least, most = torch.stack(tensor.float().aminmax()).tolist()
    return math.nan if math.isnan(least) else max(-least, most)


def _understood(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], own_hash: str) -> Lora:
    embeddings = _embeddings(path, tensors)
    grouped = _grouped(path, tensors)
    base = _base(grouped, metadata)
    scales = _adapter_scales(path, metadata)
    layers: dict[str, _Layer] = {}
    for layer in grouped.values():
        key = layer_key(layer.name, "sdxl" if base == "unknown" else base)
        if key is None:
            raise BadInput(
                "names a layer of a model that is not Stable Diffusion",
                file=path.name,
                key=layer.first,
                remedy="Pick a LoRA that was trained on the model that is loaded",
            )
        if key in layers:
            raise layer.bad(
                f"layer '{key}' stands twice in the file", "Save the LoRA again with the tool that made it", path
            )
        layers[key] = layer
    deltas, dense, vectors, found = {}, {}, {}, Counter()
    room = max(_ANYWAY, _VALUES_A_BYTE * path.stat().st_size)
    for key, layer in sorted(layers.items()):
        try:
            kind, delta, vector = _read_layer(path, layer, scales)
            _check_values(path, layer, delta)
        except BadInput:
            raise
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            if out_of_memory(error):
                raise
            shapes = ", ".join(f"{part} {list(t.shape)}" for part, t in layer.parts.items())
            reason = f": {error}" if type(error) is ValueError else ""
            raise layer.bad(
                f"its parts do not fit each other ({shapes}){reason}",
                _DAMAGED,
                path,
            ) from error
        found[kind] += 1
        if isinstance(delta, LowRankDelta):
            deltas[key] = delta
            room -= delta.up.numel() + delta.down.numel()
            if room < 0:
                raise layer.bad("its layers ask for far more memory than a file of this size can mean", _DAMAGED, path)
        elif delta is not None:
            dense[key] = delta
        if vector is not None:
            vectors[key] = vector
    if not deltas and not dense and not vectors:
        raise BadInput("holds no LoRA layer", file=path.name, remedy="Pick a LoRA file")
    dtypes = [str(t.dtype).removeprefix("torch.") for layer in layers.values() for t in layer.main()]
    return Lora(
        name=path.stem,
        path=path,
        deltas=deltas,
        metadata=metadata,
        sidecar=_sidecar(path),
        dtype=max(sorted(set(dtypes)), key=dtypes.count),
        hash=own_hash,
        base=base,
        dense=dense,
        vectors=vectors,
        embeddings=embeddings,
        kinds=dict(found.most_common()),
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
    if not _is_file(path):
        problem = "is a folder, a pipe or a link, not a file" if os.path.lexists(path) else "there is no such file"
        raise BadInput(problem, file=str(path), remedy="Check the name, or refresh the list")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(
            f"is not a readable safetensors file ({error})",
            file=path.name,
            remedy="The file is damaged or of another format: download or save it again",
        ) from error


def _is_file(path: Path) -> bool:
    """Whether there is an ordinary file, which a pipe, where reading never ends, is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


# what a header's lies raise in safetensors and torch
_UNREADABLE = (SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


def _unreadable(path: Path, error: Exception) -> BadInput:
    return BadInput(
        f"its tensors cannot be read ({error})",
        file=path.name,
        remedy="The file is damaged: download or save it again",
    )


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """All tensors, the metadata and the hash, of one and the same reading.

    In memory whole: where a file is only mapped there, its values change when it is overwritten, and the process ends when it
    is cut short.
    """
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
    try:
        data = path.read_bytes()
        tensors = {name: _tensor(view) for name, view in deserialize(data)}
    except (*_UNREADABLE, OSError) as error:
        if out_of_memory(error):
            raise
        raise _unreadable(path, error) from error
    begin = 8 + int.from_bytes(data[:8], "little")
    return tensors, metadata, hashlib.sha256(memoryview(data)[begin:]).hexdigest()


# newer versions of PyTorch have more of them
_FORMATS = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
        "BOOL": "bool", "C64": "complex64",
    }.items()
    if hasattr(torch, dtype)
}  # fmt: skip


def _tensor(view: Mapping) -> Tensor:
    """A tensor of what safetensors gives: dtype, shape, data. By its own `load` older versions fail at one without values."""
    if (dtype := _FORMATS.get(view["dtype"])) is None:
        raise ValueError(f"{view['dtype']} is no number format that is known here")
    if not len(view["data"]):
        return torch.empty(view["shape"], dtype=dtype)
    return torch.frombuffer(view["data"], dtype=dtype).reshape(view["shape"])


@dataclass
class _Layer:
    """A layer as the file spells it: its name, its parts, the full name of each part's tensor, and its largest value."""

    name: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> str:
        return next(iter(self.names.values()))

    def main(self) -> list[Tensor]:
        """The tensors that are not mere settings."""
        return [t for part, t in self.parts.items() if part not in ("alpha", "scale", "on_input")]

    def bad(self, problem: str, remedy: str, path: Path, part: str = "") -> BadInput:
        return BadInput(problem, file=path.name, key=self.names.get(part, self.first), remedy=remedy)


def _grouped(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, _Layer]:
    """The tensors by the layer that they belong to, as the file names it."""
    layers: dict[str, _Layer] = {}
    for name, tensor in tensors.items():
        layer, part = _parse(path, name, tensors)
        entry = layers.setdefault(layer, _Layer(layer))
        if part in entry.parts:
            raise BadInput(
                f"part '{part}' of the layer stands twice in the file",
                file=path.name,
                key=name,
                remedy="Save the LoRA again with the tool that made it",
            )
        entry.parts[part] = tensor
        entry.names[part] = name
    return layers


def _parse(path: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """A tensor's name -> (the layer's name, part)."""
    layer, ending = _split(name)
    if ending in PARTS and ending not in _ONLY_WITH:
        return layer, PARTS[ending]
    # the longest ending counts: .lora_B.bias is no .bias
    for suffix in sorted((s for s in PARTS if name.endswith(s)), key=len, reverse=True):
        if suffix in _ONLY_WITH and name.removesuffix(suffix) + _ONLY_WITH[suffix] not in tensors:
            continue
        return name[: -len(suffix)], PARTS[suffix]
    if kind := next((kind for mark, kind in UNREAD_KINDS.items() if mark in name), None):
        raise BadInput(f"{kind}, not supported", file=path.name, key=name, remedy="Pick a LoRA of another kind")
    raise BadInput(
        "is no part of a LoRA that is known here",
        file=path.name,
        key=name,
        remedy="Pick a LoRA file, not a checkpoint, embedding or VAE",
    )


def _split(name: str) -> tuple[str, str]:
    """A tensor's name at its first dot, where nearly all files have the layer's name before it."""
    layer, dot, ending = name.partition(".")
    return layer, dot + ending


def _read_layer(
    path: Path, layer: _Layer, adapter_scale: Callable[[str, int | None], float | None]
) -> tuple[str, LowRankDelta | DenseLayer | None, Vectors | None]:
    """A layer's kind, what it does to the weight, and to the norm or bias."""
    parts = dict(layer.parts)
    for part, tensor in parts.items():
        if tensor.is_complex() or (not tensor.is_floating_point() and part not in ("alpha", "on_input")):
            raise layer.bad(f"holds {tensor.dtype}, not floating point numbers", _DAMAGED, path, part)
        layer.largest[part] = _largest(tensor)
        if not math.isfinite(layer.largest[part]):
            raise layer.bad(
                "has values that are not finite (NaN or infinity)",
                "The training of this LoRA failed: use another file or an earlier epoch",
                path,
                part,
            )
        if tensor.numel() == 0:
            raise layer.bad("has no values (rank or width 0)", _DAMAGED, path, part)
        if part in ("alpha", "scale", "on_input") and tensor.numel() != 1:
            raise layer.bad(f"{part} must be one number, but has shape {list(tensor.shape)}", _DAMAGED, path, part)
    if "ziplora_up" in parts or "ziplora_bias" in parts or "ziplora_weight" in parts:
        return _own_layer(path, layer)
    if "lora_magnitude_vector" in parts:  # PEFT's name; one norm an output
        parts["dora_scale"] = parts.pop("lora_magnitude_vector").reshape(-1, 1)
    if "diff" in parts and parts["diff"].ndim == 1:  # ComfyUI's names for a norm's
        names = {"diff": "w_norm", "diff_b": "b_norm"}
        parts = {names.get(part, part): tensor for part, tensor in parts.items()}
    kind = kinds.kind_of(parts)
    if kind is None:
        raise layer.bad(f"has {', '.join(parts)}, but nothing of a LoRA", _DAMAGED, path)
    if lacking := kinds.missing(kind, parts):
        raise layer.bad(
            f"the layer has no {lacking.removesuffix('.weight').removeprefix('lora_')} part", _DAMAGED, path
        )
    if kind.removeprefix("DoRA of ") == "LoRA":
        _check_lora(path, layer)
    if "scale" not in parts and "alpha" not in parts and (scale := _outside_scale(layer, adapter_scale)) is not None:
        parts["scale"] = torch.tensor(scale)
    delta = None if kind in ("norm", "bias") else kinds.read_layer(kind, parts)
    bias = parts.get("diff_b", parts.get("b_norm"))
    if bias is None and "lora_B.bias" in parts:
        factors = kinds.base_factors(kind.removeprefix("DoRA of "), parts)
        bias = parts["lora_B.bias"].float() * (1.0 if factors is None else factors.scale)
    weight = parts.get("w_norm")
    row = [None if t is None else t.reshape(1, -1) for t in (weight, bias)]
    return _kind_name(kind, parts), delta, _vectors(path, layer, *row)


def _own_layer(path: Path, layer: _Layer) -> tuple[str, LowRankDelta | None, Vectors | None]:
    """A layer of a merge whose parents' parts are kept beside what others read."""
    parts, delta = layer.parts, None
    if "ziplora_up" in parts:
        up, down = parts["ziplora_up"], parts.get("ziplora_down")
        if down is None or up.ndim != 2 or down.ndim not in (2, 4) or up.shape[1] != down.shape[0]:
            raise layer.bad("its factors do not fit", "Another tool changed the file: merge again", path, "ziplora_up")
        delta = LowRankDelta(up, down)
    weight, bias = parts.get("ziplora_weight"), parts.get("ziplora_bias")
    if any(t is not None and t.ndim != 2 for t in (weight, bias)):
        raise layer.bad("has no row for each parent", "Another tool changed the file: merge again", path)
    return "merged", delta, _vectors(path, layer, weight, bias)


def _vectors(path: Path, layer: _Layer, weight: Tensor | None, bias: Tensor | None) -> Vectors | None:
    """What a layer adds to its vectors, a row each; None where that is nothing."""
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise layer.bad(f"its weight {list(weight.shape)} and bias {list(bias.shape)} do not fit", _DAMAGED, path)
    return None if weight is None and bias is None else Vectors(weight, bias)


_FACTORS = {"ziplora_up", "ziplora_down", *(part for kind in ("LoRA", "LoHa", "LoKr") for part in kinds.KINDS[kind])}


def _check_values(path: Path, layer: _Layer, delta: LowRankDelta | DenseLayer | None) -> None:
    """Refuses values that no model can hold, alone or in ΔW: their norms and overlaps would not be numbers."""
    loudest = max(layer.largest, key=lambda part: layer.largest[part])
    reach = layer.largest[loudest]
    if isinstance(delta, LowRankDelta):
        own = [value for part, value in layer.largest.items() if part in _FACTORS]
        reach = max(reach, max(*own, math.prod(own) * delta.rank) * max(1.0, abs(delta.scale)))
    if not reach <= LARGEST_VALUE:
        raise layer.bad(
            f"has values up to {reach:.0e}, beyond what any model can hold",
            "The training of this LoRA failed: use another file or an earlier epoch",
            path,
            loudest,
        )


def _kind_name(kind: str, parts: Mapping[str, Tensor]) -> str:
    """A layer's kind in the words that users know."""
    kernel = any(t.ndim == 4 and t.shape[2:].numel() > 1 for part, t in parts.items() if part != "dora_scale")
    return kind.replace("LoRA", "LoCon") if kernel and kind in ("LoRA", "DoRA of LoRA") else kind


def _check_lora(path: Path, layer: _Layer) -> None:
    """Refuses up and down factors that are none, with both shapes."""
    up, down = layer.parts["lora_up.weight"], layer.parts["lora_down.weight"]
    if up.ndim not in (2, 4) or down.ndim not in (2, 4) or up.shape[2:].numel() != 1:
        raise layer.bad(
            f"factors of shape {list(up.shape)} and {list(down.shape)} are not those of a LoRA",
            _DAMAGED,
            path,
            "lora_down.weight",
        )
    if "lora_mid.weight" not in layer.parts and up.shape[1] != down.shape[0]:
        raise layer.bad(
            f"its factors do not fit: up has rank {up.shape[1]}, down has rank {down.shape[0]}",
            _DAMAGED,
            path,
            "lora_down.weight",
        )


def _outside_scale(layer: _Layer, adapter_scale) -> float | None:
    """The scale that PEFT's settings give, for a layer that has no alpha."""
    ranked = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    if part := next((p for p in ranked if p in layer.parts), None):
        return adapter_scale(layer.names[part], layer.parts[part].shape[0])
    # LoKr of two whole factors: PEFT divides by the rank that was asked for, LyCORIS by none
    return adapter_scale(layer.names["lokr_w2"], None) if "lokr_w2" in layer.parts else None


def _adapter_scales(path: Path, metadata: dict[str, str]) -> Callable[[str, int | None], float | None]:
    """What PEFT keeps beside the weights: (name, rank, None for the one in its settings) -> scale or None.

    Newer diffusers store PEFT's settings in one JSON field of the metadata, PEFT itself in a file of its own.
    """
    settings = _json(metadata.get("lora_adapter_metadata", ""))
    if path.name == "adapter_model.safetensors" and os.path.lexists(file := path.with_name("adapter_config.json")):
        if (own := _beside(file)) is None:
            raise BadInput(
                "PEFT's settings beside it, adapter_config.json, cannot be read",
                file=path.name,
                remedy="Save the LoRA again with PEFT, or copy that file anew",
            )
        settings |= {f"base_model.model.{field}": value for field, value in own.items()}

    def scale(name: str, rank: int | None) -> float | None:
        parts = ("unet.", "text_encoder.", "text_encoder_2.", "base_model.model.")
        part = next((p for p in parts if name.startswith(p)), "")
        layer = re.split(r"\.(?:lora|hada|lokr)_", name[len(part) :])[0]

        def setting(kind: str, *usual: str) -> float | None:
            # as in peft: a pattern is a regular expression on the end of the layer's name, and the first that fits counts
            patterns = settings.get(f"{part}{kind}_pattern")
            patterns = patterns if isinstance(patterns, dict) else {}
            own = (value for pattern, value in patterns.items() if _matches(pattern, layer))
            value = next(own, next((settings[part + name] for name in usual if part + name in settings), None))
            return None if value is None else float(value)

        try:
            found = setting("alpha", "lora_alpha", "alpha")
            if rank is None and found is not None:
                rank = setting("rank", "r")
        except (ValueError, TypeError, OverflowError, re.error):
            found = float("nan")
        if found is None:
            return None
        if not (math.isfinite(found) and rank and 0 < rank < math.inf):
            raise BadInput(
                "PEFT's settings give it no usable alpha",
                file=path.name,
                key=name,
                remedy="Save the LoRA again with PEFT",
            )
        return found / (rank**0.5 if settings.get(f"{part}use_rslora") else rank)

    return scale


# in a pattern of PEFT's: names, alternatives, anchors; a few times "anything", but nothing that can be repeated within a
# repetition, which a stranger's file could stop the whole program with
_PLAIN_PATTERN = re.compile(r"[\w.\\^$|()-]*(\.\*[\w.\\^$|()-]*){0,3}")


def _matches(pattern: str, layer: str) -> bool:
    if not _PLAIN_PATTERN.fullmatch(pattern):
        raise ValueError(f"a pattern that is not plain: {pattern}")
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def _embeddings(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Takes the bundled embeddings out of a file's tensors: by name, and by part of the model."""
    embeddings: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in [name for name in tensors if name.startswith(_BUNDLED)]:
        own, _, part = name.removeprefix(_BUNDLED).partition(".")
        tensor = tensors.pop(name)
        usable = own and part and tensor.is_floating_point() and tensor.ndim in (1, 2) and tensor.numel()
        if not usable or not finite(tensor):
            raise BadInput(
                f"is no usable embedding ({tensor.dtype}, shape {list(tensor.shape)})",
                file=path.name,
                key=name,
                remedy="The file is damaged: download or save it again, or use a copy without it",
            )
        embeddings[own][part] = tensor
    return dict(embeddings)


def _json(text: str) -> dict:
    """A JSON object, or {} for text that is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _sidecar(path: Path) -> dict:
    """The WebUI's own notes beside a LoRA (NAME.json); {} where there are none or they cannot be read."""
    return _beside(path.with_suffix(".json")) or {}


def _beside(file: Path) -> dict | None:
    """The JSON object in a file beside a LoRA, {} where it holds another thing; None where it cannot be read."""
    try:
        if not _is_file(file) or file.stat().st_size > _LARGEST_BESIDE:
            return None
        return _json(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


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
)
# an encoder without a number is the only one; and the widths of SD 1.x's and SD 2.x's
_ONE_ENCODER = ("lora_te_", "oft_te_", "lycoris_text_model_")
_ENCODER_WIDTH = {768: "sd1", 1024: "sd2"}
# how ss_base_model_version begins
VERSIONS = {"sdxl": "sdxl", "sd1": "sd_v1", "sd2": "sd_v2"}


def _base(layers: Mapping[str, _Layer], metadata: dict[str, str]) -> str:
    """Which base model the LoRA was trained on, from its layers first and its metadata where they do not say."""
    keys = {layer_key(name): layer for name, layer in layers.items()}
    widths = {_columns(layer) for key, layer in keys.items() if key and key.endswith(("attn2_to_k", "attn2_to_v"))}
    by_width = {_CONTEXT_WIDTH[w] for w in widths if w in _CONTEXT_WIDTH}
    if len(by_width) == 1:
        return by_width.pop()
    single = [layer for name, layer in layers.items() if name.startswith(_ONE_ENCODER)]
    if single or any(key.startswith(_NOT_SDXL) for key in keys if key):
        encoder = {_ENCODER_WIDTH.get(_columns(layer)) for layer in single} - {None}
        if len(encoder) == 1:
            return encoder.pop()
        return "sd2" if metadata.get("ss_v2") == "True" else "sd1"
    if any(key.startswith("lora_te2_") for key in keys if key):
        return "sdxl"
    version = metadata.get("ss_base_model_version", "")
    return next((base for base, start in VERSIONS.items() if version.startswith(start)), "unknown")


def _columns(layer: _Layer) -> int | None:
    """How many columns the layer has, as far as its parts tell."""
    if "ziplora_down" in layer.parts:
        return layer.parts["ziplora_down"].shape[1:].numel()
    kind = kinds.kind_of(layer.parts)
    if kind is None or kinds.missing(kind, layer.parts):
        return None
    try:
        found = kinds.extent(kind, layer.parts)
    except (IndexError, KeyError, RuntimeError, ValueError):  # refused when the layer is read
        return None
    return None if found is None else found[1]
