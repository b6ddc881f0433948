"""ZipLoRA (arXiv 2311.13600): one learned coefficient per input column of each LoRA, by gradient, everything else frozen.

With a warm start the columns are those that SSR-Merge leaves, least squares among the ranks: of most of the interference
between the LoRAs it rids them in seconds, layer by layer; the coefficients then see to what the whole model makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import Down
from ziplora_lib.merge.judging import retained
from ziplora_lib.merge.learning import learn
from ziplora_lib.merge.method import Calibration, Callback, Merged, Sample, Settings
from ziplora_lib.merge.objective import OBJECTIVES, Columns, retained_energy
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.ssr import ssr


def ziplora(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """ΔW_m = Σ_i m_i ⊗ ΔW_i (Eq. 2), m_i (columns,), learned on Eq. 3 in the objective's form. Raises as `learn` does.

    With a warm start ΔW_i is what SSR-Merge makes of LoRA i, and this raises as `ssr` does too.
    """
    if not OBJECTIVES[settings.objective].warm_start:
        return _learned(pairing, calibration, settings, callback)
    begun = ssr(
        pairing, calibration, replace(settings, start=1.0), lambda info: callback({**info, "phase": "warm start"})
    )
    there = replace(pairing, stacks=begun.stacks)
    merged = _learned(there, _beginning(calibration, there), settings, callback)
    merged.summary["error_plain_sum"] = begun.summary["error_plain_sum"]
    merged.summary["retained"] = retained(pairing, merged.stacks)
    return merged


def _learned(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    columns = learned_columns(pairing, calibration.device)
    penalty = OBJECTIVES[settings.objective].penalty
    return learn("ziplora", _ByColumn(pairing, columns, penalty), pairing, calibration, settings, callback)


def _beginning(calibration: Calibration, pairing: Pairing) -> Calibration:
    """The same model, with other factors on it than those attached: the pairing's."""
    here: dict[str, Stack] = {}

    def down(attached: Stack, key: str, given: Down | None) -> Tensor:
        if key not in here:
            here[key] = replace(attached, down=pairing.stacks[key].down.to(attached.down))
        return here[key].down if given is None else given(here[key])

    def predict(samples: Sequence[Sample], downs: Mapping[str, Down]) -> Tensor:
        given = {key: partial(down, key=key, given=downs.get(key)) for key in pairing.learned}
        return calibration.predict(samples, given)

    return replace(calibration, predict=predict)


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
