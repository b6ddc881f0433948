"""Does the default objective neither collapse nor stall as width, depth and resolution grow towards SDXL's?

UNets of SDXL's structure with random weights, two LoRAs with random factors on all attention matrices, ‖ΔW‖ = 0.03 ‖W‖. For
every objective the mean |gradient| per coefficient, of the data and of λ times the penalty, at its own start: if the second
is many times the first, Adam walks the coefficients wherever the penalty leads, whatever the pictures say; if it is nothing
beside the first, the penalty might as well not be there. For the smaller sizes also what learning makes of the coefficients.

python -m benchmarks.scale [--full]        writes benchmarks/results/scale.json; --full: SDXL's size too, over 10 GB
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from ziplora_lib.calibration import calibrated
from ziplora_lib.hosts.host import Model
from ziplora_lib.job import settings_of
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import Slot, attach
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.ziplora import learned_columns, ziplora
from ziplora_lib.recipe import parse

RESULT = Path(__file__).parent / "results" / "scale.json"
PAPER = {"steps": 100, "lr": 0.01}  # arXiv 2311.13600
STRENGTH = 0.03  # ‖ΔW‖ / ‖W‖


@dataclass(frozen=True)
class Size:
    """widths: channels of the three levels; depth: transformer blocks of the inner two; latent: pixels a side / 8."""

    widths: tuple[int, int, int]
    depth: tuple[int, int]
    latent: int
    learns: bool = False  # whether it is learned to the end; elsewhere a step takes too long

    @property
    def rank(self) -> int:
        return self.widths[0] // 5


SIZES = [
    *(Size((64, 128, 256), (1, 2), latent, True) for latent in (8, 16, 32)),
    Size((64, 128, 256), (2, 10), 16, True),
    Size((160, 320, 640), (2, 5), 16),
    Size((160, 320, 640), (2, 10), 32),
]
FULL = [Size((320, 640, 1280), (2, 10), 32)]


def unet(size: Size) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=size.latent, block_out_channels=size.widths, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, *size.depth), attention_head_dim=tuple(w // 32 for w in size.widths),
        use_linear_projection=True, cross_attention_dim=2048, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    model.enable_gradient_checkpointing()
    return model.requires_grad_(False).train()  # checkpoints count in train mode only, and there is no dropout


def random_pair(
    model: UNet2DConditionModel, rank: int, parents: int = 2, where: str = ".attn"
) -> tuple[Pairing, dict[str, Slot]]:
    """LoRAs with random factors on the matrices whose names have `where` in them."""
    generator = torch.Generator().manual_seed(1)
    slots, stacks = {}, {}
    for name, module in model.named_modules():
        if where in name and isinstance(module, torch.nn.Linear):
            key = layer_key(f"unet.{name}")
            deltas = []
            for _ in range(parents):
                up, down = (
                    torch.randn(s, generator=generator)
                    for s in ((len(module.weight), rank), (rank, module.in_features))
                )
                delta = LowRankDelta(up, down)
                deltas.append(delta.strength(STRENGTH * float(module.weight.norm()) / delta.norm()))
            slots[key], stacks[key] = Slot(module), Stack.of(deltas)
    return Pairing(stacks, sorted(stacks), {}), slots


class RandomModel:
    """What calibration asks of a host, on a model that knows nothing: noise for pictures, random numbers for prompts."""

    def __init__(self, unet: UNet2DConditionModel, size: Size):
        self.unet, self.size = unet, size
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # SDXL's

    def model(self) -> Model:
        return Model("random", "sdxl", str(self.unet.device), str(self.unet.dtype).removeprefix("torch."), "epsilon")

    def sample(self, prompt: str, seed: int, *_) -> Tensor:
        return torch.randn(1, 4, self.size.latent, self.size.latent, generator=torch.Generator().manual_seed(seed))

    def add_noise(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(latent, noise, t)

    def encode(self, text: str, resolution: int, negative: bool = False) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return torch.randn(1, 77, 2048, generator=generator), torch.randn(1, 1280, generator=generator)

    def predict(self, x: Tensor, t: Tensor, conds: Sequence[tuple]) -> Tensor:
        here = {"device": self.unet.device, "dtype": self.unet.dtype}
        states, pooled = (torch.cat(parts).to(**here) for parts in zip(*conds))
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).expand(len(x), -1).to(**here)
        added = {"text_embeds": pooled, "time_ids": sizes}
        told = self.unet(x.to(**here), t.to(here["device"]), encoder_hidden_states=states, added_cond_kwargs=added)
        return told.sample.float()


def measured(size: Size) -> dict:
    started = time.perf_counter()
    model = unet(size)
    pairing, slots = random_pair(model, size.rank)
    columns = learned_columns(pairing)
    result = {
        "widths": size.widths,
        "depth": size.depth,
        "pixels": 8 * size.latent,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(slots),
        "coefficients": int(columns.present.sum()),
        "rank": size.rank,
        "objectives": {},
    }
    with attach(slots, pairing.stacks) as router:
        for name, form in OBJECTIVES.items():
            parents = [{"lora": role, "role": role, "prompt": role} for role in ("subject", "style")]
            fields = {"parents": parents, "output": "merged", "objective": name, "at_once": 2, "samples": 2}
            if size.learns:
                fields |= {"samples": 16, "pictures": 4, **({} if name == "guided" else PAPER)}
            else:
                fields |= {"pictures": 1, "steps": 1}
            recipe = parse(fields)
            samples = calibrated(RandomModel(model, size), router, recipe, lambda _: None)
            done = ziplora(pairing, samples, settings_of(recipe), lambda _: None)
            m = torch.full(columns.present.shape, form.start, requires_grad=True)
            (form.lam * form.penalty(m, columns)).backward()
            first, last = done.history[0], done.history[-1]
            data, penalty = first["data_gradient"], float(m.grad.abs().mean())
            result["objectives"][name] = {
                "data gradient": data,
                "penalty gradient": penalty,
                "penalty / data": penalty / data,
                "error at m = 1": [round(e, 4) for e in done.summary["error_plain_sum"]],
            }
            if size.learns:
                result["objectives"][name] |= {
                    "steps": recipe.steps,
                    "lr": recipe.lr,
                    "mean |m| at the end": [round(v, 4) for v in last["mean_m"]],
                    "retained at the end": round(last["retained"], 4),
                    "held-out error at the end": [round(e, 4) for e in last["held_out"]],
                    "best step": done.summary["best_step"],
                }
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="SDXL's true size too: over 10 GB of weights")
    torch.manual_seed(0)
    results = []
    for size in SIZES + (FULL if parser.parse_args().full else []):
        results.append(measured(size))
        print(json.dumps(results[-1]), flush=True)
        made = {"machine": f"{platform.machine()}, CPU", "torch": torch.__version__}
        RESULT.write_text(
            json.dumps({"made": made, "‖ΔW‖ / ‖W‖": STRENGTH, "sizes": results}, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
