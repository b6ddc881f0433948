"""The plain sum w_c ΔW_c + w_s ΔW_s, rank-concatenated: exact, without a model."""

from __future__ import annotations

from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.pairing import Pairing


def direct(pairing: Pairing, calibration: Calibration | None, settings: Settings, callback: Callback) -> Merged:
    """The sum at the parents' own strengths, which the stacks already have."""
    return Merged(dict(pairing.stacks), summary={"method": "direct"})
