"""The saved file: what others read from it is what was meant; no name that was there is harmed."""

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.reader import read, tensor_sha256
from ziplora_lib.lora.stack import Stack

LINEAR = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
ONLY_STYLE = "lora_unet_middle_block_1_proj_in"
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
# half a unit in the last place, relative, and half the smallest number
ROUNDING = {"fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134), "fp32": (2.0**-24, 2.0**-150)}


def stacks(seed=0, factor=1.0):
    generator = torch.Generator().manual_seed(seed)

    def delta(rank, *shape):
        up, down = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, *shape[1:], generator=generator)
        return LowRankDelta(up * factor, down * factor, 0.5)

    return {
        LINEAR: Stack.of([delta(3, 6, 8), delta(2, 6, 8)]),
        CONV: Stack.of([delta(2, 4, 3, 3, 3), delta(4, 4, 3, 3, 3)]),
        ONLY_STYLE: Stack.of([None, delta(4, 6, 8)]),
        TEXT: Stack.of([delta(3, 6, 8), None]),
    }


def write(path, content=None, dtype="fp16", metadata=None, overwrite=False):
    return writer.write(path, content or stacks(), dtype, metadata or {"ss_output_name": path.stem}, overwrite)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "merged.safetensors"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_read_back_by_ours_and_by_safetensors(path, dtype):
    saved = write(path, dtype=dtype)
    unit, least = ROUNDING[dtype]
    lora, tensors = read(path), load_file(path)
    assert lora.deltas.keys() == stacks().keys()
    assert {name.rsplit(".", 2 if name.endswith("weight") else 1)[0] for name in tensors} == stacks().keys()
    worst = 0.0
    for key, stack in stacks().items():
        scale = float(tensors[f"{key}.alpha"]) / stack.up.shape[1]
        for part, wanted in (("lora_up", stack.up / scale), ("lora_down", stack.down)):
            tensor = tensors[f"{key}.{part}.weight"]
            assert tensor.dtype == writer.DTYPES[dtype]
            error = (tensor.double().reshape(wanted.shape) - wanted.double()).abs()
            # up / scale is itself rounded in fp32
            assert (error <= (unit + 2.0**-23) * wanted.abs() + least).all()
            worst = max(worst, float(error.max() / wanted.abs().max()))
        # one alpha for all layers: diffusers mixes up different ones
        assert float(tensors[f"{key}.alpha"]) == max(s.up.shape[1] for s in stacks().values())
        wanted, up, down = stack.total().dense(), stack.up.abs(), stack.down.flatten(1).abs()
        # each factor rounded once, and fp32 sums in another order
        bound = ((2 * unit + unit**2 + 8 * 2.0**-24) * (up @ down)).reshape(wanted.shape)
        assert ((lora.deltas[key].dense() - wanted).abs() <= bound).all()
    assert saved["largest_error"] == pytest.approx(worst, rel=1e-4, abs=2.0**-23)
    assert worst < 1e-7 if dtype == "fp32" else worst > 1e-5
    assert saved["bytes"] == path.stat().st_size


def test_convolutions_have_kohyas_shapes(path):
    write(path)
    tensors = load_file(path)
    assert tensors[f"{CONV}.lora_up.weight"].shape == (4, 6, 1, 1)
    assert tensors[f"{CONV}.lora_down.weight"].shape == (6, 3, 3, 3)
    assert tensors[f"{LINEAR}.lora_up.weight"].shape == (6, 5)


def test_the_hash_is_of_the_bytes_after_the_header(path):
    saved = write(path)
    content = path.read_bytes()
    body = content[8 + struct.unpack("<Q", content[:8])[0] :]
    wanted = hashlib.sha256(body).hexdigest()
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    assert metadata["sshs_model_hash"] == wanted
    assert metadata["modelspec.hash_sha256"] == f"0x{wanted}"
    assert saved["sha256"] == tensor_sha256(path) == read(path).hash == wanted


def test_the_metadata_comes_through_in_any_language(path):
    given = {"ss_output_name": "merged", "modelspec.title": '犬 "quoted" \\ \n \t é', "ziplora.version": "0"}
    write(path, metadata=given)
    with safe_open(str(path), "pt") as file:
        assert {name: file.metadata()[name] for name in given} == given


def test_half_a_character_from_broken_json_does_not_lose_a_merge(path):
    """Cards and tags are JSON, which can hold lone surrogates that no file can."""
    write(path, metadata={"ss_tag_frequency": "cat \ud83d", "modelspec.trigger_phrase": "\udc00"})
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["ss_tag_frequency"].startswith("cat ")
    assert json.loads(writer.card("cat \ud83d", "\udc00"))["activation text"].startswith("cat ")


SAME = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from ziplora_lib.lora import writer
import torch
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.stack import Stack
content = {{f"lora_unet_out_{{i}}": Stack.of([LowRankDelta(torch.ones(2, 2), torch.ones(2, 2))]) for i in range(9)}}
writer.write(Path({path!r}), content, "fp16", {{f"field{{i}}": str(i) for i in range(30)}}, True)
"""


def test_the_same_content_is_the_same_bytes_in_every_process(path):
    seen = set()
    for seed in ("1", "2"):
        script = SAME.format(paths=[str(Path(writer.__file__).parents[2])], path=str(path))
        subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for _ in range(3):
            seen.add(path.read_bytes())
    assert len(seen) == 1
    assert len(read(path).metadata) == 32


def test_the_same_content_is_the_same_bytes_in_one_process(path):
    seen = set()
    for _ in range(8):
        write(path, metadata={f"field{i}": str(i) for i in range(30)}, overwrite=True)
        seen.add(path.read_bytes())
    assert len(seen) == 1
    assert read(path).metadata.keys() > {f"field{i}" for i in range(30)}


@pytest.mark.parametrize("ending", [".safetensors", ".json", ".png"])
def test_a_taken_name_is_refused_and_untouched(tmp_path, path, ending):
    taken = tmp_path / f"merged{ending}"
    taken.write_bytes(b"precious")
    with pytest.raises(BadInput, match="already there") as caught:
        write(path)
    assert caught.value.remedy
    assert taken.name in str(caught.value)
    assert os.listdir(tmp_path) == [taken.name]
    assert taken.read_bytes() == b"precious"


def test_a_name_taken_in_another_case_is_refused(tmp_path, path):
    (tmp_path / "Merged.SAFETENSORS").write_bytes(b"precious")
    with pytest.raises(BadInput, match=r"Merged\.SAFETENSORS"):
        write(path)
    assert os.listdir(tmp_path) == ["Merged.SAFETENSORS"]


def test_overwrite_replaces(tmp_path, path):
    path.write_bytes(b"old")
    write(path, overwrite=True)
    assert len(read(path).deltas) == 4
    assert os.listdir(tmp_path) == [path.name]


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        write(tmp_path / "nowhere" / "merged.safetensors")


def test_a_read_only_folder_is_refused(tmp_path, path, monkeypatch):
    # not by chmod: root may write everywhere
    def touch(file, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(type(tmp_path), "touch", touch)
    with pytest.raises(BadInput, match="cannot be written"):
        write(path)
    assert os.listdir(tmp_path) == []


def test_values_too_large_for_fp16_are_refused_and_bf16_takes_them(tmp_path, path):
    large = stacks(factor=1e3)  # a scale of 0.5 and factors of some thousands: beyond 65504 after balancing
    large[LINEAR] = Stack.of([LowRankDelta(torch.full((6, 2), 1e5), torch.full((2, 8), 1e5))])
    with pytest.raises(BadInput, match="do not fit fp16") as caught:
        write(path, large)
    assert caught.value.key.startswith(LINEAR)
    assert "bf16" in caught.value.remedy
    assert os.listdir(tmp_path) == []
    write(path, large, dtype="bf16")
    assert len(read(path).deltas) == 4


def fails(*errors):
    """A stand-in for a function of os: raises these in turn (None: works)."""
    queue = list(errors)

    def make(function):
        def stand_in(*args, **kwargs):
            error = queue.pop(0) if queue else None
            if error is not None:
                raise error
            return function(*args, **kwargs)

        return stand_in

    return make


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("function", ["fsync", "replace", "link", "link and replace"])
def test_a_failure_on_the_way_leaves_what_was_there(tmp_path, path, monkeypatch, function, error, overwrite):
    if overwrite:
        write(path, stacks(1))
        old = path.read_bytes()
    for name in function.split(" and "):
        monkeypatch.setattr(writer.os, name, fails(error)(getattr(os, name)))
    try:
        write(path, overwrite=overwrite)
    except (OSError, KeyboardInterrupt, MemoryError):
        assert os.listdir(tmp_path) == ([path.name] if overwrite else [])
        if overwrite:
            assert path.read_bytes() == old
    else:
        # that function was not needed, or another did for it: overwriting renames, a new name is linked or renamed
        assert function != "fsync"
        assert function == ("link" if overwrite else "replace") or (function == "link" and error is FULL)
        assert os.listdir(tmp_path) == [path.name]
        monkeypatch.undo()
        assert len(read(path).deltas) == 4


def test_a_folder_that_cannot_be_synced_costs_nothing(tmp_path, path, monkeypatch):
    """Some network drives refuse it, and by then the file is whole and in its place."""
    monkeypatch.setattr(writer.os, "fsync", fails(None, OSError(errno.EINVAL, "Invalid argument"))(os.fsync))
    write(path)
    assert os.listdir(tmp_path) == [path.name]
    assert len(read(path).deltas) == 4


def test_a_name_taken_during_the_merge_is_not_overwritten(tmp_path, path, monkeypatch):
    def race(part, destination):
        path.write_bytes(b"somebody else's")
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(writer.os, "link", race)
    with pytest.raises(BadInput, match="created by something else"):
        write(path)
    assert path.read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == [path.name]


def test_a_disk_that_gives_back_something_else_is_noticed(tmp_path, path, monkeypatch):
    original = writer.atomic.write_synced

    def rotten(part, *pieces):
        data = b"".join(map(bytes, pieces))
        original(part, data[:-2] + bytes([data[-2] ^ 1, data[-1]]))

    monkeypatch.setattr(writer.atomic, "write_synced", rotten)
    with pytest.raises(OSError, match="read back"):
        write(path)
    assert os.listdir(tmp_path) == []


def test_cards_and_pictures_are_written_beside(tmp_path, path):
    writer.write_beside(path, ".json", writer.card("sks cat", "notes é", 0.8))
    writer.write_beside(path, ".png", b"picture")
    card = json.loads((tmp_path / "merged.json").read_text(encoding="utf-8"))
    assert card["activation text"] == "sks cat"
    assert card["preferred weight"] == 0.8
    assert card["sd version"] == "SDXL"
    assert card["notes"] == "notes é"
    assert sorted(os.listdir(tmp_path)) == ["merged.json", "merged.png"]


def test_a_failed_card_leaves_the_old_one(tmp_path, path, monkeypatch):
    writer.write_beside(path, ".json", b"old")
    monkeypatch.setattr(writer.os, "replace", fails(FULL)(os.replace))
    with pytest.raises(OSError, match="No space"):
        writer.write_beside(path, ".json", b"new")
    assert (tmp_path / "merged.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["merged.json"]


def test_pictures_of_what_is_overwritten_do_not_stay(path):
    write(path)
    pictures = [path.with_suffix(ending) for ending in (".png", ".balance.png")]
    for picture in pictures:
        picture.write_bytes(b"of the old one")
    write(path, overwrite=True)
    assert path.exists()
    assert not any(picture.exists() for picture in pictures)
