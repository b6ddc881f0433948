"""ZipLoRA (arXiv 2311.13600): one learned coefficient per input column of each LoRA, by gradient, everything else frozen.

With a warm start the columns are those that SSR-Merge leaves, least squares among the ranks: that takes most of the error
away with forward passes alone, layer by layer; the coefficients then see to what the whole model makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import Down
from ziplora_lib.merge.judging import held_out_errors, retained
from ziplora_lib.merge.learning import learn
from ziplora_lib.merge.method import Calibration, Callback, Merged, Sample, Settings
from ziplora_lib.merge.objective import OBJECTIVES, Columns, retained_energy
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.ssr import solved


def ziplora(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """ΔW_m = Σ_i m_i ⊗ ΔW_i (Eq. 2), m_i (columns,), learned on Eq. 3 in the objective's form. Raises as `learn` does.

    With a warm start ΔW_i is what SSR-Merge makes of LoRA i, and this raises as its `solved` does too.
    """
    form, norm = OBJECTIVES[settings.objective], 1.0
    summed = held_out_errors(calibration, {}, pairing.parents, settings.at_once)
    if form.warm_start:
        downs = solved(pairing, calibration, settings, 1.0, lambda info: callback({**info, "phase": "warm start"}))
        begun = pairing.with_downs(downs)
        norm, pairing, calibration = retained(pairing, begun.stacks), begun, beginning(calibration, begun)
    coefficients = _ByColumn(pairing, learned_columns(pairing, calibration.device), form.penalty, norm)
    return learn("ziplora", coefficients, pairing, calibration, settings, callback, summed)


def beginning(calibration: Calibration, pairing: Pairing) -> Calibration:
    """The same model, with other downs in the learned layers than those attached: the pairing's."""
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
    """m: (P, M), M columns of all learned layers; norm: that of the pairing's sum over the plain sum's."""

    pairing: Pairing
    columns: Columns
    of_columns: Callable[[Tensor, Columns], Tensor]
    norm: float

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
        return self.norm * retained_energy(m, self.columns)

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
