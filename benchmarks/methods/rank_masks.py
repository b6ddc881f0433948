"""Rank masks, after DuoLoRA (arXiv 2504.13206): ZipLoRA's loop with one learned coefficient per rank, not per column.

DuoLoRA's masks alone: not its prior over layers, nor its cycle consistency.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.judging import held_out_errors
from ziplora_lib.merge.learning import learn
from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.pairing import Pairing


def rank_masks(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """ΔW_m = up · diag(m) · down, m (R,), learned on the objective's data term. Raises as `learn` does.

    There is no overlap penalty, so `lam` counts for nothing.
    """
    summed = held_out_errors(calibration, {}, pairing.parents, settings.at_once)
    return learn("rank-masks", _ByRank(pairing, calibration.device), pairing, calibration, settings, callback, summed)


class _ByRank:
    """m: (M,), M ranks of all learned layers."""

    def __init__(self, pairing: Pairing, device: str):
        stacks = [pairing.stacks[key] for key in pairing.learned]
        self.keys, self.sizes, self.parents = pairing.learned, [sum(s.ranks) for s in stacks], pairing.parents
        self.shape = (sum(self.sizes),)
        self.grams = [_rank_grams(s).to(device) for s in stacks]
        self.total = sum(float(gram.sum()) for gram in self.grams)
        # whose each rank is
        self.owner = torch.cat([s.per_rank(torch.arange(self.parents)) for s in stacks]).to(device)

    def by_layer(self, m: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.keys, m.split(self.sizes)))

    def folded_down(self, stack: Stack, values: Tensor) -> Tensor:
        return stack.down.to(values.dtype) * values.reshape(-1, *[1] * (stack.down.ndim - 1))

    def own(self, m: Tensor, i: int) -> Tensor:
        return m[self.owner == i]

    def mean_abs(self, m: Tensor) -> list[float]:
        own = [self.own(m.abs(), i) for i in range(self.parents)]
        return [float(row.mean()) if len(row) else 0.0 for row in own]

    def retained(self, m: Tensor) -> float:
        kept = sum(part @ gram @ part for part, gram in zip(m.split(self.sizes), self.grams))
        return max(float(kept) / max(self.total, 1e-30), 0.0) ** 0.5

    def penalty(self, m: Tensor) -> Tensor:
        return 0 * m.sum()


def _rank_grams(stack: Stack) -> Tensor:
    """⟨ΔW of rank r, ΔW of rank q⟩ for all ranks: (R, R), fp32; m' this m is ‖ΔW‖² with rank r times m[r]."""
    down = stack.down.float().flatten(1)
    return (stack.up.float().T @ stack.up.float()) * (down @ down.T)
