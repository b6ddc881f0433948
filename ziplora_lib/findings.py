"""What was found of a merge: the numbers of any layers by name, as sentences, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from ziplora_lib.lora.limit import NEGLIGIBLE
from ziplora_lib.merge.analysis import ELEMENT_ENERGIES, GROUPS, block_of, block_order, brief
from ziplora_lib.merge.effect import Effect, Layers

# what is measured, and what it says
KINDS = {
    "overlap before": "how much the LoRAs get in each other's way where they meet, as they went in: 0 not at all, 1 wholly",
    "overlap after": "the same for what the merge made of them; more of it is no fault, good merges often have more",
    "change": "how far the merge is from the plain sum, as a part of the plain sum's norm",
    "norm": "how large ‖ΔW‖ is",
    "kept": "how large a LoRA is in the merge: 1 as it went in",
    "sparsity": f"the share of the smallest elements that hold {ELEMENT_ENERGIES[-1]:.0%} of the energy together: "
    "the higher, the fewer elements do the work",
}
# a change below this one is the rounding of a saved file
ROUNDING = 0.002


@dataclass(frozen=True)
class Parent:
    """A LoRA that went in. strength: as it was merged at; baked: its strength after that, 1 if it was left as learned;
    problem: why it is not known any more, "" if it is."""

    name: str
    role: str
    strength: float
    baked: float
    sha256: str
    problem: str = ""

    @property
    def title(self) -> str:
        return f"{self.role} {self.name}"


@dataclass(frozen=True)
class Measure:
    """One number of any layers. kind: of KINDS; of: whose, "" for that of all."""

    kind: str
    of: str
    value: Callable[[Layers], float | None]

    @property
    def title(self) -> str:
        return f"{self.kind} of {self.of}" if self.of else self.kind


@dataclass(frozen=True)
class Findings:
    """What a merge did to its parents. layers: by layer key; warnings: what could not be told, in words."""

    name: str
    parents: list[Parent]
    layers: dict[str, Effect]
    warnings: list[str]

    @property
    def titles(self) -> list[str]:
        """The parents, told apart also where two have one name."""
        titles = [parent.title for parent in self.parents]
        return [t if titles.count(t) == 1 else f"{t} ({titles[:i].count(t) + 1})" for i, t in enumerate(titles)]

    @cached_property
    def measures(self) -> list[Measure]:
        """All that is known of any layers, in the order of KINDS."""
        own = list(enumerate(self.titles))
        return [
            Measure("overlap before", "", lambda layers: layers.before and layers.before.interference),
            Measure("overlap after", "", lambda layers: layers.after and layers.after.interference),
            Measure("change", "", lambda layers: layers.change),
            # a LoRA that is not there has no norm, rather than one of zero
            *(Measure("norm", title, lambda layers, i=i: layers.alone(i) or None) for i, title in own),
            *(Measure("norm", f"{title} in the merge", lambda layers, i=i: layers.half(i) or None) for i, title in own),
            Measure("norm", "plain sum", lambda layers: layers.plain),
            Measure("norm", "merge", lambda layers: layers.merged),
            *(Measure("kept", title, lambda layers, i=i: layers.kept(i)) for i, title in own),
            *(Measure("sparsity", title, lambda layers, i=i: _elements(layers, i)) for i, title in own),
            Measure("sparsity", "merge", lambda layers: _elements(layers, -1)),
        ]

    def values(self, layers: Layers) -> dict[str, float | None]:
        """Every measure of these layers, by its title, at six digits."""
        found = {measure.title: measure.value(layers) for measure in self.measures}
        return {title: None if value is None else brief(value) for title, value in found.items()}

    @cached_property
    def all(self) -> Layers:
        return Layers(tuple(self.layers.values()))

    @cached_property
    def cells(self) -> dict[tuple[str, str], Layers]:
        """The layers of each block and group."""
        return self._summed(block_of)

    @cached_property
    def blocks(self) -> dict[str, Layers]:
        """In the order in which a picture passes through them."""
        found = self._summed(lambda key: block_of(key)[0])
        return {block: found[block] for block in sorted(found, key=block_order)}

    @cached_property
    def groups(self) -> dict[str, Layers]:
        found = self._summed(lambda key: block_of(key)[1])
        return {group: found[group] for group in GROUPS if group in found}

    def _summed(self, name_of: Callable) -> dict:
        found = defaultdict(list)
        for key, one in self.layers.items():
            found[name_of(key)].append(one)
        return {name: Layers(tuple(effects)) for name, effects in found.items()}

    def most_changed(self, n: int = 10) -> list[str]:
        """The keys of the layers that changed most beside their plain sum, without those that are next to nothing."""
        every = (self.all.plain or 0.0) ** 2
        known = {key: Layers((one,)).change for key, one in self.layers.items() if _counts(one.plain, every)}
        return sorted((key for key in known if known[key] is not None), key=lambda key: -known[key])[:n]

    def public(self) -> dict:
        """As JSON."""
        cells = defaultdict(dict)
        for (block, group), layers in self.cells.items():
            cells[block][group] = self.values(layers)
        return {
            "lora": self.name,
            "summary": summary(self),
            "parents": [asdict(parent) for parent in self.parents],
            "warnings": self.warnings,
            "measures": {measure.title: KINDS[measure.kind] for measure in self.measures},
            "most_changed": self.most_changed(),
            "all": self.values(self.all),
            "blocks": {block: self.values(layers) for block, layers in self.blocks.items()},
            "groups": {group: self.values(layers) for group, layers in self.groups.items()},
            "cells": {block: cells[block] for block in self.blocks},
            "layers": {key: self._layer(key) | self.values(Layers((one,))) for key, one in self.layers.items()},
        }

    def _layer(self, key: str) -> dict:
        block, group = block_of(key)
        return {"block": block, "group": group, "columns": self.layers[key].columns}

    def csv(self) -> str:
        """A row for each layer; an empty field is not known."""
        rows = [{"layer": key} | self._layer(key) | self.values(Layers((one,))) for key, one in self.layers.items()]
        text = io.StringIO()
        header = ["layer", "block", "group", "columns", *(measure.title for measure in self.measures)]
        writer = csv.DictWriter(text, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _elements(layers: Layers, i: int) -> float | None:
    found = layers.sparsity(i)
    return found and found.elements[-1]


def _counts(plain: float | None, every: float) -> bool:
    """Whether a layer's or block's plain sum is known, and more than next to nothing beside that of all."""
    return plain is not None and plain**2 > NEGLIGIBLE * every


def summary(found: Findings) -> str:
    """What the numbers say, in a few sentences."""
    every = (found.all.plain or 0.0) ** 2
    changes = {b: layers.change for b, layers in found.blocks.items() if _counts(layers.plain, every)}
    said = []
    if found.all.change is None:
        said.append("How far the merge is from the plain sum of its LoRAs is not known.")
    elif found.all.change < ROUNDING:
        said.append("The merge is the plain sum of its LoRAs, but for rounding.")
    else:
        block = max(changes, key=lambda b: changes[b])
        said.append(
            f"The merge changed “{block}” most: there it is {changes[block]:.2f} times the plain sum's size away from it, "
            f"and {found.all.change:.2f} times over all layers."
        )
    kept = {title: found.all.kept(i) for i, title in enumerate(found.titles)}
    if told := [f"the {title} is {share:.2f} times" for title, share in kept.items() if share is not None]:
        said.append(f"In size, {_listed(told)} what went in.")
    return " ".join([*said, *_overlap_said(found)])


def _overlap_said(found: Findings) -> list[str]:
    who = "The two LoRAs" if len(found.parents) == 2 else "Its LoRAs"
    before, after = found.all.before, found.all.after
    shown = before or after
    if shown is None:
        return [f"{who} share no layer, so they cannot get in each other's way."]
    if not shown.crossed:
        return [f"{who} do not get in each other's way at all."]
    crossed = {b: (layers.before if before else layers.after) for b, layers in found.blocks.items()}
    crossed = {b: overlap.crossed for b, overlap in crossed.items() if overlap is not None}
    block = max(crossed, key=lambda b: crossed[b])
    where = (
        f"{who} get in each other's way mostly in “{block}” ({crossed[block] / shown.crossed:.0%} of all their overlap)"
    )
    if not before or not after:
        return [f"{where}; their overlap {'before was' if before else 'in the merge is'} {shown.interference:.2f}."]
    was, now = f"{before.interference:.2f}", f"{after.interference:.2f}"
    size = after.crossed / before.crossed
    if was == now:
        return [f"{where}; their overlap stayed at {was}, and in size it is {size:.2f} times what it was."]
    went = "rose" if after.interference > before.interference else "fell"
    text = f"{where}; their overlap {went} from {was} to {now}, and in size it is {size:.2f} times what it was"
    if went == "rose" and size < 1:
        text += ": what the merge took away lay mostly where they do not get in each other's way"
    return [f"{text}."]


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
