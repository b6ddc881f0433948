"""Who tells what is in a picture of the world: one small network, a head for each of the six things that it can show.

Trained apart from the miniature, on drawings and on what its autoencoder makes of them.

python -m benchmarks.judge OUT.safetensors [STEPS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ziplora_lib.hosts import world
from ziplora_lib.hosts.autoencoder import InnerLevels
from ziplora_lib.hosts.miniature import build_miniature
from ziplora_lib.hosts.world import Style, Subject

WEIGHTS = Path(__file__).with_name("judge.safetensors")
# colours: the palettes, and "natural" behind them
HEADS = {
    "body": len(world.BODIES),
    "top": len(world.TOPS),
    "palette": len(world.PALETTES) + 1,
    "background": len(world.BACKGROUNDS),
    "texture": len(world.TEXTURES),
    "outline": len(world.OUTLINES),
}


class Judge(nn.Module):
    """Pictures (n, 3, 64, 64) in -1..1 -> six rows of logits."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 3 * width)
        self.levels = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.heads = nn.ModuleDict({name: nn.Linear(16 * widths[-1], n) for name, n in HEADS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        x = F.avg_pool2d(pictures, 2)
        for k, (conv, norm) in enumerate(zip(self.levels, self.norms)):
            x = F.silu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if k < 3 else x
        return {name: head(x.flatten(1)) for name, head in self.heads.items()}


def truth(subjects: Sequence[Subject], styles: Sequence[Style | None]) -> dict[str, Tensor]:
    """The right answer of each head."""
    natural = Style(len(world.PALETTES), 0, 0, 0)
    shown = [{**vars(subject), **vars(style or natural)} for subject, style in zip(subjects, styles)]
    return {name: torch.tensor([s[name] for s in shown]) for name in HEADS}


@lru_cache(maxsize=1)
def judge() -> Judge:
    """The trained one."""
    model = Judge()
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return model.eval()


@torch.no_grad()
def verdicts(pictures: Tensor, subject: Subject | None, style: Style | None) -> dict[str, Tensor]:
    """Whether each picture shows the subject and has the style, all of it: two rows of 0 and 1.

    Without a subject every one counts, without a style too.
    """
    found = {name: logits.argmax(1) for name, logits in judge()(pictures).items()}

    def right(thing) -> Tensor:
        rows = [found[name] == value for name, value in (vars(thing) if thing else {}).items()]
        return torch.stack(rows).all(0) if rows else torch.ones(len(pictures), dtype=torch.bool)

    return {"subject": right(subject), "style": right(style)}


def main(out: Path, steps: int = 700, batch: int = 64) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(7)
    vae = InnerLevels(build_miniature().vae)
    model = Judge()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)

    def drawn(n: int) -> tuple[Tensor, dict[str, Tensor]]:
        def pick(things):
            return [things[i] for i in torch.randint(len(things), (n,), generator=generator)]

        # every combination, also those without any ingredient: a style that was lost must be seen as lost
        every = [
            world.Style(*(int(torch.randint(k, (1,), generator=generator)) for k in (6, 4, 4, 3))) for _ in range(n)
        ]
        styles = [None if kind < 0.25 else s for kind, s in zip(torch.rand(n, generator=generator).tolist(), every)]
        subjects = pick(world.SUBJECTS)
        return world.draw(subjects, styles, generator), truth(subjects, styles)

    def seen(pictures: Tensor, noise: float) -> Tensor:
        with torch.no_grad():
            latents = vae.encode(pictures[..., ::2, ::2])
            noisy = latents + noise * latents.std() * torch.randn(latents.shape, generator=generator)
            return vae.decode(noisy).repeat_interleave(2, -1).repeat_interleave(2, -2)

    pool, answers = zip(*(drawn(256) for _ in range(24)))
    pool = torch.cat(pool)
    answers = {name: torch.cat([a[name] for a in answers]) for name in HEADS}
    decoded = torch.cat([seen(part, 0.1) for part in pool.split(128)])
    for step in range(1, steps + 1):
        at = torch.randint(len(pool), (batch,), generator=generator)
        own = torch.rand(batch, generator=generator) < 0.4
        pictures = torch.where(own[:, None, None, None], pool[at], decoded[at])
        pictures = pictures + 0.05 * torch.randn(pictures.shape, generator=generator)
        logits = model(pictures)
        loss = sum(F.cross_entropy(logits[name], answers[name][at]) for name in HEADS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{step} loss {float(loss.detach()):.3f}", flush=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out)
    pictures, right = drawn(512)
    model.eval()
    with torch.no_grad():
        for name, shown in (("drawn", pictures), ("decoded", seen(pictures, 0.0))):
            logits = model(shown)
            print(
                name, {head: round(float((logits[head].argmax(1) == right[head]).float().mean()), 4) for head in HEADS}
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS, *map(int, sys.argv[2:]))
