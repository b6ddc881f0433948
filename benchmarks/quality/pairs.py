"""Which LoRAs are merged: unseen subjects, unseen styles, and the files that were trained on them.

Each subject and each style is in two of the twenty pairs; the validation pairs, on which settings are chosen, share none
with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ziplora_lib.hosts import world
from ziplora_lib.hosts.miniature import WEIGHTS
from ziplora_lib.hosts.samples import Training, style_training, subject_training, train
from ziplora_lib.hosts.world import Style, Subject


def weights_hash() -> str:
    """Which miniature: what was made with another one counts for nothing."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12]


CACHE = Path(__file__).parents[1] / ".cache" / weights_hash()
LORAS = CACHE / "loras"
JOINT_STEPS = 400
# how a LoRA is trained, learning rate and steps: lightly, and overtrained (1,000 steps, as in arXiv 2311.13600)
REGIMES = {"light": (1e-3, 250), "strong": (3e-3, 1000)}
# and lightly, with both text encoders: for one question of the ablations
TEXT = {"text": (1e-3, 250)}
PAIRS, VALIDATION = 20, 8


@dataclass(frozen=True)
class Pair:
    """One unseen subject and one unseen style, by their numbers in the world's lists."""

    subject: int
    style: int

    @property
    def shown(self) -> tuple[Subject, Style]:
        return world.NEW_SUBJECTS[self.subject], world.NEW_STYLES[self.style]

    @property
    def name(self) -> str:
        subject, style = self.shown
        return f"{subject.words} | {style.words}"


def pairs() -> list[Pair]:
    return [Pair(i % 10, (i + 4 * (i // 10)) % 10) for i in range(PAIRS)]


def validation_pairs() -> list[Pair]:
    return [Pair(10 + (i + i // 4) % 2, 10 + i % 4) for i in range(VALIDATION)]


def files(pair: Pair, regime: str, seed: int) -> tuple[Path, Path]:
    """The pair's two LoRAs, trained if they are not there yet."""
    subject, style = pair.shown
    return (
        _file(f"subject-{pair.subject}-{seed}", regime, partial(subject_training, subject, seed=seed)),
        _file(f"style-{pair.style}-{seed}", regime, partial(style_training, style, seed=seed)),
    )


def joint_file(pair: Pair, seed: int) -> Path:
    """One LoRA trained on both at once: what a merge can hope for."""
    path = LORAS / f"joint-{pair.subject}-{pair.style}-{seed}-{JOINT_STEPS}.safetensors"
    return path if path.exists() else train(joint_training(*pair.shown, path.stem, seed), LORAS, JOINT_STEPS)


def training(regime: str) -> tuple[float, int]:
    """The regime's learning rate and steps."""
    return (REGIMES | TEXT)[regime]


def _file(name: str, regime: str, made: Callable[..., Training]) -> Path:
    lr, steps = training(regime)
    path = LORAS / f"{name}-{regime}-{lr:g}-{steps}.safetensors"
    return path if path.exists() else train(made(name=path.stem, lr=lr, text_encoders=regime in TEXT), LORAS, steps)


def joint_training(subject: Subject, style: Style, name: str, seed: int = 0) -> Training:
    """One LoRA from the pictures of both, each with its own captions; batches hold as many of each as of the other."""
    one, other = subject_training(subject, seed=seed), style_training(style, seed=seed)
    times = round(len(one.pictures) / len(other.pictures))
    pictures = torch.cat([one.pictures, *[other.pictures] * times])
    return replace(one, name=name, pictures=pictures, captions=[*one.captions, *list(other.captions) * times], batch=12)
