"""Many merges over a Ray cluster: a worker a GPU, its model loaded once; what a dead worker had is tried again by Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ziplora_lib.batch import Batch, Outcome
from ziplora_lib.errors import BadInput
from ziplora_lib.many import FINISHED, Planned, as_found, merged
from ziplora_lib.merge.method import Callback

# how often Ray starts a dead worker again, and with it the pair that it was at
AGAIN = 3


class Worker:
    """One model, loaded once, in a process of its own."""

    def __init__(self, model: str, folder: Path, device: str, threads: int):
        from ziplora_lib.hosts.diffusers import DiffusersHost

        # as many as where the list was given: another number rounds sums another way
        torch.set_num_threads(threads)
        self.host = DiffusersHost(model, folder, device)

    def merge(self, one: Planned) -> Outcome:
        """Merges a pair. One that a worker finished before it died is only looked at."""
        if one.file.exists() and not one.recipe.overwrite:
            left = as_found(replace(one, taken=True))
            if left.said == FINISHED:
                return replace(left, state="done", tag=f"<lora:{one.output}:1>")
        return merged(one, as_found(one), self.host, lambda _: False)


def run_on_ray(
    planned: Sequence[Planned], host: tuple[str, Path, str], address: str, callback: Callback = lambda _: None
) -> Batch:
    """As `many.run_many`, but on a cluster's workers; host: model, folder and device of each.

    The callback's steps are pairs; a true answer ends the workers, and what they were at is lost. Raises BadInput where Ray
    is not there.
    """
    try:
        import ray
    except ImportError as error:
        raise BadInput(
            "--ray needs Ray", remedy='Install it with this project: pip install ".[headless,ray]"'
        ) from error
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it warns of a change that does not matter here
    local = {"include_dashboard": False, "object_store_memory": 200 * 2**20} if address == "local" else {}
    try:
        head, _, port = address.rpartition("://")[2].rpartition(":")
        if port.isdigit():  # Ray itself asks for minutes
            socket.create_connection((head, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"there is no Ray cluster at {address} ({str(error).splitlines()[0]})",
            remedy="Give the address of its head, or none for a cluster on this machine",
        ) from error
    try:
        return _spread(ray, planned, host, callback)
    finally:
        ray.shutdown()


def _spread(ray, planned: Sequence[Planned], host: tuple[str, Path, str], callback: Callback) -> Batch:
    outcomes = [as_found(one) for one in planned]
    waiting = [i for i, one in enumerate(planned) if one.to_do]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = min(len(waiting), gpus or int(ray.cluster_resources().get("CPU", 1)))
    # a worker that dies is started again, and its pair with it
    settings = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": AGAIN, "max_task_retries": AGAIN}
    kind = ray.remote(**settings)(Worker)
    free = [kind.remote(*host, torch.get_num_threads()) for _ in range(workers)]
    total, at_work = len(waiting), {}
    while waiting or at_work:
        while waiting and free:
            i, worker = waiting.pop(0), free.pop()
            at_work[worker.merge.remote(planned[i])] = i, worker
        done, _ = ray.wait(list(at_work), timeout=1)
        for answer in done:
            i, worker = at_work.pop(answer)
            try:
                outcomes[i] = ray.get(answer)
                free.append(worker)
            except ray.exceptions.RayError as error:
                said = f"its worker died {AGAIN + 1} times ({type(error).__name__})"
                outcomes[i] = replace(outcomes[i], state="failed", said=said)
        if not free and not at_work:  # every worker has died for good
            break
        step = total - len(waiting) - len(at_work)
        names = ", ".join(planned[i].output for i, _ in at_work.values())
        if callback(
            {"phase": "many", "step": step, "steps": total, "what": f"{step} of {total} done; at work: {names}"}
        ):
            break
    return Batch(outcomes)
