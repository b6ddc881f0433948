"""What a merge takes at SDXL's full size, in memory and in operations, counted without a GPU.

A UNet of SDXL's exact shape on PyTorch's meta device, where tensors have shapes and no values: what a pass keeps for its
backward is counted tensor by tensor, with attention as fused kernels keep it. Beside it what `memory.foreseen` says of the
same from small crops, as a merge does before its steps. Counted, not measured: work space and gaps come on top.

python -m benchmarks.footprint        writes benchmarks/results/footprint.json
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale import RandomModel, Size, unet
from benchmarks.speed import MATRICES
from ziplora_lib import effort, memory
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import Slot, attach
from ziplora_lib.merge.blocks import Kept, weights_freed
from ziplora_lib.merge.method import Calibration, Sample
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.recipe import parse

RESULT = Path(__file__).parent / "results" / "footprint.json"
SDXL = Size((320, 640, 1280), (2, 10), 128)
RANK = 64
ATTENTION = ".attn"
PAIR = [{"lora": role, "role": role, "prompt": role} for role in ("subject", "style")]


class Fused(torch.autograd.Function):
    """Attention that keeps its inputs, its output and a number a row, as fused kernels do; shapes alone."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def fused(query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
    return Fused.apply(query, key, value)


def unfused(query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
    """Attention that keeps all its scores."""
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


class Shapes:
    """A UNet in fp16 and two LoRAs on the matrices whose names have `where` in them, without values."""

    def __init__(self, size: Size, rank: int, where: str = ATTENTION):
        with torch.device("meta"):
            self.model = unet(size).half()
            self.model.disable_gradient_checkpointing()
            named = [(n, m) for n, m in self.model.named_modules() if where in n and isinstance(m, nn.Linear)]
            self.slots = {name: Slot(module) for name, module in named}
            self.stacks = {
                name: Stack(torch.empty(len(m.weight), 2 * rank), torch.empty(2 * rank, m.in_features), (rank, rank))
                for name, m in named
            }
            self.x = torch.empty(1, 4, size.latent, size.latent)
        self.host = RandomModel(self.model, size)

    def predict(self, x: Tensor, rows: int) -> Tensor:
        conds = [self.host.encode("x", 0)] * rows
        return self.host.predict(x.expand(rows, -1, -1, -1), torch.full((rows,), 500), conds)


def footprint(size: Size, rank: int, rows: int, attention: Callable = fused) -> dict:
    """Bytes of a pass of so many rows, whole and foreseen; and those that are there whatever runs."""
    shapes = Shapes(size, rank)
    with (
        attach(shapes.slots, shapes.stacks) as router,
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
    ):

        def predict(samples, downs):
            router.merged(downs)
            return shapes.predict(samples[0].x, rows)

        known, pairing = SimpleNamespace(unet=lambda: shapes.model), Pairing(shapes.stacks, list(shapes.stacks), {})
        calibration, sample = Calibration([], [], predict, "meta"), Sample(0, shapes.x, torch.tensor([0]), "x", None)
        whole = memory.counted(known, pairing, calibration, sample)
        foreseen = memory.foreseen(known, pairing, calibration, sample)
    return {
        "rows": rows,
        "whole": _told(whole),
        "foreseen": _told(foreseen),
        "weights": sum(p.nbytes for p in shapes.model.parameters()),
        "weights that offload takes away": weights_freed(shapes.model),
        "LoRAs": 2 * sum(s.up.numel() + s.down.numel() for s in shapes.stacks.values()),
    }


def _told(kept: Kept) -> dict[str, int]:
    return {"fast": kept.all, "checkpointing": kept.recomputed}


def operations(size: Size, rank: int, where: str = ATTENTION) -> dict[str, int]:
    """Of one row: of a forward, and of a forward and a backward down to the coefficients. A product and a sum are two."""
    shapes = Shapes(size, rank, where)

    def counted(work: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    with attach(shapes.slots, shapes.stacks) as router:
        router.bare()
        with torch.no_grad():
            found = {"bare model, forward": counted(lambda: shapes.predict(shapes.x, 1))}
            router.merged()
            found["both LoRAs, forward"] = counted(lambda: shapes.predict(shapes.x, 1))
        router.merged(dict.fromkeys(shapes.stacks, memory.with_coefficients))
        found["both LoRAs, forward and backward"] = counted(lambda: shapes.predict(shapes.x, 1).sum().backward())
    return found


def whole_merges(of_row: dict[str, int]) -> dict[str, dict]:
    """Of merges with the defaults: forwards of one row, and what they add up to; a backward counts as one of them."""
    merges = {method: parse({"parents": PAIR, "output": "x", "method": method}) for method in ("ziplora", "ssr")}
    merges["ziplora, 100 steps"] = parse({"parents": PAIR, "output": "x", "steps": 100})
    rows = {name: effort.passes(recipe.copy(update={"memory": "fast"})) for name, recipe in merges.items()}
    return {name: {"rows": n, "operations": n * of_row["both LoRAs, forward"]} for name, n in rows.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    made = {"torch": torch.__version__, "python": platform.python_version(), "dtype": "fp16"}
    found = {"pixels": 8 * SDXL.latent, "rank": RANK, "layers": "all attention matrices"}
    # of one sample under guidance, of both samples of a step
    found |= {"guided": footprint(SDXL, RANK, 2), "both samples": footprint(SDXL, RANK, 4)}
    found["operations"] = operations(SDXL, RANK)
    found["operations, all matrices of the transformers"] = operations(SDXL, RANK, MATRICES)
    found["merges"] = whole_merges(found["operations"])
    text = json.dumps({"made": made, **found}, indent=1)
    print(text)
    RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
