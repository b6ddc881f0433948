"""ZipLoRA's coefficients in closed form: least squares layer by layer, instead of gradients through the whole model.

Minimises Σ_i E_i ‖ΔW_m x − ΔW_i x‖² / E_i ‖ΔW_i x‖² + ridge, ΔW_m = Σ_k m_k ⊗ ΔW_k (Eq. 2 of arXiv 2311.13600), over the
inputs x of LoRA i alone. Not ZipLoRA's loss: what one layer's error does to the picture is not known to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.judging import judged
from ziplora_lib.merge.method import Calibration, Callback, Merged, Settings
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.statistics import input_moments, ridge_solved

# .001 was unstable, .1 to 1 good
RIDGE = 0.3
# a LoRA with less than this share of the strongest one's output has none in this layer
SILENT = 1e-6


def closed_form(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """m (P, columns) of every learned layer, folded into `down`. Raises as `input_moments` and `ridge_solved` do."""
    ridge = RIDGE if settings.ridge is None else settings.ridge
    coefficients, downs = {}, {}
    for key, moments in input_moments(pairing, calibration, settings, callback):
        m = least_squares(pairing.stacks[key], moments, ridge, settings.start).cpu()
        coefficients[key], downs[key] = m, pairing.stacks[key].folded_down(m)
    merged = judged("closed-form", pairing, downs, calibration, settings)
    merged.coefficients.update(coefficients)
    return merged


def least_squares(stack: Stack, moments: Tensor, ridge: float, start: float) -> Tensor:
    """One layer's coefficients; `start` for a LoRA that lacks it. moments: (P, columns, columns) E_i[x xᵀ] -> (P, columns).

    ΔW_m x = A diag(m) [x; …; x] with A = [ΔW_1 … ΔW_P], so the Hessian is (AᵀA) ∘ Σ_i E_i / e_i, in blocks, with the
    outputs' energies e_i = E_i ‖ΔW_i x‖², and the right side has Σ_i ((AᵀA) ∘ E_i / e_i), of column block i.
    """
    m = torch.full((len(moments), stack.columns), start, device=moments.device)
    present = [i for i, rank in enumerate(stack.ranks) if rank]
    n, columns = len(present), stack.columns
    up, down = (t.to(moments.device) for t in (stack.up, stack.down.flatten(1)))
    blocks = torch.block_diag(*down.split([stack.ranks[i] for i in present]))  # (R, n · columns)
    inner = (blocks.T @ ((up.T @ up) @ blocks)).reshape(n, columns, n, columns)
    energies = moments.new_zeros(len(moments))
    for k, i in enumerate(present):
        energies[i] = (inner[k, :, k] * moments[i]).sum()
    heard = energies > SILENT * energies.max()
    if not heard.any():
        return m
    # a LoRA without output here has no error to be measured by: it counts like the others on average
    weighted = moments / torch.where(heard, energies, energies[heard].mean())[:, None, None]
    hessian = (inner * weighted.sum(0)[:, None]).reshape(n * columns, -1)
    right = sum((inner[:, :, k] * weighted[i]).sum(-1) for k, i in enumerate(present)).reshape(-1, 1)
    m[present] = ridge_solved(hessian, right, ridge, torch.full_like(right, start)).to(m.device).reshape(n, columns)
    return m
