"""Two one-thread processes train faster than one of two threads: the miniature's layers are small."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


def started() -> tuple[int, int]:
    """This process's number and how many there are, under torch.distributed.run; (0, 1) without."""
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def averaged(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Makes each gradient the mean over the processes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))
