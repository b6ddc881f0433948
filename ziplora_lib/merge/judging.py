"""What a merge is judged by: how far it is from each LoRA alone, on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import Down
from ziplora_lib.merge.method import Calibration, Merged, Sample, Settings
from ziplora_lib.merge.objective import relative_error
from ziplora_lib.merge.pairing import Pairing, uncancelled


def judged(
    name: str, pairing: Pairing, downs: Mapping[str, Tensor], calibration: Calibration, settings: Settings
) -> Merged:
    """The Merged of a method that replaces `down` in the layers given, (R, in…) each, with its errors."""
    stacks = pairing.with_downs(downs).stacks

    def errors(given: Mapping[str, Down]) -> list[float]:
        return held_out_errors(calibration, given, pairing.parents, settings.at_once)

    summary = {
        "method": name,
        "retained": retained(pairing, stacks),
        "error": errors({key: _fixed(down) for key, down in downs.items()}),
        "error_plain_sum": errors({}),
    }
    return Merged(stacks, summary=summary)


def _fixed(down: Tensor) -> Down:
    return lambda stack: down.to(stack.down.device)


@torch.no_grad()
def held_out_errors(calibration: Calibration, downs: Mapping[str, Down], parents: int, at_once: int = 1) -> list[float]:
    """Mean relative error against each LoRA alone, on the held-out samples, under guidance where they are."""
    sums, counts = [0.0] * parents, [0] * parents
    for group in groups(calibration.held_out, at_once):
        prediction = calibration.predict(group, downs)
        for sample, error in zip(group, errors_of(relative_error, prediction, group)):
            sums[sample.parent] += float(error)
            counts[sample.parent] += 1
    return [s / max(n, 1) for s, n in zip(sums, counts)]


def errors_of(
    error: Callable[[Tensor, Tensor, Tensor | None], Tensor], prediction: Tensor, group: Sequence[Sample]
) -> Tensor:
    """Each sample's error. prediction: (B, …) -> (B,)"""
    target = torch.cat([s.target for s in group]).to(prediction.device)
    bare = [s.bare for s in group if s.bare is not None]
    return error(prediction, target, torch.cat(bare).to(prediction.device) if bare else None)


def groups(samples: Sequence[Sample], at_once: int) -> Iterator[Sequence[Sample]]:
    """The samples, so many at once."""
    for i in range(0, len(samples), at_once):
        yield samples[i : i + at_once]


def retained(pairing: Pairing, stacks: Mapping[str, Stack]) -> float:
    """‖ΔW_m‖ / ‖ΔW_c + ΔW_s‖ over the learned layers; see `uncancelled`."""
    kept = sum(stacks[key].total().norm() ** 2 for key in pairing.learned)
    grams = [pairing.stacks[key].column_grams().sum(-1, keepdim=True) for key in pairing.learned]
    return math.sqrt(kept / uncancelled(torch.cat(grams, dim=-1))) if grams else 0.0
