"""The loss of ZipLoRA: Eq. 3 of arXiv 2311.13600 and its parts, each in the forms that were tried.

Eq. 3: ‖(D⊕L_m)(x_c,p_c) − (D⊕L_c)(x_c,p_c)‖ + ‖(D⊕L_m)(x_s,p_s) − (D⊕L_s)(x_s,p_s)‖ + λ Σ_i |m_c^(i)·m_s^(i)|.
How each term is reduced matters more than λ: at SDXL's size the printed product, summed, has hundreds of times the
gradient of the data, and walks every coefficient to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora_lib.merge.pairing import uncancelled


def relative_error(prediction: Tensor, target: Tensor, bare: Tensor) -> Tensor:
    """‖D_m − D_i‖² / ‖D_i − D_0‖² of each sample: 0 as the LoRA alone, 1 as bad as no LoRA. (B, …) -> (B,), fp32.

    A LoRA that does next to nothing on a sample must not rule the loss, so the divisor is at least 1e-6 ‖D_i‖².
    """
    error = (prediction.float() - target.float()).flatten(1).square().sum(1)
    effect = (target.float() - bare.float()).flatten(1).square().sum(1)
    return error / torch.maximum(effect, 1e-6 * target.float().flatten(1).square().sum(1)).clamp_min(1e-30)


def l2_error(prediction: Tensor, target: Tensor, bare: Tensor | None) -> Tensor:
    """‖D_m − D_i‖₂ of each sample, not squared: Eq. 3 as printed. (B, …) -> (B,), fp32."""
    square = (prediction.float() - target.float()).flatten(1).square().sum(1)
    return square.clamp_min(1e-12).sqrt()


@dataclass(frozen=True)
class Columns:
    """What the penalties know of the learned layers, all columns in one row.

    grams: (P, P, M) inner products of the LoRAs' columns; sizes: columns a layer, in order, summing to M; present: (P, M),
    whether a LoRA has that layer at all.
    """

    grams: Tensor
    sizes: list[int]
    present: Tensor

    def own(self, m: Tensor, i: int) -> Tensor:
        """LoRA i's coefficients of the layers that it has. m: (P, M)"""
        return m[i][self.present[i]]

    def mean_abs(self, m: Tensor) -> list[float]:
        """Mean |m| of every LoRA. m: (P, M)"""
        return ((m.abs() * self.present).sum(1) / self.present.sum(1).clamp_min(1)).tolist()


def overlap(m: Tensor, columns: Columns) -> Tensor:
    """Σ_j |m_c[j] m_s[j] ⟨ΔW_c[:,j], ΔW_s[:,j]⟩| over its value at m = 1, over all pairs of LoRAs. m: (P, M) -> ()"""
    inner = columns.grams.abs()
    above = torch.triu(torch.ones(len(m), len(m), device=m.device), diagonal=1)[:, :, None]
    weighted = ((m[:, None] * m[None]).abs() * inner * above).sum()
    return weighted / (inner * above).sum().clamp_min(1e-30)


def cosine(m: Tensor, columns: Columns) -> Tensor:
    """Σ_layers |cos(m_c, m_s)|, over all pairs of LoRAs: the paper's prose, and its stopping rule. m: (P, M) -> ()"""
    m = m * columns.present
    parts = [torch.nn.functional.normalize(part, dim=1) for part in m.split(columns.sizes, dim=1)]
    return sum((part @ part.T).triu(diagonal=1).abs().sum() for part in parts)


def product(m: Tensor, columns: Columns) -> Tensor:
    """Σ_layers Σ_j |m_c[j] m_s[j]|, over all pairs of LoRAs: Eq. 3's last term. m: (P, M) -> ()"""
    m = m * columns.present
    return sum((m[i] * m[k]).abs().sum() for i in range(len(m)) for k in range(i))


def retained_energy(m: Tensor, columns: Columns) -> float:
    """‖ΔW_m‖ / ‖ΔW_c + ΔW_s‖ over the learned layers; see `uncancelled`. m: (P, M)"""
    kept = float(torch.einsum("im,km,ikm->", m, m, columns.grams))
    return math.sqrt(max(0.0, kept) / uncancelled(columns.grams))


@dataclass(frozen=True)
class Objective:
    """One form of the loss, with what belongs to it: λ, the coefficients' start, the guidance under which it compares.

    warm_start: whether the coefficients are those of what SSR-Merge makes of the LoRAs, rather than of the LoRAs.
    """

    error: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    penalty: Callable[[Tensor, Columns], Tensor]
    lam: float
    start: float
    guidance: float = 1.0
    warm_start: bool = False

    @property
    def against_bare(self) -> bool:
        """Whether the error asks what the bare model predicts."""
        return self.error is not l2_error


OBJECTIVES = {
    # the row "ZipLoRA, default" of benchmarks/results/quality-main.json; how it was chosen: README
    "guided": Objective(l2_error, overlap, lam=0.0, start=1.0, guidance=3.0, warm_start=True),
    # the paper's settings, for comparison
    "paper": Objective(l2_error, cosine, lam=0.01, start=1.0),
    "paper-literal": Objective(l2_error, product, lam=0.01, start=1.0),
}
