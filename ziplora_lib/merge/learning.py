"""Coefficients learned by gradient, everything else frozen: the loop that ziplora shares with the benchmark's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ziplora_lib.errors import MergeFailed, NotFinite
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import Down
from ziplora_lib.merge.judging import errors_of, groups, held_out_errors
from ziplora_lib.merge.method import Calibration, Callback, Merged, Sample, Settings, State
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.merge.pairing import Pairing

# powers of two change nothing in fp32, and keep fp16's small gradients above its smallest number
LOSS_SCALE = 2.0**16
# below this share of the plain sum's norm the merge has faded away rather than learned
COLLAPSED = 0.15
# a parent whose mean |m| ends below this has been switched off
SWITCHED_OFF = 0.05


class Coefficients(Protocol):
    """What a method learns: one tensor m, of `shape`, and what it makes of the layers."""

    shape: tuple[int, ...]

    def by_layer(self, m: Tensor) -> dict[str, Tensor]:
        """Each learned layer's coefficients, as views."""

    def folded_down(self, stack: Stack, values: Tensor) -> Tensor:
        """A layer's `down` with its coefficients folded in; differentiable in them. -> (R, in…)"""

    def own(self, m: Tensor, i: int) -> Tensor:
        """LoRA i's coefficients of the layers that it has, in one row."""

    def mean_abs(self, m: Tensor) -> list[float]:
        """Mean |m| of every LoRA."""

    def retained(self, m: Tensor) -> float:
        """‖ΔW_m‖ / ‖ΔW_c + ΔW_s‖ over the learned layers."""

    def penalty(self, m: Tensor) -> Tensor:
        """What is added to the data term, times λ. -> ()"""


def learn(
    name: str,
    coefficients: Coefficients,
    pairing: Pairing,
    calibration: Calibration,
    settings: Settings,
    callback: Callback,
    summed: list[float],
) -> Merged:
    """Learns the coefficients with Adam and keeps the best that were seen on the held-out samples.

    summed: the errors of the plain sum, for the summary.

    Coefficients, loss and optimiser are fp32 whatever the model computes in. Raises MergeFailed when no gradient arrives,
    or when the model's precision gives no finite loss.
    """
    if not any(stack.up.any() and stack.down.any() for stack in map(pairing.stacks.get, pairing.learned)):
        raise MergeFailed("The LoRAs are zero on the layers they share: there is nothing to learn.")
    error, parents = OBJECTIVES[settings.objective].error, pairing.parents

    def downs(values: Tensor) -> dict[str, Down]:
        layers = coefficients.by_layer(values).items()
        return {key: partial(coefficients.folded_down, values=layer) for key, layer in layers}

    def held_out(values: Tensor) -> list[float]:
        return held_out_errors(calibration, downs(values.detach()), parents, settings.at_once)

    run = _begun(coefficients.shape, calibration.device, settings, held_out)
    m, first, stopped, every = run.m, run.step + 1, False, max(1, settings.steps // 5)
    for step, batch in enumerate(_batches(calibration.train, parents, settings, first), start=first):
        errors, run.scale = _backward(m, downs, calibration, batch, error, parents, settings, run.scale)
        if step == 1 and not m.grad.any():
            raise MergeFailed(
                "No gradient reached the coefficients: something replaces or swaps the model's weights "
                "during its forward pass. Switch off other extensions that change the model."
            )
        data_gradient = float(m.grad.abs().mean())
        penalty = coefficients.penalty(m)
        (settings.lam * penalty).backward()
        run.optimiser.step()
        entry = {
            "phase": "merge",
            "step": step,
            "steps": settings.steps,
            "loss": sum(errors) + settings.lam * float(penalty.detach()),
            "errors": errors,
            "penalty": float(penalty.detach()),
            "data_gradient": data_gradient,
            "mean_m": coefficients.mean_abs(m.detach()),
            "retained": coefficients.retained(m.detach()),
        }
        last = step == settings.steps
        if step % every == 0 or last:
            entry["held_out"] = held_out(m)
            run.judge(step, entry["held_out"])
        run.history.append(entry)
        if settings.keeper:
            settings.keeper.keep(run.state)
        if callback(entry) and not last:
            stopped = True
            run.judge(step, held_out(m))
            break
    return _finished(name, coefficients, pairing, run, summed, stopped)


@dataclass
class _Run:
    """The steps so far. m: the coefficients as they are; best: the best ones seen on the held-out samples.

    gone_on_from: the step to which an earlier run had come.
    """

    m: Tensor
    optimiser: torch.optim.Adam
    best: Tensor
    best_errors: list[float]
    best_step: int = 0
    scale: float = LOSS_SCALE
    history: list[dict] = field(default_factory=list)
    gone_on_from: int = 0

    @property
    def step(self) -> int:
        return len(self.history)

    def judge(self, step: int, errors: list[float]) -> None:
        if sum(errors) <= sum(self.best_errors):
            self.best_errors, self.best, self.best_step = errors, self.m.detach().clone(), step

    def state(self) -> State:
        moments = {name: self.optimiser.state[self.m][name] for name in _MOMENTS}
        tensors = {"m": self.m.detach(), "best": self.best, **moments}
        facts = {name: getattr(self, name) for name in _FACTS}
        return State(self.step, {name: value.cpu().contiguous() for name, value in tensors.items()}, facts)


# Adam's, and what of a run is no tensor
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FACTS = ("best_errors", "best_step", "scale", "history")


def _begun(shape: tuple[int, ...], device: str, settings: Settings, held_out: Callable[[Tensor], list[float]]) -> _Run:
    """A run at its start, or where an earlier one of the same merge has come to."""
    m = torch.full(shape, settings.start, device=device, requires_grad=True)
    # no weight decay: it would pull the coefficients to zero
    optimiser = torch.optim.Adam([m], lr=settings.lr)
    kept = settings.keeper.found() if settings.keeper else None
    if kept is None or not _fits(kept, shape, settings.steps):
        return _Run(m, optimiser, m.detach().clone(), held_out(m))
    tensors = {name: value.to(device) for name, value in kept.tensors.items()}
    with torch.no_grad():
        m.copy_(tensors["m"])
    moments = {name: tensors[name] for name in _MOMENTS}
    optimiser.state[m] = {"step": torch.tensor(float(kept.step)), **moments}
    return _Run(m, optimiser, tensors["best"], **kept.facts, gone_on_from=kept.step)


def _fits(kept: State, shape: tuple[int, ...], steps: int) -> bool:
    whole = kept.tensors.keys() == {"m", "best", *_MOMENTS} and kept.facts.keys() == set(_FACTS)
    shapes = all(value.shape == shape and value.isfinite().all() for value in kept.tensors.values())
    return whole and shapes and 0 < kept.step <= steps and len(kept.facts["history"]) == kept.step


def _backward(m, downs, calibration, batch, error, parents, settings, scale) -> tuple[list[float], float]:
    """Leaves the data term's gradient in m.grad, accumulated group by group; returns each parent's mean error.

    The loss is scaled for the backward, and less so after an overflow, as gradient scalers do for fp16.
    """
    while scale >= 1e-3:
        m.grad, sums = None, [0.0] * parents
        for group in groups(batch, settings.at_once):
            prediction = calibration.predict(group, downs(m))
            errors = errors_of(error, prediction, group) / settings.batch
            (errors.sum() * scale).backward()
            for sample, value in zip(group, errors.tolist()):
                sums[sample.parent] += value
        if m.grad is None:
            m.grad = torch.zeros_like(m)
        if torch.isfinite(m.grad).all():
            m.grad /= scale
            return sums, scale
        scale /= 16
    raise NotFinite(
        "The model gives no finite gradient, in full precision no more than in its own. Try a picture with it first: the "
        "checkpoint or the VAE may be damaged; or lower the LoRAs' strengths."
    )


def _batches(train: Sequence[Sample], parents: int, settings: Settings, begin: int) -> Iterator[list[Sample]]:
    """For each step from `begin` on `batch` samples of every parent, in turn through its samples."""
    own = [[s for s in train if s.parent == i] for i in range(parents)]
    for step in range(begin - 1, settings.steps):
        first = step * settings.batch
        yield [mine[(first + b) % len(mine)] for mine in own for b in range(settings.batch)]


def _finished(name, coefficients, pairing, run: _Run, summed, stopped) -> Merged:
    m, step, history = run.best, run.best_step, run.history
    learned: Mapping[str, Tensor] = coefficients.by_layer(m.cpu())
    stacks = dict(pairing.stacks)
    for key, values in learned.items():
        stacks[key] = replace(stacks[key], down=coefficients.folded_down(stacks[key], values).contiguous())
    retained = coefficients.retained(m)
    own = [coefficients.own(m, i) for i in range(pairing.parents)]
    measures = {"mean": torch.mean, "std": torch.std, "min": torch.amin, "max": torch.amax}
    summary = {
        "method": name,
        "best_step": step,
        "coefficients": sum(len(row) for row in own),
        **{measure: [float(f(row)) if len(row) else 0.0 for row in own] for measure, f in measures.items()},
        "retained": retained,
        "error": run.best_errors,
        "error_plain_sum": summed,
    }
    warnings = []
    if run.gone_on_from:
        warnings.append(f"went on from step {run.gone_on_from}, to which a run that was broken off had come")
    if not torch.isfinite(m).all():
        raise MergeFailed("The coefficients are not finite. Lower the learning rate.")
    remedy = "Lower lam, or use the default objective"

    def faded(kept: float, means: list[float]) -> bool:
        # a LoRA of text encoder layers alone, say, may have no coefficients
        return kept < COLLAPSED or min(mean for mean, row in zip(means, own) if len(row)) < SWITCHED_OFF

    if faded(retained, coefficients.mean_abs(m)):
        warnings.append(f"the run collapsed: only {retained:.0%} of the plain sum's strength is left. {remedy}")
    elif faded(history[-1]["retained"], history[-1]["mean_m"]):
        warnings.append(f"the run collapsed after step {step}, whose coefficients were kept. {remedy}")
    if step == 0:
        warnings.append("nothing was learned: no step was better than the coefficients at the start. Lower lr or lam")
    return Merged(stacks, learned, summary, history, stopped, warnings)
