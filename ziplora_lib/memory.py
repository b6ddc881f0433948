"""How a merge's steps get along with the memory that there is: chosen before they start, lowered when it runs out."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ziplora_lib.hosts.host import Host
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge import BY_STEPS, MODES, NEEDS_MODEL
from ziplora_lib.merge.blocks import Kept, kept, offloaded, recomputed, weights_freed
from ziplora_lib.merge.method import Calibration, Sample
from ziplora_lib.merge.pairing import Pairing
from ziplora_lib.recipe import Recipe

# latents of these sides tell what larger ones will keep: at most a square of the pixels, where attention keeps its scores
PROBED = (8, 16, 32)
# what an allocator needs beside what is kept: work space, gaps
MARGIN, RESERVE = 1.2, 500 * 10**6

_BEGUN_AGAIN = {"checkpointing": "blocks computed again in the backward", "offload": "blocks kept in main memory"}


@dataclass(frozen=True)
class Plan:
    """How the steps run: mode: one of MODES; at_once: samples in one pass; needed, free: bytes, None where not known."""

    mode: str
    at_once: int
    needed: int | None = None
    free: int | None = None

    def __str__(self) -> str:
        samples = "one sample" if self.at_once == 1 else f"{self.at_once} samples"
        said = f"{self.mode}, {samples} in a pass"
        if self.needed is not None and self.free is not None:
            said += f" (takes about {self.needed / 1e9:.1f} GB, {self.free / 1e9:.1f} GB are free)"
        return said


@contextmanager
def followed(plan: Plan, unet: nn.Module, device: str) -> Iterator[None]:
    """Meanwhile passes of the UNet run by the plan."""
    with ExitStack() as stack:
        if plan.mode == "offload":
            stack.enter_context(offloaded(unet, device))
        if plan.mode != "fast":
            stack.enter_context(recomputed(unet))
        try:
            yield
        except BaseException as error:
            # a broken-off pass lets go of what it held before weights come back to a device that may be full
            traceback.clear_frames(error.__traceback__)
            give_back()
            raise


def choose(recipe: Recipe, host: Host, pairing: Pairing, calibration: Calibration) -> Plan:
    """The fastest way that fits into what is free; where that is not known, or nothing fits, the most sparing one.

    On a CPU all samples of a step are always in one pass, so that a recipe gives the same bytes however much is free.
    """
    device, together = torch.device(calibration.device), recipe.together
    fewest = recipe.at_once or (together if device.type == "cpu" else 1)
    if host.model().moves == "blocks":  # as the user asked the WebUI to
        return Plan("offload", fewest)
    if recipe.method not in BY_STEPS:  # no pass keeps anything
        return Plan("fast", together)
    if recipe.memory != "auto" and recipe.at_once:  # nothing is left to choose
        return Plan(recipe.memory, recipe.at_once)
    free = free_memory(device)
    if free is None:
        return Plan("checkpointing" if recipe.memory == "auto" else recipe.memory, fewest)
    sample = next((s for s in calibration.train if s.empty is not None), calibration.train[0])
    of_one = foreseen(host, pairing, calibration, sample)
    # bytes of a sample, and of weights that go away
    ways = {
        "fast": (of_one.all, 0),
        "checkpointing": (of_one.recomputed, 0),
        "offload": (of_one.recomputed, weights_freed(host.unet())),
    }
    plans = [
        (Plan(mode, n, round(n * each * MARGIN) + RESERVE, free), freed)
        for mode, (each, freed) in ways.items()
        if recipe.memory in ("auto", mode)
        for n in dict.fromkeys((together, fewest))
    ]
    return next((plan for plan, freed in plans if plan.needed <= free + freed), plans[-1][0])


def foreseen(host: Host, pairing: Pairing, calibration: Calibration, sample: Sample) -> Kept:
    """What a sample keeps for its backward: counted on small crops, and from them for the whole."""
    side = min(sample.x.shape[-2:])
    if side <= PROBED[-1]:
        return counted(host, pairing, calibration, sample)
    counts = [counted(host, pairing, calibration, replace(sample, x=sample.x[..., :small, :small])) for small in PROBED]
    pixels, whole = [small**2 for small in PROBED], sample.x[0, 0].numel()

    def grown(values: Sequence[int]) -> int:
        return max(0, round(np.polyval(np.polyfit(pixels, values, 2), whole)))

    return Kept(
        grown([count.outside for count in counts]),
        grown([count.inputs for count in counts]),
        tuple(map(grown, zip(*(count.blocks for count in counts)))),
    )


def counted(host: Host, pairing: Pairing, calibration: Calibration, sample: Sample) -> Kept:
    """What a pass of this sample keeps, with coefficients in all learned layers."""
    downs = dict.fromkeys(pairing.learned, with_coefficients)
    return kept(host.unet(), lambda: calibration.predict([sample], downs))


def with_coefficients(stack: Stack) -> Tensor:
    """A layer's `down` with coefficients of 1 folded in, for which there are gradients."""
    m = torch.ones(len(stack.ranks), stack.columns, device=stack.down.device, requires_grad=True)
    return stack.folded_down(m)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still have on the device; None where that cannot be asked."""
    if device.type == "cuda":
        # older versions of PyTorch ask for a number here, and the WebUI's device has none
        card = torch.cuda.current_device() if device.index is None else device.index
        unused = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
        return torch.cuda.mem_get_info(card)[0] + unused
    return psutil.virtual_memory().available if device.type in ("cpu", "mps") else None


def sparing(recipe: Recipe, plan: Plan | None) -> tuple[Recipe, str] | None:
    """The next more sparing way to the same merge, and what it is in words; None where there is none.

    plan: how it was run, None if it did not come to the steps. Pictures are not made smaller by themselves: that would be
    another merge.
    """
    mode, at_once = (plan.mode, plan.at_once) if plan else (recipe.memory, recipe.at_once)
    if recipe.method in NEEDS_MODEL and at_once != 1:
        return recipe.copy(update={"at_once": 1, "memory": mode}), "one sample at once"
    modes = list(MODES)
    if recipe.method in BY_STEPS and plan and mode != modes[-1]:
        mode = modes[modes.index(mode) + 1]
        return recipe.copy(update={"memory": mode}), _BEGUN_AGAIN[mode]
    return None


def give_back() -> None:
    """What a broken-off run has left, or no longer needs, goes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
