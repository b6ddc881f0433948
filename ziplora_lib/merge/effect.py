"""What a merge did to its LoRAs in one layer, or in several as one: from factors, without a dense ΔW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.analysis import Overlap, Sparsity, mean_sparsity, overlap, sparsity

# a part of the parents' ‖ΔW‖² below which their sum is nothing but rounding: they cancel
_CANCELLED = 1e-6


@dataclass(frozen=True)
class Effect:
    """One layer. None: not known, for want of a parent, or, of an overlap, that no two LoRAs are in the layer.

    alone: ‖w_i ΔW_i‖ of each parent at its strength; halves: ‖ΔW_i'‖, what the merge made of each; plain: ‖Σ_i w_i ΔW_i‖;
    merged: ‖ΔW_m‖; moved: ‖ΔW_m − Σ_i w_i ΔW_i‖; before, after: how the parents and the halves meet, over all pairs;
    sparsities: of each parent and, last, of the merge.
    """

    columns: int
    alone: tuple[float | None, ...]
    halves: tuple[float, ...]
    plain: float | None
    merged: float
    moved: float | None
    before: Overlap | None
    after: Overlap | None
    sparsities: tuple[Sparsity | None, ...]


def effect(parents: Sequence[LowRankDelta | None], known: Sequence[bool], after: Stack) -> Effect:
    """The effect in one layer. parents: each one's ΔW at its strength, None where it has no such layer; known: False where
    it is not known whether it has; after: what the merge has, all of one shape (out, columns)."""
    flat = [None if delta is None else replace(delta, down=delta.down.flatten(1)) for delta in parents]
    total = after.total()
    grams = after.column_grams()
    plain = moved = before = None
    alone: list[float | None] = [
        None if not sure else 0.0 if delta is None else delta.norm() for delta, sure in zip(flat, known)
    ]
    if all(known):
        if any(delta is not None for delta in flat):
            stack = Stack.of(flat)
            before_grams = stack.column_grams()
            plain, before = _norm(before_grams), _overlap(before_grams, stack.ranks)
            moved = distance(total, stack.total())
        else:
            plain, moved = 0.0, total.norm()
        if plain**2 <= _CANCELLED * sum(norm**2 for norm in alone if norm is not None):
            plain = 0.0
    return Effect(
        columns=after.columns,
        alone=tuple(alone),
        halves=tuple(float(grams[i, i].double().sum().clamp_min(0).sqrt()) for i in range(len(parents))),
        plain=plain,
        merged=_norm(grams),
        moved=moved,
        before=before,
        after=_overlap(grams, after.ranks),
        sparsities=(*(None if delta is None else sparsity(delta) for delta in flat), sparsity(total)),
    )


def _norm(grams: torch.Tensor) -> float:
    """‖Σ_i ΔW_i‖ = (Σ_ik Σ_j ⟨ΔW_i[:,j], ΔW_k[:,j]⟩)^½"""
    return math.sqrt(max(float(grams.double().sum()), 0.0))


def _overlap(grams: torch.Tensor, ranks: Sequence[int]) -> Overlap | None:
    """Of all pairs of the LoRAs that are in the layer."""
    pairs = list(combinations([i for i, rank in enumerate(ranks) if rank], 2))
    return sum((overlap(grams, i, k) for i, k in pairs), Overlap()) if pairs else None


def distance(a: LowRankDelta, b: LowRankDelta) -> float:
    """‖ΔW_a − ΔW_b‖_F from the factors; in fp64, since what the two have in common cancels."""
    up = torch.cat([a.up.double() * a.scale, b.up.double() * -b.scale], dim=1)
    down = torch.cat([a.down.double().flatten(1), b.down.double().flatten(1)])
    return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))


@dataclass(frozen=True)
class Layers:
    """Several layers as one; every answer is over those of them where it is known, and None where it is in none."""

    effects: tuple[Effect, ...]

    @property
    def before(self) -> Overlap | None:
        return _added(effect.before for effect in self.effects)

    @property
    def after(self) -> Overlap | None:
        return _added(effect.after for effect in self.effects)

    @property
    def plain(self) -> float | None:
        """‖ΔW‖ of the parents' plain sum."""
        return _root(effect.plain for effect in self.effects)

    @property
    def merged(self) -> float | None:
        return _root(effect.merged for effect in self.effects)

    @property
    def change(self) -> float | None:
        """‖ΔW_m − ΔW_sum‖ / ‖ΔW_sum‖"""
        return self._ratio(lambda effect: effect.moved, lambda effect: effect.plain)

    def alone(self, i: int) -> float | None:
        """‖w ΔW‖ of parent i."""
        return _root(effect.alone[i] for effect in self.effects)

    def half(self, i: int) -> float | None:
        """‖ΔW‖ of what the merge made of parent i."""
        return _root(effect.halves[i] for effect in self.effects)

    def kept(self, i: int) -> float | None:
        """`half` / `alone`: how large parent i is in the merge, 1 as it went in."""
        return self._ratio(lambda effect: effect.halves[i], lambda effect: effect.alone[i])

    def sparsity(self, i: int) -> Sparsity | None:
        """Of parent i, or of the merge: -1."""
        return mean_sparsity((e.columns, e.sparsities[i]) for e in self.effects if e.sparsities[i] is not None)

    def _ratio(self, above: Callable[[Effect], float | None], below: Callable[[Effect], float | None]) -> float | None:
        """Of two norms, over the layers where both are known; None where the lower one is zero."""
        known = [effect for effect in self.effects if above(effect) is not None and below(effect) is not None]
        lower = _root(map(below, known))
        return _root(map(above, known)) / lower if lower else None


def _added(overlaps: Iterable[Overlap | None]) -> Overlap | None:
    known = [found for found in overlaps if found is not None]
    return sum(known, Overlap()) if known else None


def _root(norms: Iterable[float | None]) -> float | None:
    """The norm of several layers as one, from each one's."""
    known = [norm for norm in norms if norm is not None]
    return math.sqrt(sum(norm**2 for norm in known)) if known else None
