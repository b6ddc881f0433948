"""What a merged file holds beside its factors: norms, biases and bundled embeddings, as the WebUI and LyCORIS spell them.

A bias has a place only beside a whole ΔW (`diff`, `diff_b`). What these spellings mix up, each parent's own part, is kept
beside them under names that no other reader looks for, so that strengths can be baked and halves split later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ziplora_lib.lora.reader import Lora
from ziplora_lib.lora.stack import Stack
from ziplora_lib.lora.vectors import Vectors


def extra_tensors(
    stacks: Mapping[str, Stack],
    vectors: Mapping[str, Vectors],
    shapes: Mapping[str, tuple[int, ...]],
    spelled: Callable[[str], str],
) -> tuple[dict[str, Stack], dict[str, Tensor]]:
    """The stacks that are saved as factors, and all other tensors by the name that they are saved under.

    shapes: the weights' shapes in the model; a bias of a layer that is in neither has no ΔW to stand beside and is left out.
    """
    plain, extra = dict(stacks), {}
    for key, added in vectors.items():
        name = spelled(key)
        if added.weight is not None or len(shapes.get(key, ())) == 1:
            weight = torch.zeros_like(added.bias) if added.weight is None else added.weight
            bias = torch.zeros_like(weight) if added.bias is None else added.bias
            extra |= {f"{name}.w_norm": weight.sum(0), f"{name}.b_norm": bias.sum(0)}
            extra |= {f"{name}.ziplora_weight": weight, f"{name}.ziplora_bias": bias}
            continue
        stack = plain.pop(key, None)
        shape = stack.shape if stack is not None else shapes.get(key)
        if shape is None:
            continue
        extra |= {f"{name}.diff_b": added.bias.sum(0), f"{name}.ziplora_bias": added.bias}
        if stack is None:
            extra[f"{name}.diff"] = torch.zeros(shape[0], math.prod(shape[1:])).reshape(shape)
        else:
            extra |= {
                f"{name}.diff": stack.total().dense(),
                f"{name}.ziplora_up": stack.up,
                f"{name}.ziplora_down": stack.down,
            }
    return plain, extra


def embedding_tensors(loras: Sequence[Lora]) -> tuple[dict[str, Tensor], list[str]]:
    """The LoRAs' bundled embeddings as tensors of the merged file, and the names that more than one has, unequal.

    Of these the first LoRA's is kept.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    clashing = []
    for lora in loras:
        for name, parts in lora.embeddings.items():
            known = kept.setdefault(name, parts)
            # as fp32, for torch compares no floats of eight bits
            same = known.keys() == parts.keys() and all(torch.equal(known[p].float(), parts[p].float()) for p in parts)
            if not same:
                clashing.append(name)
    return {f"bundle_emb.{name}.{part}": t for name, parts in kept.items() for part, t in parts.items()}, clashing
