"""The factors of several LoRAs on one layer, one after the other: a sum of LoRAs is again a LoRA, exactly.

ΔW_m = Σ_i m_i ⊗ ΔW_i (Eq. 2 for two) = [up_1, up_2, …] @ [down_1·diag(m_1); down_2·diag(m_2); …]: columns of ΔW are
columns of `down`, so coefficients fold into `down` and no dense ΔW is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ziplora_lib.lora.delta import LowRankDelta


@dataclass(frozen=True)
class Stack:
    """up: (out, R); down: (R, in…); ranks: how many of the R belong to each LoRA, in order (0: it has no such layer)."""

    up: Tensor
    down: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, deltas: Sequence[LowRankDelta | None]) -> Stack:
        """Stacks one layer's deltas, all of one shape, in fp32; their scales go into the factors."""
        present = [d for d in deltas if d is not None]
        balanced = [_balanced(d) for d in present]
        return cls(
            torch.cat([up for up, _ in balanced], dim=1),
            torch.cat([down for _, down in balanced], dim=0),
            tuple(0 if d is None else d.rank for d in deltas),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def columns(self) -> int:
        """How many input features ΔW has: in, or in·kh·kw."""
        return self.down[0].numel()

    def part(self, i: int) -> LowRankDelta | None:
        """ΔW_i, or None where LoRA i has no such layer."""
        if not self.ranks[i]:
            return None
        start = sum(self.ranks[:i])
        return LowRankDelta(self.up[:, start : start + self.ranks[i]], self.down[start : start + self.ranks[i]])

    def per_rank(self, values: Tensor) -> Tensor:
        """One value a LoRA, repeated over its ranks. values: (…, P) -> (…, R)."""
        # not repeat_interleave: it would wait for the GPU in every layer
        parts = [values[..., i : i + 1].expand(*values.shape[:-1], r) for i, r in enumerate(self.ranks)]
        return torch.cat(parts, dim=-1)

    def folded_down(self, m: Tensor) -> Tensor:
        """`down` with the coefficients m (P, columns) folded in; differentiable in m. -> (R, in…)"""
        rows = torch.cat([m[i].expand(r, -1) for i, r in enumerate(self.ranks) if r])
        return (self.down.to(m.dtype).flatten(1) * rows).reshape(self.down.shape)

    def merged(self, m: Tensor | Sequence[float]) -> Stack:
        """m ⊗ ΔW of every LoRA. m: (P, columns), or one number a LoRA."""
        m = torch.as_tensor(m, dtype=torch.float32)
        m = m[:, None].expand(-1, self.columns) if m.ndim == 1 else m.detach().cpu().float()
        return replace(self, down=self.folded_down(m).contiguous())

    def total(self) -> LowRankDelta:
        """The sum of all LoRAs on this layer."""
        return LowRankDelta(self.up, self.down)

    def column_grams(self) -> Tensor:
        """⟨ΔW_i[:,j], ΔW_k[:,j]⟩ for all LoRAs i, k and columns j: (P, P, columns), fp32."""
        p = len(self.ranks)
        grams = torch.zeros(p, p, self.columns)
        parts = [self.part(i) for i in range(p)]
        for i, a in enumerate(parts):
            for k, b in enumerate(parts[: i + 1]):
                if a is not None and b is not None:
                    grams[i, k] = grams[k, i] = a.column_products(b)
        return grams


def _balanced(delta: LowRankDelta) -> tuple[Tensor, Tensor]:
    """The factors with the scale inside, each rank's two halves of like size, so that fp16 rounds neither away.

    The shift is a power of two and the product stays the same to the last bit of fp32.
    """
    up, down = delta.up.float() * delta.scale, delta.down.float()
    size_up, size_down = up.abs().amax(0), down.flatten(1).abs().amax(1)
    usable = (size_up > 0) & (size_down > 0)
    shift = torch.where(usable, (size_down / size_up.clamp_min(1e-30)).sqrt().clamp(2**-24, 2**24), torch.ones(()))
    shift = torch.exp2(shift.log2().round())
    return up * shift, down / shift.reshape(-1, *[1] * (down.ndim - 1))
