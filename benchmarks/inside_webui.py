"""What in_webui.py runs inside the WebUI's process, where this file's text is executed anew for every call."""

from __future__ import annotations

import ctypes
import gc
import time

import psutil
import torch
from modules import shared

from ziplora_lib.hosts.webui import WebuiHost


def bare_steps(rows: int, resolution: int, steps: int, prompt: str) -> dict:
    """Forward and backward of the model as it is, down to the latent, weights frozen; half of the rows on the empty prompt.

    -> seconds, the processor's too, of all steps together
    """
    host = WebuiHost()
    with host.exclusive("bare steps"), host.session():
        own, empty = (host.encode(text, resolution, not text) for text in (prompt, ""))
        conds, t = [own, empty] * (rows // 2), torch.full((rows,), 500)
        x = torch.randn(rows, 4, resolution // 8, resolution // 8, requires_grad=True)

        def step() -> None:
            x.grad = None
            host.predict(x, t, conds).float().square().mean().backward()

        step()  # the first one also reserves memory
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        told = {"seconds": time.perf_counter() - began, "processor": time.process_time() - busy}
        return told | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def watch() -> None:
    """From now on keeps when a job reported what: [(seconds, processor seconds), phase, looked at held-out samples?]."""
    plain = getattr(WebuiHost, "plain_progress", WebuiHost.progress)

    def progress(self, info: dict) -> bool:
        now = time.perf_counter(), time.process_time()
        WebuiHost.ticks.append((now, info["phase"], "held_out" in info))
        return plain(self, info)

    WebuiHost.plain_progress, WebuiHost.progress, WebuiHost.ticks = plain, progress, []


def unwatch() -> None:
    """As before `watch`."""
    WebuiHost.progress, WebuiHost.ticks = WebuiHost.plain_progress, []


def ticks() -> list:
    """What was kept, and now as the end."""
    return [*WebuiHost.ticks, ((time.perf_counter(), time.process_time()), "end", False)]


def left() -> dict:
    """What is in the process: memory in MB, tensors that Python knows, hooks on the model."""
    gc.collect()
    told = {"resident": psutil.Process().memory_info().rss / 1e6}
    # what the allocator keeps for later is no leak
    ctypes.CDLL(None).malloc_trim(0)
    told["resident, trimmed"] = psutil.Process().memory_info().rss / 1e6
    tensors, storages = 0, {}
    for thing in gc.get_objects():
        try:
            if torch.is_tensor(thing):
                tensors += 1
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        except Exception:  # lazy modules and dead references fail at whatever they are asked
            continue
    told |= {"tensors": tensors, "tensors, MB": sum(storages.values()) / 1e6, "objects": len(gc.get_objects())}
    modules = list(shared.sd_model.modules())
    return told | {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "replaced forwards": sum(("forward" in vars(m)) + ("_forward" in vars(m)) for m in modules),
        "threads": psutil.Process().num_threads(),
    }
