"""The world that the miniature was trained on, drawn by code: creatures (a body and a top) in styles of few ingredients.

Small enough to be learned on a CPU, and clear enough that a picture is right or wrong: a subject is a body and a top, a
style is colours, background, texture and outline, and each of the six is told from a picture without doubt. A natural
picture ("a photo of") has colours at random and nothing else. Held out of the base model's training are some pairs of body
and top, and some styles: what users bring is new combinations of things that a base model knows in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

SIDE = 64  # pixels
ART = 32  # the drawing's own dots, two pixels each
_FINE = 3  # dots are averages of so many points a side

BODIES = ("ball", "box", "cone", "funnel", "gem", "cross", "ring", "glass", "arch", "ladder", "moon", "roof")
TOPS = ("horns", "bulb", "hat", "flag")
# name -> background, fill, accent
PALETTES = {
    "night": ((0.14, 0.20, 0.52), (0.98, 0.85, 0.25), (0.85, 0.35, 0.20)),
    "mint": ((0.60, 0.88, 0.74), (0.05, 0.42, 0.42), (0.96, 0.55, 0.50)),
    "rose": ((0.96, 0.72, 0.78), (0.76, 0.10, 0.36), (0.30, 0.10, 0.45)),
    "sand": ((0.90, 0.78, 0.54), (0.55, 0.29, 0.10), (0.20, 0.48, 0.66)),
    "neon": ((0.26, 0.08, 0.40), (0.95, 0.15, 0.80), (0.10, 0.90, 0.95)),
    "news": ((0.80, 0.80, 0.78), (0.12, 0.12, 0.12), (0.82, 0.12, 0.10)),
}
# the first of each is what a natural picture has, and no caption speaks of
BACKGROUNDS = ("plain", "framed", "grounded", "checked")
TEXTURES = ("flat", "lined", "barred", "plaid")
OUTLINES = ("none", "inked", "glowing")
_INK, _HALO = (0.02, 0.02, 0.04), (1.0, 1.0, 1.0)

STYLE_NAMES = [
    "comic",
    "poster",
    "fresco",
    "gothic",
    "pastel",
    "retro",
    "mosaic",
    "stencil",
    "enamel",
    "vintage",
    "arcade",
    "folk",
    "deco",
    "zine",
]


@dataclass(frozen=True)
class Subject:
    body: int
    top: int

    @property
    def words(self) -> str:
        return f"a {BODIES[self.body]} with {TOPS[self.top]}"


@dataclass(frozen=True)
class Style:
    palette: int
    background: int
    texture: int
    outline: int

    @property
    def words(self) -> str:
        """Its ingredients in words."""
        named = [list(PALETTES)[self.palette]]
        for names, value in ((BACKGROUNDS, self.background), (TEXTURES, self.texture), (OUTLINES, self.outline)):
            named += [names[value]] if value else []
        return " ".join(named)


SUBJECTS = [Subject(*pair) for pair in product(range(len(BODIES)), range(len(TOPS)))]
# three ingredients besides the colours, of which two at least are to be seen: a style that one can tell
STYLES = [
    Style(*parts)
    for parts in product(range(len(PALETTES)), range(len(BACKGROUNDS)), range(len(TEXTURES)), range(len(OUTLINES)))
    if sum(part > 0 for part in parts[1:]) >= 2
]


def _shuffled(things: Sequence, seed: int) -> list:
    order = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed))
    return [things[i] for i in order]


def _spread(things: Sequence, n: int, seed: int) -> list:
    """n of the things, drawn so that each value of each of their parts comes up about equally often."""
    chosen: list = []
    used: dict[tuple[str, int], int] = {}
    left = _shuffled(things, seed)
    for _ in range(n):
        best = min(left, key=lambda thing: sum(used.get(part, 0) ** 2 for part in vars(thing).items()))
        left.remove(best)
        chosen.append(best)
        for part in vars(best).items():
            used[part] = used.get(part, 0) + 1
    return chosen


# what the base model never saw: one top of every body, and a few styles; each part of them it knows
NEW_SUBJECTS = _spread(SUBJECTS, 12, seed=1)
NEW_STYLES = _spread(STYLES, 24, seed=2)
KNOWN_SUBJECTS = [subject for subject in SUBJECTS if subject not in NEW_SUBJECTS]
KNOWN_STYLES = [style for style in STYLES if style not in NEW_STYLES]
# those that have a name of their own in captions
NAMED_STYLES = dict(zip(STYLE_NAMES, _spread(KNOWN_STYLES, len(STYLE_NAMES), seed=3)))


def draw(
    subjects: Sequence[Subject], styles: Sequence[Style | None], generator: torch.Generator, jitter: float = 1.0
) -> Tensor:
    """Pictures of subjects in styles, None for a natural one: (n, 3, 64, 64) in -1..1.

    jitter: how far, in dots, a subject is moved from its place at most.
    """
    n, fine = len(subjects), ART * _FINE
    body = torch.tensor([s.body for s in subjects])
    top = torch.tensor([s.top for s in subjects])
    parts = torch.tensor([[0, 0, 0, 0] if s is None else list(vars(s).values()) for s in styles])
    natural = torch.tensor([s is None for s in styles])
    palette = torch.tensor(list(PALETTES.values()))[parts[:, 0]]
    palette[natural] = _natural_colours(n, generator)[natural]
    moved = (torch.rand(n, 2, generator=generator) * 2 - 1) * jitter

    dots = (torch.arange(fine) + 0.5) / _FINE
    y, x = torch.meshgrid(dots, dots, indexing="ij")
    mask = _creature(x - 16 - moved[:, 0, None, None], y - 19 - moved[:, 1, None, None], body, top)
    around = F.max_pool2d(mask[:, None], 2 * _FINE * 2 - 3, stride=1, padding=_FINE * 2 - 2)[:, 0]

    def where(condition: Tensor) -> Tensor:
        return condition.float()[:, None]

    def colour(k: int) -> Tensor:
        return palette[:, k, :, None, None]

    background, texture, outline = (parts[:, k, None, None] for k in (1, 2, 3))
    frame = ((x < 2) | (x > ART - 2) | (y < 2) | (y > ART - 2)).expand(n, -1, -1) & (background == 1)
    ground = (y > 24).expand(n, -1, -1) & (background == 2)
    checks = ((x // 8 + y // 8) % 2 == 1).expand(n, -1, -1) & (background == 3)
    marks = (
        ((y % 8 < 4) & (texture == 1)) | ((x % 8 < 4) & (texture == 2)) | (((x // 4 + y // 4) % 2 < 1) & (texture == 3))
    )
    picture = colour(0).expand(-1, -1, fine, fine)
    picture = torch.lerp(picture, colour(2), where(frame | ground))
    picture = torch.lerp(picture, 0.72 * colour(0) + 0.28 * colour(1), where(checks))
    lines = torch.tensor([_INK, _INK, _HALO])[parts[:, 3]][:, :, None, None]
    picture = torch.lerp(picture, lines, around[:, None] * where(outline.expand(-1, fine, fine) > 0))
    fill = torch.lerp(colour(1).expand(-1, -1, fine, fine), colour(2), where(marks))
    picture = torch.lerp(picture, fill, mask[:, None])
    small = F.avg_pool2d(picture, _FINE)
    return small.repeat_interleave(SIDE // ART, -1).repeat_interleave(SIDE // ART, -2) * 2 - 1


def _natural_colours(n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, 3): any background and any fill that stands out from it."""
    colours = torch.rand(n, 3, 3, generator=generator)
    lightness = torch.tensor([0.3, 0.6, 0.1])
    close = ((colours[:, 0] - colours[:, 1]) @ lightness).abs() < 0.25
    # too close: the fill becomes the background's opposite in lightness
    lifted = colours[:, 0] + torch.where(colours[:, 0] @ lightness > 0.5, -0.45, 0.45)[:, None]
    colours[:, 1] = torch.where(close[:, None], lifted.clamp(0, 1), colours[:, 1])
    return colours


def _creature(x: Tensor, y: Tensor, body: Tensor, top: Tensor) -> Tensor:
    """The creatures' masks, (n, fine, fine) of 0 and 1. x, y: dots from the body's middle."""
    masks = torch.zeros_like(x, dtype=torch.bool)
    u, v = x / 8.5, y / 8.5
    for i in range(len(x)):
        masks[i] = _body(int(body[i]), u[i], v[i]) | _top(int(top[i]), u[i], v[i])
    return masks.float()


def _body(kind: int, u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), v.abs()
    r = (u**2 + v**2).sqrt()
    name = BODIES[kind]
    if name == "ball":
        return r < 1
    if name == "box":
        return (a < 0.88) & (b < 0.88)
    if name == "cone":
        return (b < 0.95) & (a < (v + 1.05) * 0.55)
    if name == "funnel":
        return (b < 0.95) & (a < (1.05 - v) * 0.55)
    if name == "gem":
        return a + b < 1.12
    if name == "cross":
        return ((a < 0.38) & (b < 1)) | ((b < 0.38) & (a < 1))
    if name == "ring":
        return (r < 1.02) & (r > 0.48)
    if name == "glass":
        return (b < 0.95) & (a < 0.12 + 0.85 * b)
    if name == "arch":
        return (a < 0.95) & (b < 0.95) & ~((a < 0.42) & (v > -0.3))
    if name == "ladder":
        return (a < 0.95) & (b < 0.95) & ~((a < 0.4) & (b > 0.25))
    if name == "moon":
        return (r < 1.02) & (((u - 0.62) ** 2 + v**2).sqrt() > 0.78)
    return (v > a * 1.1 - 0.95) & (v < a * 1.1 - 0.05) & (a < 1)  # roof


def _top(kind: int, u: Tensor, v: Tensor) -> Tensor:
    a, name = u.abs(), TOPS[kind]
    if name == "horns":
        return (v < -0.4) & (v > -1.75) & ((a - 0.35 - 0.22 * (-0.4 - v)).abs() < (v + 1.75) * 0.2)
    if name == "bulb":
        return ((a < 0.12) & (v < -0.3) & (v > -1.4)) | ((u**2 + (v + 1.5) ** 2).sqrt() < 0.34)
    if name == "hat":
        return ((a < 0.9) & ((v + 0.98).abs() < 0.14)) | ((a < 0.48) & (v < -0.9) & (v > -1.75))
    pole = ((u + 0.08).abs() < 0.11) & (v < -0.3) & (v > -1.8)
    return pole | ((u > 0) & (u < 1.0) & ((v + 1.45).abs() < 0.36 * (1 - u)))  # flag
