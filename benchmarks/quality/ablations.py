"""The default, with one thing changed at a time. Rows of the same harness as the main table."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from benchmarks.quality.pairs import CACHE
from benchmarks.quality.rows import Opened, Row, Shown, merged
from ziplora_lib import calibration
from ziplora_lib.hosts import world
from ziplora_lib.hosts.samples import STYLE_WORD, style_training, subject_training, subject_words
from ziplora_lib.merge.method import Calibration, Sample
from ziplora_lib.merge.objective import (
    OBJECTIVES,
    Columns,
    Objective,
    cosine,
    l2_error,
    overlap,
    product,
    relative_error,
)


def mse(prediction: Tensor, target: Tensor, bare: Tensor) -> Tensor:
    """Mean squared error of each sample: what the best-known reimplementation takes."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def relative_norm(prediction: Tensor, target: Tensor, bare: Tensor) -> Tensor:
    """‖D_m − D_i‖ / ‖D_i − D_0‖ of each sample: unit-free, and not squared, so that no parent's error drowns the other's."""
    return relative_error(prediction, target, bare).clamp_min(1e-12).sqrt()


def product_mean(m: Tensor, columns: Columns) -> Tensor:
    """|m_c · m_s| averaged over each layer's columns and summed over layers, likewise."""
    m = m * columns.present
    return sum((part[0] * part[1]).abs().mean() for part in m.split(columns.sizes, dim=1))


def nothing(m: Tensor, columns: Columns) -> Tensor:
    return 0 * m.sum()


ERRORS = {"relative": relative_error, "relative-norm": relative_norm, "l2": l2_error, "mse": mse}
PENALTIES = {"overlap": overlap, "cosine": cosine, "product": product, "product-mean": product_mean, "none": nothing}


def with_form(on: Opened, error: str, penalty: str, lam: float, start: float = 0.5) -> AbstractContextManager[Shown]:
    """Another form of the loss, from the default's start."""
    form = Objective(ERRORS[error], PENALTIES[penalty], lam, start)
    with patch.dict(OBJECTIVES, {"relative": form}):
        return merged(on, "ziplora", lam=lam, start=start)


def attention_only(on: Opened) -> AbstractContextManager[Shown]:
    """Coefficients on attention alone, the other layers summed."""
    kept = [key for key in on.pairing.learned if "_attn1_" in key or "_attn2_" in key]
    return merged(replace(on, pairing=replace(on.pairing, learned=kept)), "ziplora")


def worded_otherwise(on: Opened) -> AbstractContextManager[Shown]:
    """The LoRAs' words in other sentences than they were trained on."""
    subject, _ = on.pair.shown
    prompts = (f"a picture of {subject_words(subject)}", f"a drawing in {STYLE_WORD} style")
    parents = [{**parent, "prompt": words} for parent, words in zip(on.fields["parents"], prompts)]
    return merged(replace(on, fields={**on.fields, "parents": parents}), "ziplora")


def with_references(on: Opened) -> AbstractContextManager[Shown]:
    """Calibration pictures: those that the LoRAs were trained on, instead of their own."""
    subject, style = on.pair.shown
    parents = []
    for parent, training in zip(
        on.fields["parents"], (subject_training(subject, seed=on.seed), style_training(style, seed=on.seed))
    ):
        folder = CACHE / "references" / f"{training.name}-{on.pair.subject}-{on.pair.style}-{on.seed}"
        parents.append({**parent, "reference": [str(_saved(training.pictures, folder))]})
    return merged(replace(on, fields={**on.fields, "parents": parents}), "ziplora")


def _saved(pictures: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, picture in enumerate(pictures):
        pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def on_trajectories(on: Opened) -> AbstractContextManager[Shown]:
    """Samples from where each LoRA's own sampling comes by, instead of pictures noised to random levels."""

    def calibrated(host, router, recipe, callback) -> Calibration:
        own = calibration_as_it_is(host, router, recipe, callback)
        by_parent = [[s for s in own.train if s.parent == i] for i in range(2)]
        train = [s for row in zip(*(_on_trajectory(host, router, mine, recipe) for mine in by_parent)) for s in row]
        return replace(own, train=train)

    calibration_as_it_is = calibration.calibrated
    with patch.object(calibration, "calibrated", calibrated):
        return merged(on, "ziplora")


@torch.no_grad()
def _on_trajectory(host, router, samples: list[Sample], recipe) -> list[Sample]:
    """As many samples, on the same prompts, but with x and t from sampling with that LoRA alone, without guidance."""
    scheduler = DPMSolverMultistepScheduler.from_config(host.pipe.scheduler.config, timestep_spacing="trailing")
    generator = torch.Generator().manual_seed(recipe.seed + samples[0].parent)
    made: list[Sample] = []
    steps = 10
    while len(made) < len(samples):
        few = samples[len(made) : len(made) + 2 * steps : steps] or samples[-1:]
        scheduler.set_timesteps(steps)
        x = torch.randn(len(few), 4, world.SIDE // 8, world.SIDE // 8, generator=generator)
        for t in scheduler.timesteps:
            level = t.expand(len(few))
            router.alone(samples[0].parent)
            target = host.predict(x, level, [s.alone for s in few])
            router.bare()
            bare = host.predict(x, level, [s.cond for s in few])
            for k, s in enumerate(few):
                made.append(replace(s, x=x[k : k + 1], t=t[None], target=target[k : k + 1], bare=bare[k : k + 1]))
            x = scheduler.step(target, t, x).prev_sample
    order = torch.randperm(len(made), generator=generator)[: len(samples)]
    return [made[i] for i in order]


def zip_with(title: str, **fields) -> Row:
    return Row(title, merged, {"method": "ziplora", **fields})


ABLATIONS: Mapping[str, Row] = {
    "default": zip_with("default"),
    **{f"lam-{lam:g}": zip_with(f"λ = {lam:g}", lam=lam) for lam in (0.0, 0.1, 1.0, 3.0)},
    **{f"start-{start:g}": zip_with(f"start {start:g}", start=start) for start in (0.3, 0.7, 1.0)},
    "start-1-lam-0": zip_with("start 1, λ = 0", start=1.0, lam=0.0),
    **{f"lr-{lr:g}": zip_with(f"lr {lr:g}", lr=lr) for lr in (0.003, 0.03)},
    **{f"steps-{steps}": zip_with(f"{steps} steps", steps=steps) for steps in (25, 50, 300)},
    "batch-4": zip_with("4 samples of each a step", batch=4),
    **{f"empty-{share:g}": zip_with(f"{share:.0%} empty prompts", empty_share=share) for share in (0.0, 0.5)},
    **{f"samples-{n}": zip_with(f"{n} samples", samples=n) for n in (16, 256)},
    **{f"pictures-{n}": zip_with(f"{n} picture{'s' * (n > 1)} a LoRA", pictures=n) for n in (1, 16)},
    "mse": Row("mean squared error, λ = 0", with_form, {"error": "mse", "penalty": "none", "lam": 0.0}),
    "mse-mean": Row(
        "mean squared error, product averaged by layer, λ = .01",
        with_form,
        {"error": "mse", "penalty": "product-mean", "lam": 0.01},
    ),
    "l2": Row("unsquared norm, λ = 0", with_form, {"error": "l2", "penalty": "none", "lam": 0.0}),
    "l2-product": Row(
        "unsquared norm, product summed, λ = .01", with_form, {"error": "l2", "penalty": "product", "lam": 0.01}
    ),
    "relative-cosine": Row(
        "relative, cosine, λ = .01", with_form, {"error": "relative", "penalty": "cosine", "lam": 0.01}
    ),
    "norm": Row(
        "relative, not squared, start 1, λ = 0",
        with_form,
        {"error": "relative-norm", "penalty": "none", "lam": 0, "start": 1},
    ),
    "norm-overlap": Row(
        "relative, not squared, start 1, λ = .3",
        with_form,
        {"error": "relative-norm", "penalty": "overlap", "lam": 0.3, "start": 1},
    ),
    "attention": Row("attention only learned", attention_only),
    "references": Row("the training pictures as references", with_references),
    "trajectories": Row("points on the LoRAs' own trajectories", on_trajectories),
    "worded": Row("prompts worded otherwise", worded_otherwise),
}
