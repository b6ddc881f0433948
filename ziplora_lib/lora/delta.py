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
        """ΔW in fp32, of `shape`. Learning never needs it; saving does, for a layer that also has a bias."""
        return (self.scale * (self.up.float() @ self.down.float().flatten(1))).reshape(self.shape)

    def fitted(self, shape: tuple[int, ...]) -> LowRankDelta:
        """The same ΔW for a weight of `shape`: 1x1 kernels come and go, and some kinds write a convolution's columns flat.

        Raises BadInput when the shapes do not mean the same layer.
        """
        if self.shape == shape:
            return self
        same_layer = self.shape[:2] == shape[:2] and all(d == 1 for d in (*self.shape[2:], *shape[2:]))
        flattened = self.down.ndim == 2 and self.shape == (shape[0], math.prod(shape[1:]))
        if same_layer or flattened:
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
        inner = (up.T @ up).double() * (down @ down.T).double()  # the product can leave fp32's range
        return abs(self.scale) * math.sqrt(max(float(inner.sum()), 0.0))

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
        """Factors of at most `rank`, and the share of ‖ΔW‖² that is lost; itself where it is small enough."""
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
        """Factors, and the share of ‖ΔW‖² that is lost: by SVD, at most `rank`; whole where None, exactly.

        Whole: an identity is one of the factors, so that the other is ΔW itself, to the bit.
        """
        if rank is not None and rank < min(self.shape[0], math.prod(self.shape[1:])):
            return _truncated(self.dense(), rank)
        weight = self.weight.flatten(1)
        out, columns = weight.shape
        if columns <= out:
            eye = torch.eye(columns, dtype=weight.dtype, device=weight.device)
            return LowRankDelta(weight, eye.reshape(columns, *self.shape[1:])), 0.0
        eye = torch.eye(out, dtype=weight.dtype, device=weight.device)
        return LowRankDelta(eye, weight.reshape(out, *self.shape[1:])), 0.0


Delta = LowRankDelta | DenseDelta

# singular values whose squares sum to less than this share are rounding, not ΔW
_ROUNDING = 1e-10


def _truncated(weight: Tensor, rank: int) -> tuple[LowRankDelta, float]:
    """The best factors of `rank` or less: what is zero but for rounding gets no rank of its own."""
    flat = weight.float().flatten(1)
    u, s, vh = _leading(flat, rank)
    energy = flat.square().sum().clamp_min(1e-38)
    left = 1 - s.square().cumsum(0) / energy
    r = min(rank, int((left > _ROUNDING).sum()) + 1)
    root = s[:r].sqrt()
    lost = max(0.0, float(1 - s[:r].double().square().sum() / energy.double())) if flat.any() else 0.0
    return LowRankDelta(u[:, :r] * root, (root[:, None] * vh[:r]).reshape(r, *weight.shape[1:])), lost


def _leading(flat: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triplets: exactly on small layers; on large ones by a range finder with power iterations.

    Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4: seconds instead of minutes for a layer of SDXL.
    """
    if min(flat.shape) <= 4 * rank or min(flat.shape) <= 256:
        return torch.linalg.svd(flat, full_matrices=False)
    # drawn on the CPU from its own seed: the same factors whatever was random before
    start = torch.randn(flat.shape[1], rank + 16, generator=torch.Generator().manual_seed(0)).to(flat.device)
    basis = torch.linalg.qr(flat @ start).Q
    for _ in range(4):
        basis = torch.linalg.qr(flat @ torch.linalg.qr(flat.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ flat, full_matrices=False)
    return basis @ u, s, vh
