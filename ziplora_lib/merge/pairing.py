"""Which layers the LoRAs share, and what can be said of a pair before any model is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import is_unet
from ziplora_lib.lora.reader import BASES, Lora
from ziplora_lib.lora.stack import Stack


@dataclass(frozen=True)
class Pairing:
    """The parents' layers side by side.

    stacks: every layer of any parent, strengths included; learned: the UNet layers that all parents have, whose
    coefficients are learned; alone: per parent, the UNet layers that not all have and that keep their strength; text: the
    text encoders' layers, which are summed.
    """

    stacks: dict[str, Stack]
    learned: list[str]
    alone: list[list[str]]
    text: list[str]


def pair(loras: Sequence[Lora], strengths: Sequence[float], shapes: Mapping[str, tuple[int, ...]]) -> Pairing:
    """Stacks the LoRAs layer by layer, in the order given.

    shapes: each layer key's weight shape in the model, (out, in…); a layer that the model lacks keeps the shape of its
    file. Raises BadInput, with file and key, where a layer does not fit the model or the other LoRA.
    """
    stacks: dict[str, Stack] = {}
    for key in sorted(set().union(*(lora.deltas for lora in loras))):
        shape = shapes.get(key) or next(lora.deltas[key].shape for lora in loras if key in lora.deltas)
        stacks[key] = Stack.of([_fitted(lora, key, shape, w) for lora, w in zip(loras, strengths)])
    unet = [key for key in stacks if is_unet(key)]
    return Pairing(
        stacks=stacks,
        learned=[key for key in unet if all(stacks[key].ranks)],
        alone=[[key for key in unet if stacks[key].ranks[i] and not all(stacks[key].ranks)] for i in range(len(loras))],
        text=[key for key in stacks if not is_unet(key)],
    )


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
    """The layers of a LoRA that the model does not have; the saved file keeps them."""
    return [key for key in lora.deltas if key not in shapes]


def refuse_unfit(lora: Lora, shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Raises BadInput if a LoRA is for another base model, or none of its layers is in this one."""
    if lora.base not in ("sdxl", "unknown"):
        raise BadInput(
            f"is a LoRA for {BASES[lora.base]}, but {model} is SDXL",
            file=lora.path.name,
            key=next(iter(lora.deltas)),
            remedy="Pick a LoRA that was trained on SDXL",
        )
    missing = unmatched(lora, shapes)
    if not any(is_unet(key) and key in shapes for key in lora.deltas):
        raise BadInput(
            f"none of its {len(lora.deltas)} layers is a UNet layer of {model}",
            file=lora.path.name,
            key=(missing or list(lora.deltas))[0],
            remedy="Pick a LoRA that was trained on SDXL",
        )
    for key in lora.deltas:
        if key in shapes:
            _fitted(lora, key, shapes[key], 1.0)


def report(loras: Sequence[Lora], pairing: Pairing, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """What the preflight shows: per parent its layers, ranks and norm; what is learned; warnings in words."""
    warnings = []
    for i, lora in enumerate(loras):
        if missing := unmatched(lora, shapes):
            warnings.append(
                f"{lora.name}: {len(missing)} of {len(lora.deltas)} layers are not in this model. They are "
                f"kept in the file but were not learned: {', '.join(missing[:3])}" + (" …" if len(missing) > 3 else "")
            )
        if pairing.alone[i]:
            warnings.append(f"{len(pairing.alone[i])} UNet layers are in {lora.name} alone; they keep its strength")
        if lora.base == "unknown":
            warnings.append(f"{lora.name} does not say which base model it was made for; its layers fit this one")
    if pairing.text:
        warnings.append(f"{len(pairing.text)} text encoder layers are summed, not learned")
    norms = [lora.norm() for lora in loras]
    for lora, norm in zip(loras, norms):
        if norm == 0:
            warnings.append(f"{lora.name} changes nothing: all its values are zero")
    if min(norms) > 0 and max(norms) / min(norms) > 5:
        warnings.append(
            f"{loras[norms.index(max(norms))].name} is {max(norms) / min(norms):.0f} times as strong as the "
            "other; a lower strength for it may balance the picture"
        )
    if not pairing.learned:
        warnings.append("the LoRAs share no UNet layer: there is nothing to learn, and the result is their plain sum")
    return {
        "parents": [
            {
                "name": lora.name,
                "file": lora.path.name,
                "base": BASES[lora.base],
                "layers": len(lora.deltas),
                "matched": len(lora.deltas) - len(unmatched(lora, shapes)),
                "ranks": lora.ranks,
                "dtype": lora.dtype,
                "norm": norm,
            }
            for lora, norm in zip(loras, norms)
        ],
        "learned_layers": len(pairing.learned),
        "learned_coefficients": sum(pairing.stacks[key].columns for key in pairing.learned) * len(loras),
        "alone_layers": [len(keys) for keys in pairing.alone],
        "text_layers": len(pairing.text),
        "values": sum(s.up.numel() + s.down.numel() for s in pairing.stacks.values()),
        "warnings": warnings,
    }
