"""The average Σ_i ΔW_i / P of P LoRAs, rank-concatenated: exact, without a model."""

from __future__ import annotations

from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.pairing import Pairing


def average(pairing: Pairing, calibration: Calibration | None, settings: Settings, callback: Callback) -> Merged:
    """Every LoRA times 1/P, at its own strength, in the learned layers; the other layers are summed, as in every merge."""
    share = [1 / pairing.parents] * pairing.parents
    averaged = {key: pairing.stacks[key].merged(share) for key in pairing.learned}
    return Merged({**pairing.stacks, **averaged}, summary={"method": "average"})
