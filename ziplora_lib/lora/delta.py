"""What a LoRA adds to one layer: ΔW, as two small factors or dense, and what is asked of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ziplora_lib.errors import BadInput


@dataclass(frozen=True)
class LowRankDelta:
    """ΔW = scale · up @ down.

    up: (out, r); down: (r, in) for a linear layer, (r, in, kh, kw) for a convolution; scale: alpha / rank, times any
    strength. A column of ΔW is one input feature: in a convolution one of the in·kh·kw positions.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this adds to: (out, in…)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def dense(self) -> Tensor:
        """ΔW in fp32, of `shape`. For tests, small layers and inspection; a merge never calls it."""
        return (self.scale * (self.up.float() @ self.down.float().flatten(1))).reshape(self.shape)

    def fitted(self, shape: tuple[int, ...]) -> LowRankDelta:
        """The same ΔW for a weight of `shape`; only 1x1 kernels come and go, as files write them either way.

        Raises BadInput when the shapes do not mean the same layer.
        """
        if self.shape == shape:
            return self
        if self.shape[:2] == shape[:2] and all(d == 1 for d in (*self.shape[2:], *shape[2:])):
            return replace(self, down=self.down.reshape(self.rank, *shape[1:]))
        raise BadInput(f"made for a layer of shape {list(self.shape)}, but the model's has {list(shape)}")

    def scaled_columns(self, m: Tensor) -> LowRankDelta:
        """m ⊗ ΔW (Eq. 2): column j times m[j]. m: in…, as `down.shape[1:]`, or flat."""
        return replace(self, down=self.down * m.reshape(self.down.shape[1:]).to(self.down))

    def strength(self, w: float) -> LowRankDelta:
        return replace(self, scale=self.scale * w)

    def norm(self) -> float:
        """‖ΔW‖_F without forming ΔW: sqrt(tr(upᵀup · down downᵀ))."""
        up, down = self.up.float(), self.down.float().flatten(1)
        return abs(self.scale) * math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))

    def column_products(self, other: LowRankDelta) -> Tensor:
        """⟨ΔW[:,j], ΔW'[:,j]⟩ for every column j: (columns,), fp32, from the factors alone."""
        across = self.up.float().T @ other.up.float()
        return (
            self.scale * other.scale * (self.down.float().flatten(1) * (across @ other.down.float().flatten(1))).sum(0)
        )

    def column_cosine(self, other: LowRankDelta) -> Tensor:
        """The cosine of each pair of columns: (columns,), 0 where one of them is zero."""
        norms = (self.column_products(self) * other.column_products(other)).clamp_min(0).sqrt()
        return torch.where(norms > 0, self.column_products(other) / norms.clamp_min(1e-38), torch.zeros_like(norms))

    def low_rank(self, rank: int | None = None) -> tuple[LowRankDelta, float]:
        return (self, 0.0) if rank is None or rank >= self.rank else _truncated(self.dense(), rank)


@dataclass(frozen=True)
class DenseDelta:
    """ΔW of a kind that has no factors. weight: (out, in…)."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def dense(self) -> Tensor:
        return self.weight.float()

    def scaled_columns(self, m: Tensor) -> DenseDelta:
        return DenseDelta(self.weight * m.reshape(self.shape[1:]).to(self.weight))

    def strength(self, w: float) -> DenseDelta:
        return DenseDelta(self.weight * w)

    def norm(self) -> float:
        return float(self.weight.float().norm())

    def low_rank(self, rank: int | None = None) -> tuple[LowRankDelta, float]:
        """Factors by SVD, of `rank` (full where None), and the share of ‖ΔW‖² that is lost."""
        return _truncated(self.dense(), rank)


Delta = LowRankDelta | DenseDelta


def _truncated(weight: Tensor, rank: int | None) -> tuple[LowRankDelta, float]:
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    r = min(rank or len(s), len(s))
    root = s[:r].sqrt()
    lost = float((s[r:] ** 2).sum() / (s**2).sum().clamp_min(1e-38))
    return LowRankDelta(u[:, :r] * root, (root[:, None] * vh[:r]).reshape(r, *weight.shape[1:])), lost
