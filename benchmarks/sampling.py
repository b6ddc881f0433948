"""Many pictures at once from the miniature, whatever is attached to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ziplora_lib.hosts import world
from ziplora_lib.hosts.autoencoder import InnerLevels
from ziplora_lib.hosts.diffusers import DiffusersHost

STEPS = 10
AT_ONCE = 32


@torch.no_grad()
def pictures(host: DiffusersHost, prompt: str, seeds: Sequence[int], guidance: float, steps: int = STEPS) -> Tensor:
    """A picture a seed, (n, 3, 64, 64) in -1..1: DPM-Solver++ (arXiv 2211.01095), the same noise for the same seed."""
    cond = host.encode(prompt, world.SIDE)
    empty = host.encode("", world.SIDE, negative=True)
    return torch.cat(
        [
            _sampled(host, cond, empty, seeds[first : first + AT_ONCE], guidance, steps)
            for first in range(0, len(seeds), AT_ONCE)
        ]
    )


def _sampled(host, cond, empty, seeds, guidance, steps) -> Tensor:
    scheduler = DPMSolverMultistepScheduler.from_config(host.pipe.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    n = len(seeds)
    for t in scheduler.timesteps:
        if guidance > 1:
            both = host.predict(torch.cat([x, x]), t.expand(2 * n), [cond] * n + [empty] * n)
            told, free = both.chunk(2)
            predicted = free + guidance * (told - free)
        else:
            predicted = host.predict(x, t.expand(n), [cond] * n)
        x = scheduler.step(predicted, t, x).prev_sample
    vae = host.pipe.vae
    # the outermost level only repeats dots: without it decoding takes an eighth of the time
    dots = InnerLevels(vae).decode(vae.post_quant_conv(x / vae.config.scaling_factor))
    return dots.clamp(-1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
