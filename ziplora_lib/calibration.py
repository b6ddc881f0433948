"""Calibration samples: what the loss is taken on.

By default each LoRA alone makes its own pictures from its own prompt, so nobody has to keep training pictures; the samples
are those pictures, noised to every level, with what that LoRA alone predicts, and where it is asked for the bare model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.hosts.host import Cond, Host
from ziplora_lib.merge.attach import Down, Router, Visit
from ziplora_lib.merge.method import Calibration, Callback, Sample
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.recipe import Recipe

LEVELS = 1000
PICTURE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# the readers that a reference picture can reach, whatever its name ends in
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# reference pictures of a LoRA; of one its bytes, and its pixels, below what Pillow itself takes for an attack
MOST_PICTURES, MOST_BYTES, MOST_PIXELS = 64, 100_000_000, 64_000_000


@dataclass(frozen=True)
class _Prompts:
    """One prompt as three models read it: the LoRA alone, the bare model, and the LoRAs together."""

    text: str
    alone: Cond
    bare: Cond
    merged: Cond


def references(parent_reference: Sequence[str], resolution: int) -> list[Image.Image]:
    """Reference pictures, cropped to the middle square. Raises BadInput for what is no readable picture, or too large."""
    files: list[Path] = []
    for entry in map(Path, parent_reference):
        found = sorted(f for f in entry.iterdir() if f.suffix.lower() in PICTURE_FILES) if entry.is_dir() else [entry]
        if not found:
            raise BadInput(
                "the folder holds no pictures",
                file=str(entry),
                remedy=f"Put {', '.join(sorted(PICTURE_FILES))} files there, or leave the references out",
            )
        files += found
    if len(files) > MOST_PICTURES:
        raise BadInput(
            f"there are {len(files)} reference pictures of one LoRA, and {MOST_PICTURES} are the most",
            remedy="Choose some of them",
        )
    return [_reference(file, resolution) for file in files]


def _reference(file: Path, resolution: int) -> Image.Image:
    try:
        size, pixels = file.stat().st_size, 0
        if size <= MOST_BYTES:
            with Image.open(file, formats=PICTURE_FORMATS) as picture:  # the header alone, so far
                pixels = picture.width * picture.height
                if pixels <= MOST_PIXELS:
                    return ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (resolution, resolution))
    except Exception as error:  # Pillow's readers raise a dozen kinds, all of which mean this
        raise BadInput("is not a readable picture", file=str(file), remedy="Remove it or save it again") from error
    raise BadInput(
        f"is too large a picture ({size / 1e6:.0f} MB, {pixels / 1e6:.0f} million pixels)",
        file=str(file),
        remedy=f"Make it smaller than {MOST_BYTES / 1e6:.0f} MB and {MOST_PIXELS / 1e6:.0f} million pixels",
    )


def calibrated(host: Host, router: Router, recipe: Recipe, callback: Callback) -> Calibration:
    """The samples and the live model, as methods take them. Raises Stopped as `calibrate` does."""
    train, held_out = calibrate(host, router, recipe, callback)
    learn_text, guidance = recipe.text_encoders == "learn", recipe.loss_guidance

    def run_model(samples: Sequence[Sample], conds: Sequence[Cond]) -> Tensor:
        return host.predict(torch.cat([s.x for s in samples]), torch.cat([s.t for s in samples]), conds).float()

    def predict(samples: Sequence[Sample], downs: Mapping[str, Down]) -> Tensor:
        router.merged(downs)
        guided = [s for s in samples if s.empty is not None]
        conds = {s.text: s.cond for s in samples}
        if guided:
            conds[""] = guided[0].empty
        if learn_text:  # prompts are read with the coefficients as they are now
            gradients = torch.is_grad_enabled()
            conds = {text: host.encode(text, recipe.resolution, not text, gradients) for text in conds}
        told = run_model([*samples, *guided], [conds[s.text] for s in samples] + [conds[""] for _ in guided])
        own, empty = told[: len(samples)].split(1), iter(told[len(samples) :].split(1))
        return torch.cat([x if s.empty is None else _guided(x, next(empty), guidance) for s, x in zip(samples, own)])

    @torch.no_grad()
    def observe(samples: Sequence[Sample], visits: Mapping[str, Visit]) -> None:
        with router.watching(visits):
            conds = [s.alone for s in samples]
            if learn_text:  # the text encoders' layers are looked at as well
                for k, sample in enumerate(samples):
                    router.alone(sample.parent)
                    conds[k] = host.encode(sample.text, recipe.resolution, not sample.text)
            router.alone(*(s.parent for s in samples))
            run_model(samples, conds)

    return Calibration(train, held_out, predict, host.model().device, observe)


@torch.no_grad()
def calibrate(host: Host, router: Router, recipe: Recipe, callback: Callback) -> tuple[list[Sample], list[Sample]]:
    """The training samples and the held-out ones (fresh noise on the same pictures, own prompts), in a fixed order.

    All predictions of two LoRAs' samples come from one batched pass, routed by row; those that no step will look at are
    not made. Under guidance they are guided against the bare model's empty prompt: what a LoRA of its own does to the empty
    prompt is the other's disturbance. Raises Stopped when the callback asks to stop: there is nothing to keep yet.
    """
    held_out = recipe.held_out
    total = sum(len(p.reference) or recipe.pictures for p in recipe.parents) + recipe.samples + held_out
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        if callback({"phase": "calibrate", "step": done, "steps": total, "what": what}):
            raise Stopped

    latents, prompts = [], []
    for i, parent in enumerate(recipe.parents):
        given = references(parent.reference, recipe.resolution)
        total += (len(given) - len(parent.reference)) if given else 0
        latents.append(_latents(host, router, recipe, i, given, advance))
        prompts.append([_encode(host, router, i, text, recipe.resolution) for text in (parent.prompt, "")])
    generator = torch.Generator().manual_seed(recipe.seed)
    # two LoRAs at once, however many there are: memory must not grow with them
    together = 1 if recipe.at_once == 1 else 2
    with_bare, guidance = OBJECTIVES[recipe.objective].against_bare, recipe.loss_guidance
    train, judging = [], []
    for samples, n, taught, share in (
        (train, recipe.samples, recipe.taught, recipe.empty_share),
        (judging, held_out, held_out, 0.0),
    ):
        drawn = [_drawn(latents[i], n, share, generator) for i in range(len(recipe.parents))]
        for k, row in enumerate(zip(*drawn)):
            noised = [_noised(host, i, draw, prompts[i]) for i, draw in enumerate(row)]
            if k < taught:
                for first in range(0, len(noised), together):
                    some = noised[first : first + together]
                    samples += _predicted(host, router, some, prompts, guidance, with_bare or samples is judging)
            else:
                samples += noised
            advance("predicting")
    return train, judging


def _latents(host: Host, router: Router, recipe: Recipe, i: int, given: list[Image.Image], advance) -> Tensor:
    parent, title, made = recipe.parents[i], recipe.titles[i], []
    if given:
        for picture in given:
            made.append(host.encode_picture(picture))
            advance(f"encoding {title} pictures")
    else:
        router.alone(i)
        for k in range(recipe.pictures):
            seed = recipe.seed + 1000 * (i + 1) + k
            made.append(host.sample(parent.prompt, seed, recipe.resolution, recipe.sampler_steps, recipe.guidance))
            advance(f"making {title} pictures")
    return torch.cat([latent.float().cpu() for latent in made])


def _encode(host: Host, router: Router, i: int, text: str, resolution: int) -> _Prompts:
    # the empty prompt is encoded as samplers encode the negative one: that is where guidance meets it
    def encode() -> Cond:
        return host.encode(text, resolution, negative=not text)

    router.alone(i)
    alone = encode()
    router.bare()
    bare = encode()
    router.merged()
    return _Prompts(text, alone, bare, encode())


def _drawn(latents: Tensor, n: int, share: float, generator: torch.Generator) -> list[tuple]:
    """n draws (latent, noise, level, on the empty prompt?); the levels are spread evenly, in random order."""
    levels = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * LEVELS).long().clamp_max(LEVELS - 1)
    levels = levels[torch.randperm(n, generator=generator)]
    empty = torch.randperm(n, generator=generator) < round(share * n)
    noise = torch.randn(n, *latents.shape[1:], generator=generator)
    return [(latents[k % len(latents)][None], noise[k][None], levels[k : k + 1], bool(empty[k])) for k in range(n)]


def _noised(host: Host, i: int, draw: tuple, prompts: list[_Prompts]) -> Sample:
    latent, noise, t, empty = draw
    read = prompts[int(empty)]
    return Sample(i, host.add_noise(latent, noise, t).float().cpu(), t, read.text, read.merged, alone=read.alone)


def _predicted(
    host: Host,
    router: Router,
    samples: Sequence[Sample],
    prompts: list[list[_Prompts]],
    guidance: float,
    with_bare: bool,
) -> list[Sample]:
    """The samples with their targets, if asked for also what the bare model says; one pass for all of it."""
    rows: list[tuple[int, int | None, Cond]] = []  # (sample, LoRA, prompt)
    for k, s in enumerate(samples):
        read, empty = prompts[s.parent][int(not s.text)], prompts[s.parent][1]
        rows.append((k, s.parent, read.alone))
        if with_bare:
            rows.append((k, None, read.bare))
        if s.text and guidance > 1:
            rows.append((k, None, empty.bare))
    router.alone(*(who for _, who, _ in rows))
    of_row = [samples[k] for k, *_ in rows]
    told = host.predict(torch.cat([s.x for s in of_row]), torch.cat([s.t for s in of_row]), [c for *_, c in rows])
    found: list[list[Tensor]] = [[] for _ in samples]
    for (k, *_), prediction in zip(rows, told.float().cpu().split(1)):
        found[k].append(prediction)
    taught = []
    for s, predictions in zip(samples, found):
        read_empty = None
        if s.text and guidance > 1:
            read_empty, free = prompts[s.parent][1].merged, predictions.pop()
            predictions = [_guided(prediction, free, guidance) for prediction in predictions]
        target, bare = predictions if with_bare else (*predictions, None)
        taught.append(replace(s, target=target, bare=bare, empty=read_empty))
    return taught


def _guided(told: Tensor, empty: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598)."""
    return empty + guidance * (told - empty)
