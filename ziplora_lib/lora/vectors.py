"""What LoRAs add to a layer's vectors, which have no columns: the weight and bias of a norm, the bias of any layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora_lib.errors import BadInput


@dataclass(frozen=True)
class Vectors:
    """weight, bias: (P, n), a row for each LoRA, what it adds; None where no LoRA has any. Only norms have a weight here."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, parts: Sequence[Vectors | None], strengths: Sequence[float]) -> Vectors:
        """One layer's vectors of several LoRAs, in fp32, strengths included; zeros where a LoRA has none."""

        def rows(found: list[Tensor | None]) -> Tensor | None:
            some = next((t for t in found if t is not None), None)
            if some is None:
                return None
            if any(t is not None and t.shape[-1] != some.shape[-1] for t in found):
                raise BadInput(
                    "the LoRAs change a norm or bias of different sizes",
                    remedy="These LoRAs belong to different base models",
                )
            none = torch.zeros(some.shape[-1])
            return torch.stack([none if t is None else t.float().sum(0) * w for t, w in zip(found, strengths)])

        return cls(rows([p and p.weight for p in parts]), rows([p and p.bias for p in parts]))

    @property
    def size(self) -> int:
        """n, the layer's outputs or channels."""
        return next(t for t in (self.weight, self.bias) if t is not None).shape[-1]

    def scaled(self, strengths: Sequence[float]) -> Vectors:
        """Every LoRA's rows at another strength."""
        w = torch.tensor(list(strengths), dtype=torch.float32)[:, None]
        return Vectors(*(None if t is None else t * w for t in (self.weight, self.bias)))

    def row(self, i: int) -> Vectors | None:
        """What LoRA i adds, as (1, n); None where that is nothing."""
        weight, bias = (None if t is None else t[i : i + 1] for t in (self.weight, self.bias))
        return Vectors(weight, bias) if any(t is not None and t.any() for t in (weight, bias)) else None

    def to(self, device: torch.device) -> Vectors:
        return Vectors(*(None if t is None else t.to(device) for t in (self.weight, self.bias)))
