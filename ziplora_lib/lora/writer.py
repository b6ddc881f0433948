"""Stacked factors -> an ordinary LoRA file: kohya's layer keys, atomic, checked before it gets its name."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.stack import Stack

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# names that Windows keeps for devices, and that the WebUI's Lora extension does not accept in a prompt
RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10)),
    "none",
    "addams",
}
_MARK = ".ziplora-part"


def check_name(name: str) -> str:
    """The name of a new LoRA, if it can be a file and a prompt tag on every system. Raises BadInput if not."""
    remedy = "Choose a plain name such as dog-watercolour"
    if not name or not name.strip():
        raise BadInput("the output has no name", remedy=remedy)
    if name != name.strip() or name.endswith("."):
        raise BadInput(f"output name {name!r} begins or ends with a space, or ends with a dot", remedy=remedy)
    if found := re.search(r'[/\\:*?"<>|,\x00-\x1f\x7f\ud800-\udfff]', name):
        raise BadInput(
            f"output name {name!r} has the character {found[0]!r}, which a file name or a prompt tag cannot have",
            remedy=remedy,
        )
    if ".." in name or name.startswith("."):
        raise BadInput(f"output name {name!r} has '..' or begins with a dot", remedy=remedy)
    if name.split(".")[0].lower() in RESERVED:
        raise BadInput(f"output name {name!r} is reserved by the system or the WebUI", remedy=remedy)
    if len(name.encode()) > 200:
        raise BadInput("the output name is longer than 200 bytes", remedy=remedy)
    return name


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses (BadInput) a destination whose folder is missing or read-only, or whose name is taken."""
    folder = path.parent
    if not folder.is_dir():
        raise BadInput(f"the folder {folder} does not exist", remedy="Create it, or choose another")
    probe = folder / f".{os.getpid()}.probe{_MARK}"
    try:  # os.access is not enough: it knows neither special file systems nor quotas
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(
            f"the folder {folder} cannot be written to ({error.strerror})",
            remedy="Change its permissions, or choose another",
        ) from error
    wanted = {(path.stem + ending).lower() for ending in (".safetensors", ".json", ".png", ".balance.png")}
    taken = sorted(f.name for f in folder.iterdir() if f.name.lower() in wanted)
    if taken and not overwrite:
        raise BadInput(f"{', '.join(taken)} is already there", remedy="Choose another output name, or ask to overwrite")


def write(path: Path, stacks: Mapping[str, Stack], dtype: str, metadata: Mapping[str, str], overwrite: bool) -> dict:
    """Writes one LoRA file and returns {"sha256", "bytes", "largest_error"}.

    The file is written beside its destination, synced, read back and compared, and only then renamed: at every moment
    there is the old file, whole, or the new one, whole. largest_error: max |saved - wanted| over all factor values,
    divided by the largest value of that factor. Raises BadInput if the values do not fit the dtype or the name is taken.
    """
    check_free(path, overwrite)
    tensors = kohya_tensors(stacks, DTYPES[dtype], dtype)
    body_hash = _body_sha256(save(tensors))
    metadata = {**metadata, "sshs_model_hash": body_hash, "modelspec.hash_sha256": f"0x{body_hash}"}
    part = path.with_name(f".{path.stem}.{os.getpid()}{_MARK}")
    try:
        data = _ordered(save(tensors, metadata={name: _text(value) for name, value in metadata.items()}))
        _write_synced(part, data)
        _compare(part, tensors, body_hash)
        _rename(part, path, overwrite)
    finally:
        part.unlink(missing_ok=True)
    return {"sha256": body_hash, "bytes": len(data), "largest_error": _largest_error(stacks, tensors)}


def write_beside(path: Path, ending: str, data: bytes) -> None:
    """Writes NAME.json or NAME.png beside a LoRA, whole or not at all."""
    part = path.with_name(f".{path.stem}{ending}.{os.getpid()}{_MARK}")
    try:
        _write_synced(part, data)
        os.replace(part, path.with_suffix(ending))
    finally:
        part.unlink(missing_ok=True)


def card(activation_text: str, notes: str, weight: float = 1.0) -> bytes:
    """NAME.json, the WebUI's card of a LoRA."""
    fields = {
        "description": "",
        "sd version": "SDXL",
        "activation text": activation_text,
        "preferred weight": weight,
        "notes": notes,
    }
    return (_text(json.dumps(fields, ensure_ascii=False, indent=4)) + "\n").encode()


def _text(value: str) -> str:
    """Half characters, which JSON can hold and no file can, as question marks."""
    return value.encode("utf-8", "replace").decode("utf-8")


def kohya_tensors(stacks: Mapping[str, Stack], dtype: torch.dtype, dtype_name: str = "") -> dict[str, Tensor]:
    """`LAYER.lora_up.weight`, `.lora_down.weight` and `.alpha` of every layer.

    One alpha for all layers, the largest rank: diffusers' loader does not find its way through different ones.
    """
    tensors = {}
    alpha = float(max(stack.up.shape[1] for stack in stacks.values()))
    for key, stack in sorted(stacks.items()):
        # a reader multiplies by alpha / rank
        up = (stack.up * (stack.up.shape[1] / alpha)).reshape(*stack.up.shape, *[1] * (stack.down.ndim - 2))
        for part, value in (("lora_up", up), ("lora_down", stack.down)):
            cast = value.detach().cpu().to(dtype).contiguous()
            if not torch.isfinite(cast).all():
                raise BadInput(
                    f"values of the merged LoRA do not fit {dtype_name or dtype}",
                    key=f"{key}.{part}.weight",
                    remedy="Save it as bf16 or fp32",
                )
            tensors[f"{key}.{part}.weight"] = cast
        # fp32 whatever the rest is: bf16 cannot hold every rank above 256
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def _ordered(data: bytes) -> bytes:
    """The same file with its header in a fixed order: safetensors writes the metadata in another one each time."""
    body = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:body]), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    return len(header).to_bytes(8, "little") + header + data[body:]


def _body_sha256(data: bytes) -> str:
    return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def _write_synced(part: Path, data: bytes) -> None:
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _compare(part: Path, tensors: Mapping[str, Tensor], body_hash: str) -> None:
    """Reads the file back and compares it with what was meant, to the bit. Raises OSError if it differs."""
    back = load_file(str(part))
    same = back.keys() == tensors.keys() and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    if not same or _body_sha256(part.read_bytes()) != body_hash:
        raise OSError(f"{part}: what was read back is not what was written; the disk may be failing")


def _rename(part: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(part, path)
    else:
        try:
            os.link(part, path)  # unlike a rename, refuses a name that was taken in the meantime
        except FileExistsError as error:
            raise BadInput(
                f"{path.name} was created by something else during the merge", remedy="Choose another output name"
            ) from error
        except OSError:  # a file system without hard links
            check_free(path, overwrite)
            os.replace(part, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError:
            pass  # some network drives cannot; the file is whole and in its place
        finally:
            os.close(folder)


def _largest_error(stacks: Mapping[str, Stack], tensors: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for key, stack in stacks.items():
        scale = float(tensors[f"{key}.alpha"]) / stack.up.shape[1]
        for part, wanted in (("lora_up", stack.up / scale), ("lora_down", stack.down)):
            saved = tensors[f"{key}.{part}.weight"].float().reshape(wanted.shape)
            worst = max(worst, float((saved - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)))
    return worst
