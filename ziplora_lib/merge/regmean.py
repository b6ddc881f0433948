"""RegMean (arXiv 2212.09849) in factors: the matrix that gives, on each LoRA's own inputs, closest to what that LoRA gives.

ΔW_m = (Σ_i ΔW_i E_i) (Σ_i E_i)⁻¹ minimises Σ_i E_i ‖ΔW x − ΔW_i x‖², E_i = E[x xᵀ] over LoRA i's own inputs. As
ΔW_i = up_i @ down_i, only `down` changes, and the ranks stay.
"""

from __future__ import annotations

import torch

from ziplora_lib.merge.judging import judged
from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.statistics import input_moments, ridge_solved

# Enough to invert and to hold the norm: at .001 ΔW_m outgrew the plain sum on the miniature. RegMean itself shrinks what is
# off E's diagonal instead.
RIDGE = 1e-2


def regmean(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """`down` (R, columns) of every learned layer: down_i E_i (Σ_k E_k + ρ)⁻¹, with the ridge ρ towards start · down_i.

    The ridge decides in directions that no input has, which are many in cross-attention, where a few prompts are all that
    is seen: there every LoRA counts with `start`, the plain sum by default. Raises as `input_moments` and
    `ridge_solved` do.
    """
    ridge = RIDGE if settings.ridge is None else settings.ridge
    downs = {}
    for key, moments in input_moments(pairing, calibration, settings, callback):
        stack = pairing.stacks[key]
        down = stack.down.flatten(1).to(moments.device)
        wanted = torch.cat([part @ e for part, e in zip(down.split(stack.ranks), moments)])
        solved = ridge_solved(moments.sum(0), wanted.T, ridge, settings.start * down.T)
        downs[key] = solved.T.reshape(stack.down.shape).cpu().contiguous()
    return judged("regmean", pairing, downs, calibration, settings)
