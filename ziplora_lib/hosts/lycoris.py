"""ΔW of the kinds that need the model's weight or are of full rank, by the library that defines them: lycoris-lora."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ziplora_lib.lora import kinds
from ziplora_lib.lora.kinds import DenseLayer

with warnings.catch_warnings():  # it tells of kernels for GPUs that are not there
    warnings.simplefilter("ignore")
    from lycoris.functional import boft, diag_oft
    from lycoris.functional.general import weight_decompose
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module


@torch.no_grad()
def dense_delta(layer: DenseLayer, module: nn.Module) -> Tensor | None:
    """ΔW in fp32, of the shape of the module's weight; None for what the library does not know (old OFT, in rotations).

    Raises RuntimeError or ValueError where the parts do not fit the module.
    """
    parts = {part: tensor.float() for part, tensor in layer.parts.items()}
    weight = module.weight.detach().float().cpu()
    kind = layer.kind.removeprefix("DoRA of ")
    delta = _undecomposed(kind, parts, module, weight)
    if delta is None:
        return None
    delta = delta.reshape(weight.shape)
    if "dora_scale" not in parts:
        return delta
    scale = parts["dora_scale"]
    of_outputs = scale.numel() == weight.shape[0] == scale.shape[0]
    scale = (
        scale.reshape(-1, *[1] * (weight.ndim - 1)) if of_outputs else scale.reshape(1, -1, *[1] * (weight.ndim - 2))
    )
    return weight_decompose(weight + delta, scale, 1, wd_on_out=of_outputs) - weight


def _undecomposed(kind: str, parts: dict[str, Tensor], module: nn.Module, weight: Tensor) -> Tensor | None:
    if kind == "full":
        return parts["diff"]
    if kind in ("OFT", "BOFT"):
        if "oft_blocks" not in parts:
            return None
        by = diag_oft if kind == "OFT" else boft
        rescale = parts.get("rescale")
        if rescale is not None:
            rescale = rescale.reshape(-1, *[1] * (weight.ndim - 1))
        constraint = float(parts.get("alpha", 0.0)) * weight.shape[0]
        return by.diff_weight(weight, parts["oft_blocks"], rescale, constraint=constraint)
    if kind == "(IA)³":
        on_input = bool(parts["on_input"])
        adapter = IA3Module("layer", _bare(module, weight), train_on_input=on_input)
        adapter.weight.copy_(parts["weight"].reshape(adapter.weight.shape))
        return adapter.get_diff_weight()[0]
    if kind == "GLoRA":
        a1, a2, b1, b2 = (parts[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        if b1.shape[0] != weight.shape[0]:  # LyCORIS before 2.0 called them the other way round
            a1, a2, b1, b2 = a2, a1, b2, b1
        rank = a2.shape[0]
        alpha = float(parts.get("alpha", rank))
        adapter = GLoRAModule.make_module_from_state_dict(
            "layer", _bare(module, weight), a1, a2, b1, b2, parts.get("bm.weight"), alpha
        )
        return adapter.get_diff_weight()[0]
    return kinds.base_factors(kind, parts).dense()


def _bare(module: nn.Module, weight: Tensor) -> nn.Module:
    """A layer of the same form on the CPU in fp32: what the library builds its adapter for."""
    if isinstance(module, nn.Conv2d):
        form = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
        bare = nn.Conv2d(*form, groups=module.groups, bias=False)
    else:
        bare = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    bare.weight = nn.Parameter(weight, requires_grad=False)
    return bare
