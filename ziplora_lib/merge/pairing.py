"""Which layers the LoRAs share, and what can be said of a pair before any model is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import is_unet, listed
from ziplora_lib.lora.reader import BASES, Lora
from ziplora_lib.lora.stack import Stack
from ziplora_lib.lora.vectors import Vectors

# one LoRA this many times as strong as another is worth a word
UNEQUAL = 5


@dataclass(frozen=True)
class Pairing:
    """The parents' layers side by side.

    stacks: every layer of any parent, strengths included; learned: the layers whose coefficients are learned, in order;
    vectors: what they add to norms and biases, strengths included, which is summed; first: how many of the LoRAs are on the
    balance's first side, the subjects or, where all have one role, the first one; they come before the others.
    """

    stacks: dict[str, Stack]
    learned: list[str]
    vectors: dict[str, Vectors]
    first: int = 1

    @property
    def parents(self) -> int:
        """How many LoRAs there are."""
        return len(next(iter(self.stacks.values())).ranks)

    @property
    def cancels(self) -> bool:
        """Whether the LoRAs' sum is nothing beside each of them."""
        if not self.stacks:
            return False
        grams = sum(stack.column_grams().sum(-1, keepdim=True) for stack in self.stacks.values())
        return float(grams.diagonal().sum()) > 0 and _sum_and_apart(grams)[0] is None

    def with_downs(self, downs: Mapping[str, Tensor]) -> Pairing:
        """The same with another `down`, (R, in…), in the layers given."""
        changed = {key: replace(self.stacks[key], down=down) for key, down in downs.items()}
        return replace(self, stacks={**self.stacks, **changed})


# share of the LoRAs' own norms below which their sum's is taken for rounding
CANCELLED = 1e-3


def _sum_and_apart(grams: Tensor) -> tuple[float | None, float]:
    """‖Σ ΔW_i‖², None where that is nothing beside it, and Σ ‖ΔW_i‖². grams: (P, P, M)"""
    together, apart = float(grams.sum()), float(grams.diagonal().sum())
    return (together if together > CANCELLED**2 * apart else None), apart


def uncancelled(grams: Tensor) -> float:
    """‖Σ ΔW_i‖², or Σ ‖ΔW_i‖² of LoRAs that cancel each other, which have no sum to go by. grams: (P, P, M)"""
    together, apart = _sum_and_apart(grams)
    return max(apart if together is None else together, 1e-30)


def pair(
    loras: Sequence[Lora],
    strengths: Sequence[float],
    shapes: Mapping[str, tuple[int, ...]],
    learn_text: bool = False,
    first: int = 1,
) -> Pairing:
    """Stacks the LoRAs layer by layer, in the order given. Their dense layers are to be worked out before.

    shapes: each layer key's weight shape in the model, (out, in…); a layer that the model lacks keeps the shape of its
    file. learn_text: the text encoders' layers are learned too. first: how many LoRAs are on the balance's first side.
    Raises BadInput, with file and key, where a layer does not fit the model or the other LoRA.
    """
    stacks: dict[str, Stack] = {}
    for key in sorted(set().union(*(lora.deltas for lora in loras))):
        shape = shapes.get(key) or next(lora.deltas[key].shape for lora in loras if key in lora.deltas)
        stacks[key] = Stack.of([_fitted(lora, key, shape, w) for lora, w in zip(loras, strengths)])
    vectors = {
        key: Vectors.of([lora.vectors.get(key) for lora in loras], strengths)
        for key in sorted(set().union(*(lora.vectors for lora in loras)))
    }
    # what the model does not have cannot be learned; it is summed, as the text encoders are
    learned = [key for key in stacks if key in shapes and (learn_text or is_unet(key))]
    return Pairing(stacks, learned, vectors, first)


def _fitted(lora: Lora, key: str, shape: tuple[int, ...], strength: float) -> LowRankDelta | None:
    delta = lora.deltas.get(key)
    if delta is None:
        return None
    try:
        return delta.fitted(tuple(shape)).strength(strength)
    except BadInput as error:
        raise BadInput(
            error.problem,
            file=lora.path.name,
            key=key,
            remedy=f"This LoRA belongs to another base model ({BASES[lora.base]})",
        ) from error


def unmatched(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The layers of a LoRA that the model does not have."""
    return [key for key in (*lora.layers, *lora.vectors) if key not in shapes]


def outlines(loras: Sequence[Lora]) -> dict[str, tuple[int, ...]]:
    """The shapes of the layers as the LoRAs themselves have them, where no model says: the first one's, (out, in…)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for lora in reversed(loras):
        shapes |= {key: delta.shape for key, delta in lora.deltas.items()}
        shapes |= {key: layer.extent for key, layer in lora.dense.items() if layer.extent}
        for key, vectors in lora.vectors.items():
            row = vectors.bias if vectors.weight is None else vectors.weight
            shapes.setdefault(key, (row.shape[-1], 0))
    return shapes


def refuse_unfit(lora: Lora, shapes: Mapping[str, tuple[int, ...]], model: str, base: str) -> None:
    """Raises BadInput if a LoRA is for another base than the model's, or none of its layers is in the model."""
    remedy = f"Pick a LoRA that was trained on {BASES[base]}"
    if lora.base not in (base, "unknown"):
        raise BadInput(
            f"is a LoRA for {BASES[lora.base]}, but {model} is {BASES[base]}",
            file=lora.path.name,
            key=next(iter([*lora.layers, *lora.vectors])),
            remedy=remedy,
        )
    missing = unmatched(lora, shapes)
    if len(missing) == len(lora.layers) + len(lora.vectors):
        raise BadInput(
            f"none of its {len(missing)} layers is a layer of {model}",
            file=lora.path.name,
            key=missing[0],
            remedy=remedy,
        )
    for key in lora.deltas:
        if key in shapes:
            _fitted(lora, key, shapes[key], 1.0)
    other = f"This LoRA belongs to another base model ({BASES[lora.base]})"
    for key, layer in lora.dense.items():
        mine = (shapes[key][0], math.prod(shapes[key][1:])) if key in shapes else None
        if mine and layer.extent not in (None, mine):
            raise BadInput(
                f"made for a layer of {layer.extent[0]} x {layer.extent[1]}, but the model's has {mine[0]} x {mine[1]}",
                file=lora.path.name,
                key=key,
                remedy=other,
            )
    for key, vectors in lora.vectors.items():
        for row in (vectors.weight, vectors.bias):
            if key in shapes and row is not None and row.shape[-1] != shapes[key][0]:
                raise BadInput(
                    f"made for a layer of {row.shape[-1]} outputs, but the model's has {shapes[key][0]}",
                    file=lora.path.name,
                    key=key,
                    remedy=other,
                )


def equalising(norms: Sequence[float]) -> list[float]:
    """The factors that bring ‖ΔW‖ of every LoRA to their geometric mean; 1 for a LoRA that is zero."""
    known = [norm for norm in norms if norm > 0]
    mean = math.exp(sum(map(math.log, known)) / max(len(known), 1))
    return [mean / norm if norm > 0 else 1.0 for norm in norms]


def norm_warnings(loras: Sequence[Lora], strengths: Sequence[float]) -> list[str]:
    """What is to be said of the LoRAs' norms: zeros, and one that is far stronger than another."""
    norms = [lora.norm() * abs(w) for lora, w in zip(loras, strengths)]
    if any(map(math.isnan, norms)):  # a glance
        return []
    zero = [lora for lora, norm in zip(loras, norms) if norm == 0]
    said = [f"{lora.name} changes nothing: all its values are zero" for lora in zero if not lora.vectors]
    if zero or max(norms) <= UNEQUAL * min(norms):
        return said
    strongest, weakest = (loras[norms.index(pick(norms))].name for pick in (max, min))
    even = ", ".join(f"{lora.name} {w * f:.2g}" for lora, w, f in zip(loras, strengths, equalising(norms)))
    return [
        f"{strongest} is {max(norms) / min(norms):.0f} times as strong as {weakest}. The strengths that would make them "
        f"even: {even}; equal_norms sets them"
    ]


def report(
    loras: Sequence[Lora],
    strengths: Sequence[float],
    shapes: Mapping[str, tuple[int, ...]],
    learn_text: bool = False,
    dense_rank: int | None = None,
    equal_norms: bool = False,
    only_factors: bool = False,
) -> dict:
    """What the preflight shows: per parent its kinds, layers, ranks and norm; what is learned; warnings in words.

    dense_rank: the largest rank of what is not low rank by nature; None keeps it whole. equal_norms: the strengths will be
    evened out. only_factors: the file to come has no place for norms, biases and embeddings.
    """
    warnings = []
    keys = sorted(set().union(*(lora.layers for lora in loras)))
    have = {key: [key in lora.deltas or key in lora.dense for lora in loras] for key in keys}
    for i, lora in enumerate(loras):
        if missing := unmatched(lora, shapes):
            # a bias has its place beside a weight
            lost = [key for key in missing if key not in lora.deltas and not _is_norm(lora, key)]
            warnings.append(
                f"{lora.name} has {listed(missing)} that this model does not have"
                + (f"; {len(lost)} of them cannot be kept, since what they do depends on the model" if lost else "")
                + ("; the rest is kept in the file but not learned" if len(lost) < len(missing) else "")
            )
        alone = [key for key in keys if is_unet(key) and have[key][i] and sum(have[key]) == 1]
        if alone and len(alone) < len(keys):
            warnings.append(f"{len(alone)} UNet layers are in {lora.name} alone")
        if lora.base == "unknown":
            warnings.append(f"{lora.name} does not say which base model it was made for; its layers fit this one")
        if (cut := [key for key, layer in lora.dense.items() if layer.exact_rank is None]) and dense_rank is not None:
            warnings.append(
                f"{lora.name}: {len(cut)} layers ({_kinds(lora, cut)}) have no factors of their own; they are brought to "
                f"rank {dense_rank} or less, and what that loses is said afterwards"
            )
        if lora.embeddings and not only_factors:
            warnings.append(f"{lora.name} brings embeddings ({', '.join(lora.embeddings)}), which go into the new file")
    text = sum(not is_unet(key) for key in keys)
    if text and not learn_text:
        warnings.append(f"{text} text encoder layers are summed, not learned")
    vectors = set().union(*(lora.vectors for lora in loras))
    embeddings = {name for lora in loras for name in lora.embeddings}
    if only_factors and (vectors or embeddings):
        warnings.append(
            f"{len(vectors)} norms and biases and {len(embeddings)} embeddings have no place in a file with these layer "
            "names, and are left out"
        )
    elif vectors:
        warnings.append(f"{len(vectors)} norms and biases are summed: they have no columns to learn")
    biased = {key for lora in loras for key in lora.vectors if key in have and not _is_norm(lora, key)}
    biased = set() if only_factors else biased
    if biased:
        warnings.append(f"{len(biased)} layers have a bias and are saved whole, which takes more room")
    if (vectors or embeddings) and not only_factors:
        warnings.append(
            "the WebUI reads norms, biases and embeddings of a file, but diffusers reads none that has them"
        )
    if not equal_norms and not any(lora.dense for lora in loras):
        warnings += norm_warnings(loras, strengths)
    learned = [key for key in keys if key in shapes and (learn_text or is_unet(key))]
    if not any(sum(have[key]) > 1 for key in learned):
        warnings.append("the LoRAs share no UNet layer")
    if not learned:
        warnings.append("there is nothing to learn: the LoRAs are added as they are")
    return {
        "parents": [
            {
                "name": lora.name,
                "file": lora.path.name,
                "base": BASES[lora.base],
                "kinds": lora.kinds,
                "layers": len(lora.layers),
                "matched": len(lora.layers) - sum(key not in shapes for key in lora.layers),
                "ranks": lora.ranks,
                "dtype": lora.dtype,
                "norm": None if lora.dense or not math.isfinite(lora.norm()) else lora.norm(),
            }
            for lora in loras
        ],
        "learned_layers": len(learned),
        "learned_coefficients": sum(sum(have[key]) * math.prod(shapes[key][1:]) for key in learned),
        "shared_layers": sum(all(have[key]) for key in keys if is_unet(key)),
        "text_layers": text,
        "vectors": len(vectors),
        "values": sum(_values(lora, key, shapes, dense_rank) for lora in loras for key in lora.layers)
        + sum(math.prod(shapes[key]) for key in biased if key in shapes),
        "warnings": warnings,
    }


def _kinds(lora: Lora, keys: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(lora.dense[key].kind for key in keys))


def _is_norm(lora: Lora, key: str) -> bool:
    return key in lora.vectors and lora.vectors[key].weight is not None


def _values(lora: Lora, key: str, shapes: Mapping[str, tuple[int, ...]], dense_rank: int | None) -> int:
    """How many numbers a LoRA's factors of a layer take in the merged file."""
    if key in lora.deltas:
        return lora.deltas[key].up.numel() + lora.deltas[key].down.numel()
    if key not in shapes:
        return 0
    out, columns = shapes[key][0], math.prod(shapes[key][1:])
    wanted = None if dense_rank is None else max(dense_rank, lora.dense[key].exact_rank or 0)
    full = min(out, columns)
    return (full if wanted is None else min(full, wanted)) * (out + columns)
