"""Trains the miniature's UNet and text encoders on the world, and writes the weights that ship.

python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.miniature.base VAE OUT [STEPS [GO_ON_FROM]]
"""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.miniature.parallel import averaged, started
from ziplora_lib.hosts import autoencoder, miniature, world

PICTURES = 16384  # a process; drawn and encoded once
BATCH = 32  # a process
LR = 2e-3
EMA = 0.998
NATURAL, NAMED = 0.3, 0.35  # of the pictures; the others' styles are described by their ingredients
EMPTY, ZERO = 0.03, 0.09  # captions dropped: read as an empty prompt, or not read at all, as SDXL's negative one


def captioned_pictures(n: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """Pictures of what the base model is to know, (n, 3, 64, 64), and a caption each."""

    def pick(things):
        return things[int(torch.randint(len(things), (1,), generator=generator))]

    subjects, styles, captions = [], [], []
    for kind in torch.rand(n, generator=generator).tolist():
        subject = pick(world.KNOWN_SUBJECTS)
        if kind < NATURAL:
            style, caption = None, f"a photo of {subject.words}"
        elif kind < NATURAL + NAMED:
            name, style = pick(list(world.NAMED_STYLES.items()))
            caption = f"{subject.words} in {name} style"
        else:
            style = pick(world.KNOWN_STYLES)
            caption = f"{subject.words} in {style.words} style"
        subjects.append(subject)
        styles.append(style)
        captions.append(caption)
    return world.draw(subjects, styles, generator), captions


class Base:
    """The miniature as it is trained: text and UNet in one forward."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.parts = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")}
        alphas = pipe.scheduler.alphas_cumprod
        self.alpha, self.sigma = alphas.sqrt(), (1 - alphas).sqrt()
        snr = alphas / (1 - alphas)
        self.weights = snr.clamp_max(5) / (snr + 1) + 0.1  # min-SNR (arXiv 2303.09556), for a velocity

    def parameters(self) -> list[torch.nn.Parameter]:
        """All but those that no prediction depends on (the last layer of the first encoder, behind what SDXL reads)."""
        return [p for part in self.parts.values() for p in part.parameters()]

    def tokens(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            for tokenizer in (self.pipe.tokenizer, self.pipe.tokenizer_2)
        )

    def read(self, tokens: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (b, 77, 96) and pooled (b, 64), as SDXL's pipeline takes them."""
        one = self.pipe.text_encoder(tokens[0], output_hidden_states=True).hidden_states[-2]
        two = self.pipe.text_encoder_2(tokens[1], output_hidden_states=True)
        return torch.cat([one, two.hidden_states[-2]], dim=-1), two.text_embeds

    def loss(self, latents, embeddings, pooled, generator) -> torch.Tensor:
        n = len(latents)
        t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long()
        noise = torch.randn(latents.shape, generator=generator)
        alpha, sigma = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        sizes = torch.tensor([[world.SIDE, world.SIDE, 0, 0, world.SIDE, world.SIDE]]).float().expand(n, -1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        predicted = self.pipe.unet(
            alpha * latents + sigma * noise, t, encoder_hidden_states=embeddings, added_cond_kwargs=added
        ).sample
        errors = (predicted - (alpha * noise - sigma * latents)).square().mean((1, 2, 3))
        return (self.weights[t] * errors).mean()


def main(vae: Path, out: Path, steps: int, start: Path | None = None) -> None:
    rank, _ = started()
    pipe = miniature.untrained_miniature()
    if start is not None:
        miniature.load_trained(pipe, start)
    pipe.vae.load_state_dict(load_file(vae))
    inner = autoencoder.InnerLevels(pipe.vae)
    base = Base(pipe)
    generator = torch.Generator().manual_seed((200 if start is None else 250) + rank)
    latents, tokens = [], []
    with torch.no_grad():
        for _ in range(PICTURES // 256):
            pictures, captions = captioned_pictures(256, generator)
            mean = pipe.vae.quant_conv(torch.cat([z := inner.encode(pictures[..., ::2, ::2]), torch.zeros_like(z)], 1))
            latents.append(mean[:, :4] * autoencoder.SCALING_FACTOR)
            tokens.append(base.tokens(captions))
    latents, tokens = torch.cat(latents), tuple(torch.cat(part) for part in zip(*tokens))
    empty = base.tokens([""])
    print(f"process {rank}: {len(latents)} latents, mean {latents.mean():.2f}, std {latents.std():.2f}", flush=True)

    parameters = base.parameters()
    optimiser = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=steps, pct_start=0.03)
    mean_weights = [p.detach().clone() for p in parameters]
    begun, shown = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator)
        read = [torch.where((dropped < EMPTY)[:, None], blank, part[chosen]) for part, blank in zip(tokens, empty)]
        embeddings, pooled = base.read(tuple(read))
        zeroed = dropped > 1 - ZERO
        embeddings = embeddings.masked_fill(zeroed[:, None, None], 0)
        loss = base.loss(latents[chosen], embeddings, pooled.masked_fill(zeroed[:, None], 0), generator)
        optimiser.zero_grad()
        loss.backward()
        averaged(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        # early on a shorter memory, or the first weights stay in it
        torch._foreach_lerp_(mean_weights, [p.detach() for p in parameters], 1 - min(EMA, step / (step + 10)))
        shown += float(loss.detach())
        if rank == 0 and step % 100 == 0:
            print(f"{step:5d}  loss {shown / 100:.4f}  {time.monotonic() - begun:.0f} s", flush=True)
            shown = 0.0
        if rank == 0 and (step % 1000 == 0 or step == steps):
            kept = [p.detach().clone() for p in parameters]
            _set(parameters, mean_weights)
            miniature.save_trained(pipe, out)
            _set(parameters, kept)


@torch.no_grad()
def _set(parameters, values) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3300, *map(Path, sys.argv[4:])
    )
