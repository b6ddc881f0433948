"""ZipLoRA (arXiv 2311.13600): one learned coefficient per input column of each LoRA, by gradient, everything else frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.learning import learn
from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.objective import OBJECTIVES, Columns, retained_energy
from ziplora_lib.merge.pairing import Pairing


def ziplora(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """ΔW_m = Σ_i m_i ⊗ ΔW_i (Eq. 2), m_i (columns,), learned on Eq. 3 in the objective's form. Raises as `learn` does."""
    columns = learned_columns(pairing, calibration.device)
    penalty = OBJECTIVES[settings.objective].penalty
    return learn("ziplora", _ByColumn(pairing, columns, penalty), pairing, calibration, settings, callback)


@dataclass(frozen=True)
class _ByColumn:
    """m: (P, M), M columns of all learned layers."""

    pairing: Pairing
    columns: Columns
    of_columns: Callable[[Tensor, Columns], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.columns.present.shape

    def by_layer(self, m: Tensor) -> dict[str, Tensor]:
        return by_layer(m, self.pairing, self.columns)

    def folded_down(self, stack: Stack, values: Tensor) -> Tensor:
        return stack.folded_down(values)

    def own(self, m: Tensor, i: int) -> Tensor:
        return self.columns.own(m, i)

    def mean_abs(self, m: Tensor) -> list[float]:
        return self.columns.mean_abs(m)

    def retained(self, m: Tensor) -> float:
        return retained_energy(m, self.columns)

    def penalty(self, m: Tensor) -> Tensor:
        return self.of_columns(m, self.columns)


def learned_columns(pairing: Pairing, device: str = "cpu") -> Columns:
    """The learned layers' columns in one row, for the penalties and the summary."""
    stacks = [pairing.stacks[key] for key in pairing.learned]
    grams = torch.cat([s.column_grams() for s in stacks], dim=-1)
    present = torch.cat([torch.tensor(s.ranks)[:, None].gt(0).expand(-1, s.columns) for s in stacks], dim=-1)
    return Columns(grams.to(device), [s.columns for s in stacks], present.to(device))


def by_layer(m: Tensor, pairing: Pairing, columns: Columns) -> dict[str, Tensor]:
    """(P, M) -> {layer key: (P, columns)}, as views."""
    return dict(zip(pairing.learned, m.split(columns.sizes, dim=1)))
