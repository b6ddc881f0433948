"""ZipLoRA (arXiv 2311.13600): one learned coefficient per input column of each LoRA, by gradient, everything else frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ziplora_lib.errors import MergeFailed
from ziplora_lib.merge.method import Calibration, Callback, Merged, Sample, Settings
from ziplora_lib.merge.objective import OBJECTIVES, Columns, relative_error, retained_energy
from ziplora_lib.merge.pairing import Pairing

# powers of two change nothing in fp32, and keep fp16's small gradients above its smallest number
LOSS_SCALE = 2.0**16
# below this share of the plain sum's norm the merge has faded away rather than learned
COLLAPSED = 0.15
# a parent whose mean |m| ends below this has been switched off
SWITCHED_OFF = 0.05


def ziplora(pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback) -> Merged:
    """Learns the merger coefficients with Adam and keeps the best that were seen on the held-out samples.

    Coefficients, loss and optimiser are fp32 whatever the model computes in. Raises MergeFailed when no gradient arrives,
    or when the model's precision gives no finite loss.
    """
    objective = OBJECTIVES[settings.objective]
    columns = learned_columns(pairing, calibration.device)
    if not columns.grams.any():
        raise MergeFailed("The LoRAs are zero on the layers they share: there is nothing to learn.")
    parents = len(columns.grams)
    shape = (parents, columns.grams.shape[-1])
    m = torch.full(shape, settings.start, device=calibration.device, requires_grad=True)
    # no weight decay: it would pull the coefficients to zero
    optimiser = torch.optim.Adam([m], lr=settings.lr)

    def held_out(values: Tensor) -> list[float]:
        return held_out_errors(calibration, by_layer(values.detach(), pairing, columns), parents, settings.at_once)

    summed = held_out(torch.ones_like(m))
    best_errors, best, best_step = held_out(m), m.detach().clone(), 0
    history: list[dict] = []
    scale, stopped, every = LOSS_SCALE, False, max(1, settings.steps // 5)
    for step, batch in enumerate(_batches(calibration.train, parents, settings), start=1):
        errors, scale = _backward(m, pairing, columns, calibration, batch, objective.error, settings, scale)
        if step == 1 and not m.grad.any():
            raise MergeFailed(
                "No gradient reached the coefficients: something replaces or swaps the model's weights "
                "during its forward pass. Switch off --lowvram and other model patches."
            )
        data_gradient = float(m.grad.abs().mean())
        penalty = objective.penalty(m, columns)
        (settings.lam * penalty).backward()
        optimiser.step()
        entry = {
            "phase": "merge",
            "step": step,
            "steps": settings.steps,
            "loss": sum(errors) + settings.lam * float(penalty.detach()),
            "errors": errors,
            "penalty": float(penalty.detach()),
            "data_gradient": data_gradient,
            "mean_m": columns.mean_abs(m.detach()),
            "retained": retained_energy(m.detach(), columns),
        }
        last = step == settings.steps
        if step % every == 0 or last:
            entry["held_out"] = held_out(m)
            if sum(entry["held_out"]) <= sum(best_errors):
                best_errors, best, best_step = entry["held_out"], m.detach().clone(), step
        history.append(entry)
        if callback(entry) and not last:
            stopped = True
            final = held_out(m)
            if sum(final) <= sum(best_errors):
                best_errors, best, best_step = final, m.detach().clone(), step
            break
    return _finished(pairing, columns, best, best_step, best_errors, summed, history, stopped)


def learned_columns(pairing: Pairing, device: str = "cpu") -> Columns:
    """The learned layers' columns in one row, for the penalties and the summary."""
    stacks = [pairing.stacks[key] for key in pairing.learned]
    grams = torch.cat([s.column_grams() for s in stacks], dim=-1)
    present = torch.cat([torch.tensor(s.ranks)[:, None].gt(0).expand(-1, s.columns) for s in stacks], dim=-1)
    return Columns(grams.to(device), [s.columns for s in stacks], present.to(device))


def by_layer(m: Tensor, pairing: Pairing, columns: Columns) -> dict[str, Tensor]:
    """(P, M) -> {layer key: (P, columns)}, as views."""
    return dict(zip(pairing.learned, m.split(columns.sizes, dim=1)))


@torch.no_grad()
def held_out_errors(
    calibration: Calibration, coefficients: Mapping[str, Tensor], parents: int, at_once: int = 1
) -> list[float]:
    """Mean relative error against each LoRA alone, on the held-out samples: what a merge is judged by."""
    sums, counts = [0.0] * parents, [0] * parents
    for group in _groups(calibration.held_out, at_once):
        prediction = calibration.predict(group, coefficients)
        for sample, error in zip(group, _errors(relative_error, prediction, group)):
            sums[sample.parent] += float(error)
            counts[sample.parent] += 1
    return [s / max(n, 1) for s, n in zip(sums, counts)]


def _backward(m, pairing, columns, calibration, batch, error, settings, scale) -> tuple[list[float], float]:
    """Leaves the data term's gradient in m.grad, accumulated group by group; returns each parent's mean error.

    The loss is scaled for the backward, and less so after an overflow, as gradient scalers do for fp16.
    """
    while scale >= 1e-3:
        m.grad, sums = None, [0.0] * len(m)
        for group in _groups(batch, settings.at_once):
            prediction = calibration.predict(group, by_layer(m, pairing, columns))
            errors = _errors(error, prediction, group) / settings.batch
            (errors.sum() * scale).backward()
            for sample, value in zip(group, errors.tolist()):
                sums[sample.parent] += value
        if m.grad is None:
            m.grad = torch.zeros_like(m)
        if torch.isfinite(m.grad).all():
            m.grad /= scale
            return sums, scale
        scale /= 16
    raise MergeFailed(
        "The model gives no finite gradient in this precision. Run the WebUI with --no-half, or use the "
        "model in bf16 or fp32."
    )


def _errors(error, prediction: Tensor, group: Sequence[Sample]) -> Tensor:
    target = torch.cat([s.target for s in group]).to(prediction.device)
    bare = torch.cat([s.bare for s in group]).to(prediction.device)
    return error(prediction, target, bare)


def _batches(train: Sequence[Sample], parents: int, settings: Settings) -> Iterator[list[Sample]]:
    """For each step `batch` samples of every parent, in turn through its samples."""
    own = [[s for s in train if s.parent == i] for i in range(parents)]
    for step in range(settings.steps):
        first = step * settings.batch
        yield [mine[(first + b) % len(mine)] for mine in own for b in range(settings.batch)]


def _groups(samples: Sequence[Sample], at_once: int) -> Iterator[Sequence[Sample]]:
    for i in range(0, len(samples), at_once):
        yield samples[i : i + at_once]


def _finished(pairing, columns, m, step, errors, summed, history, stopped) -> Merged:
    coefficients = by_layer(m.cpu(), pairing, columns)
    stacks = dict(pairing.stacks)
    for key, values in coefficients.items():
        stacks[key] = stacks[key].merged(values)
    retained = retained_energy(m, columns)
    own = [columns.own(m, i) for i in range(len(m))]
    measures = {"mean": torch.mean, "std": torch.std, "min": torch.amin, "max": torch.amax}
    summary = {
        "method": "ziplora",
        "best_step": step,
        "coefficients": int(columns.present.sum()),
        **{name: [float(f(row)) if len(row) else 0.0 for row in own] for name, f in measures.items()},
        "retained": retained,
        "error": errors,
        "error_plain_sum": summed,
    }
    warnings = []
    if not torch.isfinite(m).all():
        raise MergeFailed("The coefficients are not finite. Lower the learning rate.")
    remedy = "Lower lam, or use the default objective"
    learns = columns.present.any(dim=1).tolist()  # a LoRA of text encoder layers alone, say, may have none

    def faded(kept: float, means: list[float]) -> bool:
        return kept < COLLAPSED or min(mean for mean, own in zip(means, learns) if own) < SWITCHED_OFF

    if faded(retained, columns.mean_abs(m)):
        warnings.append(f"the run collapsed: only {retained:.0%} of the plain sum's strength is left. {remedy}")
    elif faded(history[-1]["retained"], history[-1]["mean_m"]):
        warnings.append(f"the run collapsed after step {step}, whose coefficients were kept. {remedy}")
    if step == 0:
        warnings.append("nothing was learned: no step was better than the coefficients at the start. Lower lr or lam")
    return Merged(stacks, coefficients, summary, history, stopped, warnings)
