"""The kinds of LoRA: which tensors make a layer of each, and its factors where it is low rank by nature.

Names and formulas are those of the tools that write them: kohya-ss (LoRA), LyCORIS (LoCon, LoHa, LoKr, GLoRA, (IA)³, OFT,
BOFT, full, norms; docs/Algo-Details.md there) and DoRA (arXiv 2402.09353). A kind whose ΔW depends on the model's own
weight, or that is of full rank, is left to the host, which asks the library that applies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplora_lib.lora.delta import DenseDelta, LowRankDelta

Parts = Mapping[str, Tensor]

# the values, and the outputs or columns, of a layer that is larger than any model's: the largest that SDXL has are its table
# of tokens, 49408 x 1280, and a convolution with 23040 columns
LARGEST, LONGEST = 2**26, 2**17

# the parts that make a layer of each kind, as LyCORIS and the WebUI name them; the first that is there tells the kind
KINDS: dict[str, tuple[str, ...]] = {
    "LoRA": ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "(IA)³": ("on_input", "weight"),
    "OFT": ("oft_blocks", "oft_diag", "rescale"),
    "full": ("diff",),
    "norm": ("w_norm", "b_norm"),
    "bias": ("diff_b", "lora_B.bias"),
}
# how many dimensions a part has, where another number of them would mean another layer or none
DIMENSIONS: dict[str, tuple[int, ...]] = {
    **{f"{kind}_w{n}_{half}": (2,) for kind in ("hada", "lokr") for n in (1, 2) for half in "ab"},
    **dict.fromkeys(("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"), (4,)),
    "lokr_w1": (2,),
    "lokr_w2": (2, 4),
    "diff": (2, 4),
}
# parts that any kind may have beside its own
MODIFIERS = ("alpha", "scale", "dora_scale")

# what must be there for a layer to be whole: one of each group
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "LoRA": (("lora_up.weight",), ("lora_down.weight",)),
    "LoHa": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "LoKr": (
        ("lokr_w1", "lokr_w1_a"),
        ("lokr_w1", "lokr_w1_b"),
        ("lokr_w2", "lokr_w2_a"),
        ("lokr_w2", "lokr_w2_b"),
    ),
    "GLoRA": (("a1.weight",), ("a2.weight",), ("b1.weight",), ("b2.weight",)),
    "(IA)³": (("weight",), ("on_input",)),
    "OFT": (("oft_blocks", "oft_diag"),),
}


@dataclass(frozen=True)
class DenseLayer:
    """A layer whose ΔW the host works out: from `parts`, named as the libraries name them, and the model's weight.

    exact_rank: the rank that ΔW has by nature, where it has one.
    """

    kind: str
    parts: Parts
    exact_rank: int | None = None

    @property
    def extent(self) -> tuple[int, int] | None:
        """(outputs, columns) of the layer that it is for, where its parts tell."""
        return extent(self.kind, self.parts)


def kind_of(parts: Parts) -> str | None:
    """The kind of a layer that has these parts; None where no kind has them."""
    kind = next((kind for kind, own in KINDS.items() if any(part in parts for part in own)), None)
    if kind == "OFT" and "oft_blocks" in parts and parts["oft_blocks"].ndim == 4:
        kind = "BOFT"
    return f"DoRA of {kind}" if kind is not None and "dora_scale" in parts else kind


def missing(kind: str, parts: Parts) -> str | None:
    """The first part without which a layer of this kind is not whole; None if it is."""
    needed = NEEDED.get(kind.removeprefix("DoRA of ").replace("BOFT", "OFT"), ())
    return next((group[-1] for group in needed if not any(part in parts for part in group)), None)


def extent(kind: str, parts: Parts) -> tuple[int, int] | None:
    """(outputs, columns) of the layer that the parts are for, from their shapes; None for a kind whose parts do not tell.

    Raises RuntimeError, ValueError, KeyError or IndexError for parts that are none of the kind, as all below do.
    """
    kind = kind.removeprefix("DoRA of ")
    if kind == "LoRA":
        up, down, mid = (parts.get(f"lora_{name}.weight") for name in ("up", "down", "mid"))
        return up.shape[0], down.shape[1:].numel() * (1 if mid is None else mid.shape[2:].numel())
    if kind == "LoHa":
        return _extent(parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1"))
    if kind == "LoKr":
        halves = [
            _extent(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}"))
            if parts.get(f"lokr_w{n}") is None
            else (parts[f"lokr_w{n}"].shape[0], parts[f"lokr_w{n}"].shape[1:].numel())
            for n in (1, 2)
        ]
        return halves[0][0] * halves[1][0], halves[0][1] * halves[1][1]
    if kind == "full":
        return parts["diff"].shape[0], parts["diff"].shape[1:].numel()
    return None


def _extent(a: Tensor, b: Tensor, t: Tensor | None) -> tuple[int, int]:
    if t is None:
        return a.shape[0], b.shape[1:].numel()
    return a.shape[1], b.shape[1:].numel() * t.shape[2:].numel()


def base_factors(kind: str, parts: Parts) -> LowRankDelta | None:
    """ΔW's factors, of the parts alone, without DoRA's renormalisation; None for a kind that has none.

    The part `scale` overrides alpha / rank. LoRA: the rank; LoHa: the product of its two ranks, by
    (U_1 V_1) ∘ (U_2 V_2) = (U_1 • U_2)(V_1 • V_2), row-wise and column-wise Khatri-Rao, or the layer's full rank where that
    is less; LoKr: the product of its ranks, by (U_1 V_1) ⊗ (U_2 V_2) = (U_1 ⊗ U_2)(V_1 ⊗ V_2).
    """
    build = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr}.get(kind)
    if build is None:
        return None
    out, columns = extent(kind, parts)
    if out * columns > LARGEST or max(out, columns) > LONGEST:  # a small file can ask for terabytes
        raise ValueError(f"they ask for a layer of {out} x {columns}, larger than any model's")
    up, down, rank = build(parts)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"factors of rank {up.shape[1]} and {down.shape[0]}")
    alpha = float(parts["alpha"]) / rank if "alpha" in parts and rank else 1.0
    return LowRankDelta(up, down, float(parts["scale"]) if "scale" in parts else alpha)


def read_layer(kind: str, parts: Parts) -> LowRankDelta | DenseLayer:
    """A layer as factors where it is low rank by nature, else as what the host works it out from."""
    for part, dimensions in DIMENSIONS.items():
        if part in parts and parts[part].ndim not in dimensions:
            raise ValueError(f"{part} has {parts[part].ndim} dimensions")
    extent(kind, parts)  # raises where they are none of the kind
    if "dora_scale" in parts:
        return DenseLayer(kind, parts)
    factors = base_factors(kind, parts)
    if factors is None:
        return DenseLayer(kind, parts, _glora_rank(parts) if kind == "GLoRA" else None)
    whole = factors.rank >= min(factors.shape[0], math.prod(factors.shape[1:]))
    return DenseLayer(kind, parts) if kind == "LoKr" and whole else factors


def _glora_rank(parts: Parts) -> int:
    """The rank of ΔW = W·a1·a2 + b1·b2: the first term has its own at each position of the kernel."""
    halves = [parts["b1.weight"], parts["b2.weight"], parts.get("bm.weight", parts["b1.weight"])]
    return min(halves[0].shape[:2]) * (1 + max(half.shape[2:].numel() for half in halves))


def _lora(parts: Parts) -> tuple[Tensor, Tensor, int]:
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    rank = down.shape[0]
    if "lora_mid.weight" in parts:  # Tucker: the kernel stands between two 1x1 convolutions
        down = torch.einsum("nmkl,mj->njkl", parts["lora_mid.weight"].float(), down.float().flatten(1))
    return up.reshape(up.shape[:2]), down, rank


def _half(a: Tensor, b: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """One half of a LoHa or LoKr, (out, r) and (r, in…); with a Tucker core t, a is (r, out)."""
    if t is None:
        return a.float(), b.float()
    return a.float().T.contiguous(), torch.einsum("ijkl,jr->irkl", t.float(), b.float())


def _loha(parts: Parts) -> tuple[Tensor, Tensor, int]:
    up_1, down_1 = _half(parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1"))
    up_2, down_2 = _half(parts["hada_w2_a"], parts["hada_w2_b"], parts.get("hada_t2"))
    if up_1.shape[1] * up_2.shape[1] > min(up_1.shape[0], down_1.shape[1:].numel()):
        product = (up_1 @ down_1.flatten(1)) * (up_2 @ down_2.flatten(1))
        whole, _ = DenseDelta(product.reshape(-1, *down_1.shape[1:])).low_rank()
        return whole.up, whole.down, parts["hada_w1_b"].shape[0]
    up = (up_1[:, :, None] * up_2[:, None, :]).flatten(1)
    down = (down_1[:, None] * down_2[None]).flatten(0, 1)
    return up, down, parts["hada_w1_b"].shape[0]


def _lokr(parts: Parts) -> tuple[Tensor, Tensor, int]:
    # as in LyCORIS, the second factor's rank is the one that alpha is divided by, the first's where that has none
    rank = next((parts[p].shape[0] for p in ("lokr_w2_b", "lokr_w1_b") if p in parts), 0)
    first = _either(parts.get("lokr_w1"), parts.get("lokr_w1_a"), parts.get("lokr_w1_b"), None)
    second = _either(parts.get("lokr_w2"), parts.get("lokr_w2_a"), parts.get("lokr_w2_b"), parts.get("lokr_t2"))
    up = torch.kron(first[0], second[0])
    r, columns, kernel = first[1].shape[0] * second[1].shape[0], second[1].shape[1], second[1].shape[2:]
    down = torch.einsum("ai,bj->abij", first[1], second[1].flatten(1))
    return up, down.reshape(r, first[1].shape[1] * columns, *kernel), rank


def _either(whole: Tensor | None, a: Tensor | None, b: Tensor | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """A LoKr factor as (out, r) and (r, in…), whichever way it is written."""
    if whole is None:
        up, down = _half(a, b, t)
        if up.shape[1] <= min(up.shape[0], down.shape[1:].numel()):
            return up, down
        whole = (up @ down.flatten(1)).reshape(-1, *down.shape[1:])
    whole = whole.float()
    out, columns = whole.shape[0], math.prod(whole.shape[1:])
    if columns <= out:
        eye = torch.eye(columns, device=whole.device)
        return whole.flatten(1), eye.reshape(columns, *whole.shape[1:])
    return torch.eye(out, device=whole.device), whole
