"""What every merge method takes and gives: (stacked factors, calibration) -> stacked factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from ziplora_lib.lora.stack import Stack
    from ziplora_lib.merge.attach import Down, Visit
    from ziplora_lib.merge.pairing import Pairing


# Called with what is known at each step; a true answer asks to stop and keep the best so far.
Callback = Callable[[dict], Any]


@dataclass(frozen=True)
class Sample:
    """A calibration sample: a noised latent, the prompt, and what the model predicts for it.

    parent: whose sample it is; x: (1, 4, h, w); t: (1,) noise level 0…999; text: the prompt; cond: the prompt as the plain
    sum of the LoRAs reads it; target: the prediction with that LoRA alone, None where no step looks at it; bare: without
    any, None where the loss does not ask for it either; alone: the prompt as that LoRA alone reads it; empty: the empty
    prompt as the plain sum reads it, where predictions are compared under guidance: target and bare are then guided too.
    Tensors other than the read prompts lie on the CPU in fp32.
    """

    parent: int
    x: Tensor
    t: Tensor
    text: str
    cond: Any
    target: Tensor | None = None
    bare: Tensor | None = None
    alone: Any = None
    empty: Any = None


@dataclass(frozen=True)
class Calibration:
    """The samples, and the live model.

    predict(samples, downs): (B, 4, h, w), what the model predicts with all LoRAs and with other downs in the layers given,
    under guidance where the samples are; differentiable. observe(samples, visits): runs each sample through the LoRA that
    it belongs to, alone, and shows each of the layers given its inputs. device: where the model computes, and the
    coefficients are learned.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    predict: Callable[[Sequence[Sample], Mapping[str, Down]], Tensor]
    device: str = "cpu"
    observe: Callable[[Sequence[Sample], Mapping[str, Visit]], None] | None = None


@dataclass(frozen=True)
class State:
    """Where a run of gradient steps stands. step: the last one done; facts: as JSON."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict


class Keeper(Protocol):
    """Keeps a run's state, to go on from it after the run was killed."""

    def found(self) -> State | None:
        """The state of an earlier run of the same merge, if there is one."""

    def keep(self, state: Callable[[], State]) -> None:
        """Called after every step; asks for the state where it is time to keep it."""


@dataclass(frozen=True)
class Settings:
    """A method's own settings, as the recipe has them. at_once: samples in one pass; keeper: None to keep nothing."""

    objective: str = "guided"
    steps: int = 50
    lr: float = 0.02
    lam: float = 0.0
    start: float = 1.0
    batch: int = 1
    at_once: int = 1
    seed: int = 0
    ridge: float | None = None
    keeper: Keeper | None = None


@dataclass(frozen=True)
class Merged:
    """A merge: its stacks, ready to be saved, and how they came about.

    coefficients: what was learned by layer key, (P, columns), or (R,) where each rank has one; summary: numbers for people
    and for the metadata; history: one dict a step; stopped: ended by the callback; warnings: in words.
    """

    stacks: dict[str, Stack]
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    stopped: bool = False
    warnings: list[str] = field(default_factory=list)


Method = Callable[["Pairing", "Calibration | None", Settings, Callback], Merged]
