"""The default, with one thing changed at a time. Rows of the same harness as the main table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from benchmarks.methods import COMPARED
from benchmarks.quality.pairs import CACHE
from benchmarks.quality.rows import Opened, Row, Shown, by_parent, in_weights, merged, summed
from ziplora_lib import calibration
from ziplora_lib.hosts import world
from ziplora_lib.hosts.samples import STYLE_WORD, style_training, subject_training, subject_words
from ziplora_lib.merge.method import Calibration, Callback, Merged, Sample, Settings
from ziplora_lib.merge.objective import (
    OBJECTIVES,
    Columns,
    cosine,
    l2_error,
    overlap,
    product,
    relative_error,
)
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.merge.ziplora import beginning, ziplora


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


@contextmanager
def with_form(
    on: Opened, error: str, penalty: str, lam: float, start: float = 1.0, warm_start: bool = True, **fields
) -> Iterator[Shown]:
    """Another form of the loss, or from the LoRAs themselves."""
    form = replace(OBJECTIVES["guided"], error=ERRORS[error], penalty=PENALTIES[penalty], warm_start=warm_start)
    with patch.dict(OBJECTIVES, {"guided": form}), merged(on, "ziplora", lam=lam, start=start, **fields) as shown:
        yield shown


def text_learned(on: Opened) -> AbstractContextManager[Shown]:
    """Coefficients on the text encoders too, where the LoRAs have such layers."""
    everything = [key for key in on.pairing.stacks if key in on.slots]
    return merged(replace(on, pairing=replace(on.pairing, learned=everything)), "ziplora", text_encoders="learn")


@contextmanager
def from_method(on: Opened, first: str, only: str = "", **fields) -> Iterator[Shown]:
    """Coefficients learned on top of what another method made of the factors, of the layers so named."""

    def both(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
        where = [key for key in pairing.learned if only in key]
        begun = COMPARED[first](replace(pairing, learned=where), calibration, settings, callback)
        there = replace(pairing, stacks=begun.stacks)
        return ziplora(there, beginning(calibration, there), settings, callback)

    cold = {"guided": replace(OBJECTIVES["guided"], warm_start=False)}
    with (
        patch.dict(OBJECTIVES, cold),
        patch.dict(COMPARED, {"ziplora": both}),
        merged(on, "ziplora", **fields) as shown,
    ):
        yield shown


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


@contextmanager
def on_trajectories(on: Opened) -> Iterator[Shown]:
    """Samples from where each LoRA's own sampling comes by, instead of pictures noised to random levels."""

    def calibrated(host, router, recipe, callback) -> Calibration:
        own = calibration_as_it_is(host, router, recipe, callback)
        by_parent = [[s for s in own.train if s.parent == i] for i in range(2)]
        train = [s for row in zip(*(_on_trajectory(host, router, mine, recipe) for mine in by_parent)) for s in row]
        return replace(own, train=train)

    calibration_as_it_is = calibration.calibrated
    with patch.object(calibration, "calibrated", calibrated), merged(replace(on, made={}), "ziplora", **PLAIN) as shown:
        yield shown


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


@contextmanager
def sparse(on: Opened, parent: int, share: float) -> Iterator[Shown]:
    """A LoRA alone, without this share of each layer's smallest elements: the paper's observation 2."""

    def kept(delta: Tensor) -> Tensor:
        dropped = delta.abs().flatten().kthvalue(max(1, int(share * delta.numel()))).values
        return torch.where(delta.abs() > dropped, delta, 0.0)

    deltas = {key: [kept(parts[parent])] for key, parts in by_parent(on.pairing.stacks).items()}
    with in_weights(on, deltas) as choose:
        choose([1.0])
        yield Shown(lambda _: None, balances=False)


@contextmanager
def against_its_own(on: Opened) -> Iterator[Shown]:
    """Each LoRA guided against what it makes of the empty prompt itself, instead of what the bare model does."""

    def predicted(host, router, samples, prompts, guidance, with_bare) -> list[Sample]:
        made = predicted_as_it_is(host, router, samples, prompts, guidance, with_bare)
        for k, s in enumerate(made):
            if s.empty is not None:
                router.bare()
                of_bare = host.predict(s.x, s.t, [prompts[s.parent][1].bare]).float().cpu()
                router.alone(s.parent)
                of_own = host.predict(s.x, s.t, [prompts[s.parent][1].alone]).float().cpu()
                # empty + g (told - empty) = (1 - g) empty + g told
                made[k] = replace(s, target=s.target + (1 - guidance) * (of_own - of_bare))
        return made

    predicted_as_it_is = calibration._predicted
    with patch.object(calibration, "_predicted", predicted), merged(replace(on, made={}), "ziplora") as shown:
        yield shown


def zip_with(title: str, **fields) -> Row:
    return Row(title, merged, {"method": "ziplora", **fields})


def formed(title: str, **fields) -> Row:
    return Row(title, with_form, fields)


PLAIN = {"loss_guidance": 1.0}
ABLATIONS: Mapping[str, Row] = {
    "default": zip_with("default"),
    **{f"guidance-{g:g}": zip_with(f"loss under guidance {g:g}", loss_guidance=g) for g in (1.0, 2.0, 5.0)},
    "own-empty": Row("each LoRA guided against its own empty prompt", against_its_own),
    "empty": zip_with("no guidance, 25% empty prompts", empty_share=0.25, **PLAIN),
    "prototype": formed(
        "no guidance, 25% empty prompts, relative errors squared, overlap λ = .3, start .5",
        error="relative",
        penalty="overlap",
        lam=0.3,
        start=0.5,
        warm_start=False,
        empty_share=0.25,
        steps=100,
        lr=0.01,
        **PLAIN,
    ),
    "relative": formed("relative errors, squared", error="relative", penalty="none", lam=0.0),
    "relative-norm": formed("relative errors, not squared", error="relative-norm", penalty="none", lam=0.0),
    "mse": formed("mean squared errors", error="mse", penalty="none", lam=0.0),
    "mse-mean": formed(
        "mean squared errors, product averaged by layer, λ = .01", error="mse", penalty="product-mean", lam=0.01
    ),
    "overlap": zip_with("overlap, λ = 3", lam=3.0),
    "cosine": formed("cosine, λ = .01", error="l2", penalty="cosine", lam=0.01),
    "product": formed("product summed, λ = .01", error="l2", penalty="product", lam=0.01),
    **{f"start-{start:g}": zip_with(f"start {start:g}", start=start) for start in (0.5, 0.7)},
    **{f"lr-{lr:g}": zip_with(f"lr {lr:g}", lr=lr) for lr in (0.005, 0.05)},
    "steps-25": zip_with("25 steps", steps=25),
    "steps-100": zip_with("100 steps, lr .01", steps=100, lr=0.01),
    "steps-300": zip_with("300 steps", steps=300),
    "samples-16": zip_with("16 samples of each", samples=16),
    "pictures-1": zip_with("one picture of each", pictures=1),
    "text-learned": Row("text encoders learned", text_learned),
    "attention": Row("attention only learned", attention_only),
    "references": Row("the training pictures as references", with_references),
    "trajectories": Row("no guidance, points on the LoRAs' own trajectories", on_trajectories),
    "worded": Row("prompts worded otherwise", worded_otherwise),
    "weak-style-sum": Row("plain sum, style at .6", summed, strengths=(1.0, 0.6)),
    "weak-style": Row("default, style at .6", merged, {"method": "ziplora"}, strengths=(1.0, 0.6)),
    "weak-subject-sum": Row("plain sum, subject at .6", summed, strengths=(0.6, 1.0)),
    "weak-subject": Row("default, subject at .6", merged, {"method": "ziplora"}, strengths=(0.6, 1.0)),
    "from-regmean": Row("from RegMean instead of SSR-Merge", from_method, {"first": "regmean"}),
    "from-regmean-cross": Row(
        "from RegMean of cross-attention alone", from_method, {"first": "regmean", "only": "_attn2_"}
    ),
    "subject-sparse": Row("subject alone, smallest 80% of elements dropped", sparse, {"parent": 0, "share": 0.8}),
    "style-sparse": Row("style alone, smallest 80% of elements dropped", sparse, {"parent": 1, "share": 0.8}),
}
