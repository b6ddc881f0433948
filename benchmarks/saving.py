"""How long a merged LoRA of SDXL's size takes to save and to read, beside the least that either could take.

Rank 64 + 64 with random factors on SDXL's 560 attention matrices, saved as fp16. The writer casts, serialises, hashes,
writes, syncs, reads back, compares, and says how far the saved values are off; beside it the same bytes are written and
synced by themselves, and safetensors saves the same tensors, cast already. In turn, in one run; files are read from the
system's cache, right after they were written. On one thread: the processor's seconds, which others on the machine hardly
change, are then those of an idle machine, but for the waiting for the disk.

python -m benchmarks.saving [--folder DIR]        writes benchmarks/results/saving.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.scale import FULL, unet
from benchmarks.speed import Peak, rounded
from ziplora_lib import atomic
from ziplora_lib.lora import reader, writer
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.stack import Stack

RESULT = Path(__file__).parent / "results" / "saving.json"
RANKS = (64, 64)


def now() -> Tensor:
    """(seconds, the processor's seconds)"""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Phases:
    """Seconds, as `now` has them, of named functions, without what they spend in each other."""

    def __init__(self):
        self.seconds: dict[str, Tensor] = {}
        self._inner = [torch.zeros(2)]

    def timed(self, name: str, work: Callable) -> Callable:
        def run(*given, **named):
            self._inner.append(torch.zeros(2))
            began = now()
            try:
                return work(*given, **named)
            finally:
                whole = now() - began
                self.seconds[name] = self.seconds.get(name, 0) + whole - self._inner.pop()
                self._inner[-1] = self._inner[-1] + whole

        return run


def stacks() -> dict[str, Stack]:
    """SDXL's attention matrices with random factors, in fp32."""
    with torch.device("meta"):
        model = unet(FULL[0])
    generator, found, rank = torch.Generator().manual_seed(0), {}, sum(RANKS)
    for name, module in model.named_modules():
        if ".attn" in name and isinstance(module, torch.nn.Linear):
            up = torch.randn(module.out_features, rank, generator=generator) * 0.01
            down = torch.randn(rank, module.in_features, generator=generator) * 0.01
            found[layer_key(f"unet.{name}", "sdxl")] = Stack(up, down, RANKS)
    return found


def in_phases(work: Callable[[], object]) -> dict[str, Tensor]:
    """The writer's seconds, as `now` has them, by what they are spent on."""
    phases = Phases()
    sha256, whole = SimpleNamespace(sha256=phases.timed("hash", hashlib.sha256)), phases.timed("the rest", work)
    with ExitStack() as stack:
        for where, function, name in (
            (writer, "lora_tensors", "cast"),
            (writer, "save", "serialise"),
            (atomic, "write_synced", "write"),
            (os, "fsync", "sync"),
            (writer, "load_file", "read back"),
            (writer, "_compare", "compare"),
            (writer, "tensor_sha256", "hash of the file"),
            (writer, "_largest_error", "largest error"),
        ):
            stack.enter_context(patch.object(where, function, phases.timed(name, getattr(where, function))))
        stack.enter_context(patch.object(writer, "hashlib", sha256))
        whole()
    return phases.seconds


def plain(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def measured(work: Callable[[], object]) -> dict:
    """Seconds, as `now` has them, and the most memory in MB over what was there before; mapped files count."""
    gc.collect()
    os.sync()  # what others have written is not to be waited for in here
    ctypes.CDLL(None).malloc_trim(0)
    peak = Peak(torch.device("cpu"))
    peak.begin()
    before, began = peak.end(), now()
    work()
    return {"seconds": now() - began, "peak": (peak.end() - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where the files are written; a temporary one if not given")
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    content, rows, phases = stacks(), {}, []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        path, other = Path(temporary) / "merged.safetensors", Path(temporary) / "plain.safetensors"
        metadata = {"ss_output_name": "merged"}
        writer.write(path, content, "fp16", metadata, True)
        data, tensors = path.read_bytes(), load_file(path)
        ways: dict[str, Callable[[], object]] = {
            "write": lambda: phases.append(in_phases(lambda: writer.write(path, content, "fp16", metadata, True))),
            "the bytes alone, synced": lambda: plain(other, data),
            "save_file, not synced": lambda: save_file(tensors, other),
            "read": lambda: reader.read(path),
            "load_file": lambda: load_file(path),
            "glance": lambda: reader.glance(path),
        }
        for k in range(args.times):
            for name, work in ways.items():
                other.unlink(missing_ok=True)
                rows.setdefault(name, []).append(measured(work))
                print(k, name, rows[name][-1], flush=True)
    result = {
        "made": {
            **machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "command": " ".join(["python -m benchmarks.saving", *sys.argv[1:]]),
        },
        "layers": len(content),
        "rank": RANKS,
        "MB": round(len(data) / 1e6, 1),
        "times": args.times,
        "seconds": {name: spread(torch.stack([one["seconds"] for one in every])) for name, every in rows.items()},
        "write, by phase": {name: spread(torch.stack([one[name] for one in phases])) for name in phases[0]},
        "peak over what was there, MB": {
            name: round(max(one["peak"] for one in every), 1) for name, every in rows.items()
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def spread(values: Tensor) -> dict[str, float]:
    """values: (times, 2), as `now` has them."""
    seconds = values[:, 0]
    told = {"median": seconds.median(), "least": seconds.min(), "most": seconds.max()}
    return rounded({name: float(one) for name, one in told.items()} | {"processor": float(values[:, 1].median())})


if __name__ == "__main__":
    main()
