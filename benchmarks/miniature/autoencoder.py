"""Trains the miniature's autoencoder: SDXL's factor 8 and four latent channels, on pictures of the world.

The world's pictures are drawn in dots of two pixels, so the outermost level has nothing to learn: it is worked out by hand
(`autoencoder.lay_outer_level`), and the three inner ones are trained at 32 dots a side.

python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.miniature.autoencoder OUT.safetensors [STEPS [GO_ON_FROM]]
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

from benchmarks.miniature.parallel import averaged, started
from ziplora_lib.hosts import autoencoder, world

BATCH = 16  # a process
LR = 2e-3
NOISE = 0.06  # on latents of unit variance: neighbouring latents decode alike


def random_pictures(n: int, generator: torch.Generator) -> torch.Tensor:
    """Any creature in any style, a third of them natural: (n, 3, 64, 64)."""

    def pick(things):
        return [things[i] for i in torch.randint(len(things), (n,), generator=generator)]

    natural = torch.rand(n, generator=generator) < 1 / 3
    styles = [None if bare else style for bare, style in zip(natural, pick(world.STYLES))]
    return world.draw(pick(world.SUBJECTS), styles, generator)


def main(out: Path, steps: int, start: Path | None = None) -> None:
    rank, processes = started()
    torch.manual_seed(0)
    vae = autoencoder.untrained_vae()
    if start is not None:
        vae.load_state_dict(load_file(start))
    inner = autoencoder.InnerLevels(vae)
    optimiser = torch.optim.Adam(inner.parameters(), lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LR, total_steps=steps, pct_start=0.1 if start is None else 0.02
    )
    generator = torch.Generator().manual_seed((100 if start is None else 150) + rank)
    begun = time.monotonic()
    for step in range(1, steps + 1):
        dots = random_pictures(BATCH, generator)[..., ::2, ::2]
        latent = inner.encode(dots)
        noisy = latent + NOISE * torch.randn(latent.shape, generator=generator)
        decoded = inner.decode(noisy)
        loss = F.mse_loss(decoded, dots) + 0.3 * F.l1_loss(decoded, dots) + 0.3 * _edges(decoded, dots)
        # unit variance, no more: what is beyond costs
        loss = loss + 0.01 * (latent.square().mean() - 1).clamp_min(0) + 1e-4 * latent.mean((0, 2, 3)).square().sum()
        optimiser.zero_grad()
        loss.backward()
        averaged(inner.parameters())
        torch.nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if rank == 0 and (step % 50 == 0 or step == steps):
            mse = F.mse_loss(decoded.detach(), dots)
            psnr = -10 * torch.log10(mse / 4)
            print(
                f"{step:5d}  loss {float(loss.detach()):.4f}  psnr {float(psnr):.1f} dB  {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, out)
    if rank == 0:
        with torch.no_grad():
            latents = torch.cat([inner.encode(random_pictures(64, generator)[..., ::2, ::2]) for _ in range(16)])
        autoencoder.standardise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, out)
    dist.barrier() if processes > 1 else None


def _edges(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 of the differences between neighbours: blur costs."""
    return sum(F.l1_loss(a.diff(dim=d), b.diff(dim=d)) for d in (-1, -2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1300, *map(Path, sys.argv[3:]))
