"""A model in fp32 for a while, for what its own precision cannot hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def full_precision(roots: Sequence[nn.Module]) -> Iterator[None]:
    """All weights and buffers of fp16 or bf16 in fp32; exit brings them back, to the bit."""
    parameters = [(p, p.dtype) for root in roots for p in root.parameters() if p.dtype in HALVES]
    buffers = [
        (module, name, buffer)
        for root in roots
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype in HALVES
    ]
    # what modules say of their own dtype, and cast by: sgm's and ldm's UNets, Lightning's modules
    said = [
        (module, name, value)
        for root in roots
        for module in root.modules()
        for name, value in vars(module).items()
        if name in ("dtype", "_dtype") and value in HALVES
    ]
    try:
        for p, _ in parameters:
            p.data = p.data.float()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.float()
        for module, name, _ in said:
            setattr(module, name, torch.float32)
        yield
    finally:
        for p, dtype in parameters:
            p.data = p.data.to(dtype)
        for module, name, buffer in buffers:  # where it is by now
            module._buffers[name] = module._buffers[name].to(buffer.dtype)
        for module, name, value in said:
            setattr(module, name, value)
