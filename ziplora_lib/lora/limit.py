"""A smaller rank for a merged LoRA, each parent's half by its own singular values, and what that loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.stack import Stack

# a layer's part of all layers' ‖ΔW‖² below which it does not count as the one that lost most
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Loss:
    """What of ‖ΔW‖² was lost, as shares: over all layers, and in the layer that lost most."""

    share: float
    worst: float
    worst_key: str
    layers: int

    @classmethod
    def of(cls, lost: Mapping[str, float], energies: Mapping[str, float]) -> Loss:
        """lost: the share that each layer lost; energies: its ‖ΔW‖². The share of a layer next to zero means nothing."""
        total = sum(energies[key] for key in lost)
        telling = [key for key in lost if energies[key] > NEGLIGIBLE * total] or list(lost)
        worst = max(telling, key=lambda key: lost[key])
        share = sum(lost[key] * energies[key] for key in lost) / max(total, 1e-38)
        return cls(share, lost[worst], worst, len(lost))

    def __str__(self) -> str:
        return f"{self.share:.2%} of their squared norm, at most {self.worst:.2%} (in {self.worst_key})"


def limit(
    stacks: Mapping[str, Stack], max_rank: int | None = None, keep: float = 1.0
) -> tuple[dict[str, Stack], Loss | None]:
    """Every layer at no more than max_rank, or at as many ranks as keep the share `keep` of its halves' squared norms.

    The halves stay apart, so that strengths can be baked later; their singular values compete for the ranks of a layer.
    The loss is that of their sum, exactly; None where no layer is smaller than before.
    """
    if max_rank is None and keep >= 1:  # not even a decomposition, which would round
        return dict(stacks), None
    smaller, lost, energies = {}, {}, {}
    for key, stack in stacks.items():
        smaller[key] = _limited(stack, max_rank, keep)
        if sum(smaller[key].ranks) < sum(stack.ranks):
            energies[key] = stack.total().norm() ** 2
            lost[key] = _difference(stack, smaller[key]).norm() ** 2 / max(energies[key], 1e-38)
    return smaller, Loss.of(lost, energies) if lost else None


def _limited(stack: Stack, max_rank: int | None, keep: float) -> Stack:
    halves = [None if part is None else _singular(part) for part in map(stack.part, range(len(stack.ranks)))]
    values = torch.cat([half[1].square() for half in halves if half is not None])
    order = values.sort(descending=True, stable=True)
    wanted = len(values)
    if keep < 1:  # the smallest number of ranks whose squares reach the share
        wanted = int((order.values.cumsum(0) < values.sum() * keep * (1 - 1e-6)).sum()) + 1
    wanted = min(wanted, max_rank or wanted)
    # a half can have more ranks than its layer, of which the surplus is nothing
    if wanted >= len(values) and sum(stack.ranks) <= (max_rank or sum(stack.ranks)):
        return stack
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order.indices[:wanted].cpu()] = True
    ups, downs, ranks, start = [], [], [], 0
    for half in halves:
        if half is None:
            ranks.append(0)
            continue
        u, s, vh = half
        own = chosen[start : start + len(s)]
        start += len(s)
        root = s[own].sqrt()
        ups.append(u[:, own] * root)
        downs.append(root[:, None] * vh[own])
        ranks.append(int(own.sum()))
    return replace(
        stack, up=torch.cat(ups, dim=1), down=torch.cat(downs).reshape(-1, *stack.down.shape[1:]), ranks=tuple(ranks)
    )


def _singular(delta: LowRankDelta) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of up @ down from the factors: (out, r), (r,), (r, columns)."""
    q_up, r_up = torch.linalg.qr(delta.up.float() * delta.scale)
    q_down, r_down = torch.linalg.qr(delta.down.float().flatten(1).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def _difference(a: Stack, b: Stack) -> LowRankDelta:
    return LowRankDelta(torch.cat([a.up, -b.up], dim=1), torch.cat([a.down, b.down]))
