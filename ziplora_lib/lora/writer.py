"""Stacked factors -> an ordinary LoRA file, in one of three spellings: atomic, checked before it gets its name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ziplora_lib import atomic
from ziplora_lib.errors import BadInput
from ziplora_lib.lora.keys import spelled
from ziplora_lib.lora.reader import finite, tensor_sha256
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
# what stands beside a LoRA, by its name
BESIDE = (".json", ".png", ".balance.png")


def check_name(name: str) -> str:
    """The name of a new LoRA, if it can be a file and a prompt tag on every system. Raises BadInput if not."""
    remedy = "Choose a plain name such as dog-watercolour"
    if not name or not name.strip():
        raise BadInput("the output has no name", remedy=remedy)
    if name != name.strip() or name.endswith("."):
        raise BadInput(f"output name {name!r} begins or ends with a space, or ends with a dot", remedy=remedy)
    # the last ones turn the direction of text or are not seen, so that a name would read as another
    if found := re.search(r'[/\\:*?"<>|,\x00-\x1f\x7f-\x9f\ud800-\udfff\u200b\u2028-\u202e\u2066-\u2069\ufeff]', name):
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
    """Refuses (BadInput) a destination whose folder is missing or read-only, or whose name is too long or taken.

    What a killed run has left there goes.
    """
    folder = path.parent
    if not folder.is_dir():
        raise BadInput(f"the folder {folder} does not exist", remedy="Create it, or choose another")
    probe = atomic.part_of(path, max(BESIDE, key=len))
    try:  # os.access is not enough: it knows neither special file systems nor quotas, nor how long a path may be
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(f"the path {path} is too long for this disk", remedy="Choose a shorter name") from error
        raise BadInput(
            f"the folder {folder} cannot be written to ({error.strerror})",
            remedy="Change its permissions, or choose another",
        ) from error
    atomic.remove_leftovers(folder)
    wanted = {_plain(path.stem + ending) for ending in (".safetensors", *BESIDE)}
    taken = sorted(f.name for f in folder.iterdir() if _plain(f.name) in wanted)
    if taken and not overwrite:
        raise BadInput(f"{', '.join(taken)} is already there", remedy="Choose another output name, or ask to overwrite")
    if path.is_dir():
        raise BadInput(f"{path.name} is a folder", remedy="Choose another output name")


def check_room(folder: Path, needed: int) -> None:
    """Refuses (BadInput) a disk that has not as many bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise BadInput(
            f"the file takes {needed / 1e6:.0f} MB, and on the disk of {folder} only {free / 1e6:.0f} MB are free",
            remedy="Make room there, or choose another folder",
        )


def _plain(name: str) -> str:
    """A file's name as disks compare it that do not know capitals, nor how an accent was typed."""
    return unicodedata.normalize("NFC", name).casefold()


def write(
    path: Path,
    stacks: Mapping[str, Stack],
    dtype: str,
    metadata: Mapping[str, str],
    overwrite: bool,
    names: str = "kohya",
    base: str = "sdxl",
    extra: Mapping[str, Tensor] = {},
) -> dict:
    """Writes one LoRA file and returns {"sha256", "bytes", "largest_error"}.

    The file is written beside its destination, synced, read back and compared, and only then renamed: at every moment
    there is the old file, whole, or the new one, whole. largest_error: max |saved - wanted| over all values of a
    tensor, divided by the largest of them. Raises BadInput if the values do not fit the dtype, the name is taken, or a
    layer has no name in the spelling.

    names: the spelling, one of keys.LAYER_NAMES, of the layers of the model `base`. extra: what goes into the file
    beside the factors, under these very names: norm layers, biases, embeddings.
    """
    check_free(path, overwrite)
    tensors = lora_tensors(stacks, DTYPES[dtype], names, base)
    if taken := sorted(tensors.keys() & extra.keys()):
        raise BadInput("stands twice in what is to be saved", key=taken[0], remedy="Report this as an error of ZipLoRA")
    tensors |= {name: _cast(name, value, DTYPES[dtype]) for name, value in extra.items()}
    header, body = _parts(save(tensors))
    check_room(path.parent, len(body))
    body_hash = hashlib.sha256(body).hexdigest()
    metadata = {name: value for name, value in metadata.items() if name != _ADAPTER_SETTINGS}
    metadata |= {"sshs_model_hash": body_hash, "modelspec.hash_sha256": f"0x{body_hash}"}
    if names == "diffusers" and (settings := _adapter_settings(stacks, base)):
        metadata[_ADAPTER_SETTINGS] = json.dumps(settings, sort_keys=True)
    part = atomic.part_of(path)
    try:
        header = _header({"__metadata__": {name: _text(value) for name, value in metadata.items()}, **header})
        atomic.write_synced(part, header, body)
        _compare(part, tensors, body_hash)
        error = _largest_error(stacks, tensors, names, base, extra)
        told = {"sha256": body_hash, "bytes": len(header) + len(body), "largest_error": error}
        _rename(part, path, overwrite)  # last: what fails before leaves no file, and after it there is nothing to fail
        for ending in (".png", ".balance.png"):  # pictures of what was overwritten
            with contextlib.suppress(OSError):
                path.with_suffix(ending).unlink(missing_ok=True)
    finally:
        part.unlink(missing_ok=True)
    return told


def write_beside(path: Path, ending: str, data: bytes) -> None:
    """Writes NAME.json or NAME.png beside a LoRA, whole or not at all."""
    atomic.replace(path.with_suffix(ending), data)


def card(activation_text: str, notes: str, weight: float = 1.0, base: str = "sdxl") -> bytes:
    """NAME.json, the WebUI's card of a LoRA."""
    fields = {
        "description": "",
        "sd version": base.upper() if base != "unknown" else "Unknown",
        "activation text": activation_text,
        "preferred weight": weight,
        "notes": notes,
    }
    return (_text(json.dumps(fields, ensure_ascii=False, indent=4)) + "\n").encode()


def _text(value: str) -> str:
    """Half characters, which JSON can hold and no file can, as question marks."""
    return value.encode("utf-8", "replace").decode("utf-8")


# spelling -> how it calls the factors
FACTORS = {"kohya": ("lora_up", "lora_down"), "diffusers": ("lora_B", "lora_A"), "peft": ("lora_B", "lora_A")}
# where diffusers keeps PEFT's settings in a file's metadata
_ADAPTER_SETTINGS = "lora_adapter_metadata"


def lora_tensors(
    stacks: Mapping[str, Stack], dtype: torch.dtype, names: str = "kohya", base: str = "sdxl"
) -> dict[str, Tensor]:
    """The factors of every layer under the names of a spelling, cast to dtype.

    kohya: `LAYER.lora_up.weight`, `.lora_down.weight` and `.alpha`, one alpha for all layers, the largest rank:
    diffusers' loader does not find its way through different ones.
    diffusers and peft: `LAYER.lora_B.weight` and `.lora_A.weight`. No alpha means that it is the rank.
    """
    tensors = {}
    alpha = float(max((stack.up.shape[1] for stack in stacks.values()), default=1))
    for key, stack in sorted(stacks.items()):
        layer, rank = spelled(key, base, names), stack.up.shape[1]
        for_up, for_down = _shares(rank / alpha) if names == "kohya" else (1.0, 1.0)
        up = (stack.up * for_up).reshape(*stack.up.shape, *[1] * (stack.down.ndim - 2))
        for part, value in zip(FACTORS[names], (up, stack.down * for_down)):
            tensors[f"{layer}.{part}.weight"] = _cast(f"{layer}.{part}.weight", value, dtype)
        if names == "kohya":
            # fp32 whatever the rest is: bf16 cannot hold every rank above 256
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def _shares(ratio: float) -> tuple[float, float]:
    """rank / alpha, which undoes what a reader multiplies by, for both factors: in one it could leave fp16's range."""
    for_down = 2.0 ** round(math.log2(ratio) / 2)
    return ratio / for_down, for_down


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.detach().cpu().to(dtype).contiguous()
    if not finite(cast):
        short = next((short for short, known in DTYPES.items() if known == dtype), dtype)
        raise BadInput(f"values of the merged LoRA do not fit {short}", key=name, remedy="Save it as bf16 or fp32")
    return cast


def _adapter_settings(stacks: Mapping[str, Stack], base: str) -> dict:
    """PEFT's settings that say alpha = rank layer by layer, {} where the ranks of each part of the pipeline are equal.

    Without them some versions of diffusers take one layer's rank for every alpha, or one rank for every projection.
    """
    parts: dict[str, dict[str, int]] = defaultdict(dict)
    for key, stack in sorted(stacks.items()):
        part, _, layer = spelled(key, base, "diffusers").partition(".")
        # PEFT looks for these at the end of a name, and newer transformers have no text_model
        parts[part][layer.removeprefix("text_model.")] = stack.up.shape[1]
    if all(len(set(ranks.values())) == 1 for ranks in parts.values()):
        return {}
    settings = {}
    for part, ranks in parts.items():
        usual = Counter(ranks.values()).most_common(1)[0][0]
        other = {layer: rank for layer, rank in ranks.items() if rank != usual}
        fields = {"r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": other}
        settings |= {f"{part}.{field}": value for field, value in fields.items()}
        settings[f"{part}.target_modules"] = list(ranks)
    return settings


def _parts(data: bytes) -> tuple[dict, memoryview]:
    """A safetensors file's header and its body, which is not copied: it can have hundreds of megabytes."""
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:begin]), memoryview(data)[begin:]


def _header(fields: Mapping) -> bytes:
    """A header as the file has it, in a fixed order: safetensors writes the metadata in another one each time."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _compare(part: Path, tensors: Mapping[str, Tensor], body_hash: str) -> None:
    """Reads the file back and compares it with what was meant, to the bit. Raises OSError if it differs."""
    back = load_file(str(part))
    same = back.keys() == tensors.keys() and all(_same(back[name], tensor) for name, tensor in tensors.items())
    if not same or tensor_sha256(part) != body_hash:
        raise OSError(f"{part}: what was read back is not what was written; the disk may be failing")


def _same(a: Tensor, b: Tensor) -> bool:
    """To the bit; as integers, which compare much faster than halves."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


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
    atomic.sync_folder(path.parent)


def _largest_error(
    stacks: Mapping[str, Stack],
    tensors: Mapping[str, Tensor],
    names: str,
    base: str,
    extra: Mapping[str, Tensor],
) -> float:
    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for name, value in extra.items():
            yield tensors[name], value
        for key, stack in stacks.items():
            layer, (up, down) = spelled(key, base, names), FACTORS[names]
            alpha = tensors.get(f"{layer}.alpha")
            for_up, for_down = (1.0, 1.0) if alpha is None else _shares(stack.up.shape[1] / float(alpha))
            yield tensors[f"{layer}.{up}.weight"], stack.up * for_up
            yield tensors[f"{layer}.{down}.weight"], stack.down * for_down

    worst = 0.0
    for saved, wanted in pairs():
        error = (saved.float().reshape(wanted.shape) - wanted.float()).abs().max()
        worst = max(worst, float(error / wanted.float().abs().max().clamp_min(1e-30)))
    return worst
