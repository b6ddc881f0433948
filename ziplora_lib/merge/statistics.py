"""What closed forms need of the layers: second moments of their inputs, while each LoRA runs alone on its own samples.

Second moments add up, so no input is kept, and nothing is differentiated: forward passes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ziplora_lib.errors import MergeFailed, NotFinite, Stopped
from ziplora_lib.merge.attach import Visit
from ziplora_lib.merge.judging import groups
from ziplora_lib.merge.method import Calibration, Callback, Settings
from ziplora_lib.merge.pairing import Pairing

# bytes of moments that are held at once, unless a single layer has more: layers beyond that wait for another pass
BUDGET = 2 * 10**9


def input_moments(
    pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback
) -> Iterator[tuple[str, Tensor]]:
    """Every learned layer with its E_i[x xᵀ]: (P, columns, columns), x the inputs of LoRA i alone on its own samples.

    Mean over the tokens, fp32, on the calibration's device. A LoRA that lacks the layer has inputs there all the same.
    Raises Stopped when the callback asks to stop, MergeFailed where the model gives no finite inputs.
    """
    sizes = {key: pairing.stacks[key].columns for key in pairing.learned}
    yield from _moments(sizes, {}, pairing, calibration, settings, callback)


def rank_moments(
    pairing: Pairing, calibration: Calibration, settings: Settings, callback: Callback
) -> Iterator[tuple[str, Tensor]]:
    """The same of z = down @ x, the stacked ranks' inputs: (P, R, R)."""
    downs = {key: pairing.stacks[key].down.flatten(1).to(calibration.device) for key in pairing.learned}
    sizes = {key: len(down) for key, down in downs.items()}
    yield from _moments(sizes, downs, pairing, calibration, settings, callback)


@torch.no_grad()
def _moments(
    sizes: Mapping[str, int],
    downs: Mapping[str, Tensor],
    pairing: Pairing,
    calibration: Calibration,
    settings: Settings,
    callback: Callback,
) -> Iterator[tuple[str, Tensor]]:
    parents, step = pairing.parents, 0
    batches = list(groups(calibration.train, settings.at_once))
    passes = list(_within(BUDGET, {key: 4 * parents * n * n for key, n in sizes.items()}))
    for keys in passes:
        sums = {key: torch.zeros(parents, sizes[key], sizes[key], device=calibration.device) for key in keys}
        tokens = {key: torch.zeros(parents) for key in keys}

        def add(key: str, parent: int, x: Tensor, sums=sums, tokens=tokens) -> None:
            x = x.to(calibration.device)
            z = x @ downs[key].T if key in downs else x
            sums[key][parent].addmm_(z.T, z)
            tokens[key][parent] += len(z)

        visits: dict[str, Visit] = {key: partial(add, key) for key in keys}
        for batch in batches:
            calibration.observe(batch, visits)
            step += 1
            if callback({"phase": "merge", "step": step, "steps": len(passes) * len(batches), "what": "observing"}):
                raise Stopped
        for key in keys:
            moments = sums.pop(key) / tokens[key].clamp_min(1)[:, None, None].to(calibration.device)
            if not torch.isfinite(moments).all():
                raise NotFinite(
                    "The model gives no finite values, in full precision no more than in its own. Try a picture with it "
                    "first: the checkpoint may be damaged; or lower the LoRAs' strengths."
                )
            yield key, moments


def _within(budget: int, costs: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys in order, in groups that cost no more than the budget together, or are one key."""
    group, spent = [], 0
    for key, cost in costs.items():
        if group and spent + cost > budget:
            yield group
            group, spent = [], 0
        group.append(key)
        spent += cost
    if group:
        yield group


def ridge_solved(hessian: Tensor, right: Tensor, ridge: float, towards: Tensor) -> Tensor:
    """The x that minimises xᵀ H x − 2 xᵀ b + ρ‖x − x₀‖²: (H + ρ I)⁻¹ (b + ρ x₀), ρ = ridge · the mean of H's diagonal.

    hessian H: (n, n), symmetric, no negative eigenvalue; right b, towards x₀: (n, k) -> (n, k), fp32. Where H is zero it is
    x₀. Solved in fp64, on the CPU where the device has none. Raises MergeFailed where H + ρ I is singular.
    """
    device = torch.device("cpu") if hessian.device.type == "mps" else hessian.device
    h, b, x0 = (t.to(device).double() for t in (hessian, right, towards))
    if not (rho := ridge * h.diagonal().mean()) > 0:
        return x0.float()
    h.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise MergeFailed("The samples do not determine the merge. Raise ridge, or the number of samples.")
    return torch.cholesky_solve(b + rho * x0, factor).float()
