"""What LoRAs do to each other, layer by layer and block by block: from their factors, without a model.

Alignment, the mean |cos| of paired columns, is the paper's measure (arXiv 2311.13600); it is the same whatever ZipLoRA
scales the columns by, so what a merge did shows in the weighted overlap.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.reader import Lora
from ziplora_lib.lora.stack import Stack

# how a layer key begins -> its block; the numbers are those of block-weight tools (IN04 is "in 4")
_BLOCKS = {
    r"lora_te_": "te",
    r"lora_te1_": "te1",
    r"lora_te2_": "te2",
    r"lora_unet_(?:time_embed|label_emb)_": "time",
    r"lora_unet_input_blocks_(\d+)_": "in {}",
    r"lora_unet_middle_block_": "mid",
    r"lora_unet_output_blocks_(\d+)_": "out {}",
    r"lora_unet_out_": "end",
}
# what a layer key holds -> its group; the first that fits counts
_GROUPS = {
    r"_(?:norm\d?|layer_norm\d?|in_layers_0|out_layers_0|unet_out_0)$": "norm",
    r"_attn1_": "attn1",
    r"_attn2_": "attn2",
    r"_ff_net_": "ff",
    r"_proj_(?:in|out)$": "proj",
    r"_(?:emb_layers|time_embed|label_emb)_": "time",
    r"_(?:in_layers|out_layers|skip_connection)": "resnet",
    r"_0_op$|_[12]_conv$": "sampler",
    r"_(?:input_blocks_0_0|unet_out_2)$": "conv",
    r"_self_attn_": "attn",
    r"_mlp_": "mlp",
    r"_embedding$": "embedding",
    r"_text_projection$": "projection",
}
# in the order that tables have them
GROUPS = (*_GROUPS.values(), "other")
_ORDER = ("te", "te1", "te2", "time", "in", "mid", "out", "end", "other")

# sparsity: the energy that the largest columns hold together, and that which the smallest elements do
COLUMN_ENERGIES = (0.5, 0.8, 0.95)
ELEMENT_ENERGIES = (0.01, 0.1)
# the elements of a layer are counted in whole rows, about so many elements but so many rows at least: sorting all of
# SDXL's takes minutes
_ELEMENTS, _ROWS = 2**16, 16


def block_of(key: str) -> tuple[str, str]:
    """A layer key's block ("te1", "time", "in 4", "mid", "out 0", …) and the group of layers that it belongs to."""
    for pattern, block in _BLOCKS.items():
        if match := re.match(pattern, key):
            group = next((group for inside, group in _GROUPS.items() if re.search(inside, key)), "other")
            return block.format(*match.groups()), group
    return "other", "other"


def block_order(block: str) -> tuple[int, int]:
    """Sorts blocks as a picture passes through them: text encoders, time, in, mid, out."""
    word, _, number = block.partition(" ")
    return _ORDER.index(word), int(number or 0)


def norms_by_block(lora: Lora) -> dict[str, float]:
    """‖ΔW‖_F of each block, in order; layers that need the model are left out."""
    squares: dict[str, float] = defaultdict(float)
    for key, delta in lora.deltas.items():
        squares[block_of(key)[0]] += delta.norm() ** 2
    return {block: math.sqrt(squares[block]) for block in sorted(squares, key=block_order)}


def stacked(loras: Sequence[Lora], key: str) -> Stack:
    """A layer's deltas, one after the other. Raises BadInput, with file and key, where they do not fit each other."""
    found = [lora.deltas.get(key) for lora in loras]
    # the longest shape: a kernel may be written flat, but never the other way round
    shape = max((delta.shape for delta in found if delta is not None), key=len)
    fitted = []
    for lora, delta in zip(loras, found):
        try:
            fitted.append(None if delta is None else delta.fitted(shape))
        except BadInput as error:
            raise BadInput(
                f"made for a layer of shape {list(delta.shape)}, but another LoRA's is {list(shape)}",
                file=lora.path.name,
                key=key,
                remedy="These LoRAs belong to different base models",
            ) from error
    return Stack.of(fitted)


@dataclass(frozen=True)
class Overlap:
    """How two LoRAs meet, in one layer or in the sum of several.

    columns: how many there are; cosines: Σ_j |cos(ΔW_c[:,j], ΔW_s[:,j])|, 0 for a column that is zero; inner:
    Σ_j ⟨ΔW_c[:,j], ΔW_s[:,j]⟩ = ⟨ΔW_c, ΔW_s⟩; crossed: Σ_j |⟨ΔW_c[:,j], ΔW_s[:,j]⟩|; lengths: Σ_j ‖ΔW_c[:,j]‖ ‖ΔW_s[:,j]‖;
    energy_c, energy_s: ‖ΔW_c‖², ‖ΔW_s‖².
    """

    columns: int = 0
    cosines: float = 0.0
    inner: float = 0.0
    crossed: float = 0.0
    lengths: float = 0.0
    energy_c: float = 0.0
    energy_s: float = 0.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(*(a + b for a, b in zip(astuple(self), astuple(other))))

    @property
    def column_cosine(self) -> float:
        """Alignment: the mean |cos| of paired columns."""
        return self.cosines / max(self.columns, 1)

    @property
    def interference(self) -> float:
        """Σ_j |⟨ΔW_c[:,j], ΔW_s[:,j]⟩| / Σ_j ‖ΔW_c[:,j]‖ ‖ΔW_s[:,j]‖: the column cosine, weighted by size."""
        return self.crossed / self.lengths if self.lengths else 0.0

    @property
    def cosine(self) -> float:
        """⟨ΔW_c, ΔW_s⟩ / (‖ΔW_c‖ ‖ΔW_s‖)"""
        both = math.sqrt(self.energy_c * self.energy_s)
        return self.inner / both if both else 0.0


def overlap(grams: Tensor, c: int = 0, s: int = 1) -> Overlap:
    """How LoRAs c and s meet in a layer. grams: (P, P, columns), as `Stack.column_grams`."""
    inner = grams[c, s].double()
    energies = [grams[i, i].double().clamp_min(0) for i in (c, s)]
    lengths = (energies[0] * energies[1]).sqrt()
    cosines = torch.where(lengths > 0, inner.abs() / lengths.clamp_min(1e-300), 0.0).clamp_max(1)
    sums = (cosines, inner, inner.abs(), lengths, *energies)
    return Overlap(len(inner), *(float(values.sum()) for values in sums))


def weighted_overlap(before: Mapping[str, Stack], after: Mapping[str, Stack]) -> dict[str, float]:
    """Σ_j |⟨ΔW_c'[:,j], ΔW_s'[:,j]⟩| / Σ_j |⟨ΔW_c[:,j], ΔW_s[:,j]⟩| of each block and of "all", over all pairs of LoRAs.

    after: what a merge made of the layers, so ΔW' = m ⊗ ΔW gives Σ_j |m_c[j] m_s[j] ⟨…⟩| over its value at m = 1.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for key in before.keys() & after.keys():
        crossed = torch.stack([_crossed(before[key]), _crossed(after[key])])
        sums[block_of(key)[0]] += crossed
        sums["all"] += crossed
    blocks = sorted(sums.keys() - {"all"}, key=block_order)
    return {b: float(sums[b][1] / sums[b][0]) for b in (*blocks, "all") if b in sums and sums[b][0] > 0}


def _crossed(stack: Stack) -> Tensor:
    """Σ_j |⟨ΔW_i[:,j], ΔW_k[:,j]⟩| over all pairs i < k."""
    return stack.column_grams().double().abs().sum(-1).triu(diagonal=1).sum()


@dataclass(frozen=True)
class Sparsity:
    """How few columns and elements hold ΔW.

    columns: the share of columns, largest first, with each of COLUMN_ENERGIES; elements: the share of elements, smallest
    first, with each of ELEMENT_ENERGIES, counted in `rows` of the layer's `out` rows.
    """

    columns: tuple[float, ...]
    elements: tuple[float, ...]
    rows: int
    out: int


def sparsity(delta: LowRankDelta) -> Sparsity | None:
    """A layer's sparsity; None for a layer that is zero. No more of a large ΔW is formed than the rows that are counted."""
    energies = delta.column_products(delta).clamp_min(0)
    out, columns = delta.shape[0], len(energies)
    rows = min(out, max(_ROWS, _ELEMENTS // columns))
    chosen = torch.arange(rows) * out // rows
    elements = (delta.up.float()[chosen] @ delta.down.float().flatten(1)).square().flatten()
    if not energies.any() or not elements.any():
        return None
    return Sparsity(
        shares_of_largest(energies, COLUMN_ENERGIES),
        shares_of_smallest(elements, ELEMENT_ENERGIES),
        rows,
        out,
    )


def shares_of_largest(energies: Tensor, parts: Sequence[float]) -> tuple[float, ...]:
    """For each part: the share of the values, largest first, that it takes to hold that part of their sum."""
    held = energies.sort(descending=True).values.double().cumsum(0)
    return tuple((int((held < part * held[-1] * (1 - 1e-12)).sum()) + 1) / len(held) for part in parts)


def shares_of_smallest(energies: Tensor, parts: Sequence[float]) -> tuple[float, ...]:
    """For each part: the share of the values, smallest first, that hold no more than that part of their sum."""
    held = energies.sort().values.double().cumsum(0)
    return tuple(int((held <= part * held[-1] * (1 + 1e-12)).sum()) / len(held) for part in parts)


def mean_sparsity(layers: Iterable[tuple[int, Sparsity]]) -> Sparsity | None:
    """The mean over layers, each counted as often as it has columns; rows and their total are added up."""
    layers = list(layers)
    if not layers:
        return None
    counts, found = zip(*layers)

    def mean(values: Iterable[Sequence[float]]) -> tuple[float, ...]:
        return tuple(sum(n * v for n, v in zip(counts, row)) / sum(counts) for row in zip(*values))

    return Sparsity(
        mean(layer.columns for layer in found),
        mean(layer.elements for layer in found),
        sum(layer.rows for layer in found),
        sum(layer.out for layer in found),
    )


def brief(value: float) -> float:
    """Six digits are more than fp16 factors have."""
    return float(f"{value:.6g}")
