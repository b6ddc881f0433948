"""SSR-Merge (arXiv 2606.10617): least squares among the ranks, so that on LoRA i's own inputs only its own ranks speak.

Z = down @ x, G = Σ E[Z Zᵀ], Q = Σ_i E_i[Z_own Zᵀ] with Z_own the ranks of LoRA i alone: ΔW_m = up Q G⁻¹ down, which
minimises Σ_i E_i ‖K Z − Z_own‖² over K = Q G⁻¹.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ziplora_lib.merge.judging import judged
from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.statistics import rank_moments, ridge_solved

# just enough to invert
RIDGE = 1e-3


def ssr(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """`down` becomes K down; `up` stays. Raises as `solved` does.

    The paper puts K into `up`. The same ΔW_m, but so every LoRA keeps its own `up`, and with it its half of the merge.
    """
    downs = solved(pairing, calibration, settings, settings.start, callback)
    return judged("ssr", pairing, downs, calibration, settings)


def solved(
    pairing: Pairing, calibration: Calibration, settings: Settings, start: float, callback: Callback
) -> dict[str, Tensor]:
    """K down of every learned layer, K = (Q + ρ start)(G + ρ)⁻¹ (R, R), ρ the ridge.

    Raises as `rank_moments` and `ridge_solved` do.
    """
    ridge = RIDGE if settings.ridge is None else settings.ridge
    downs = {}
    for key, moments in rank_moments(pairing, calibration, settings, callback):
        stack = pairing.stacks[key]
        own = stack.per_rank(torch.eye(pairing.parents)).to(moments.device)  # (P, R): whose ranks
        q = (own[:, :, None] * moments).sum(0)
        k = ridge_solved(moments.sum(0), q.T, ridge, start * torch.eye(len(q), device=q.device)).T
        downs[key] = (k.cpu() @ stack.down.flatten(1)).reshape(stack.down.shape)
    return downs
