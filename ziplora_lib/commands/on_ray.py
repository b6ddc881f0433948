"""Many merges over a Ray cluster: a worker a GPU, its model loaded once; what a dead worker had is tried again by Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ziplora_lib.atomic import remove_leftovers
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

    def ready(self) -> bool:
        """The model is there."""
        return True

    def merge(self, one: Planned) -> Outcome:
        """Merges a pair. One that a worker finished before it died is only looked at, one that it had begun is done again."""
        remove_leftovers(one.file.parent, one.file.stem)
        if one.file.exists() and not one.recipe.overwrite:
            left = as_found(replace(one, taken=True))
            if left.said == FINISHED and all(one.file.with_suffix(end).exists() for end in (".json", ".png")):
                return replace(left, state="done", tag=f"<lora:{one.output}:1>")
            if left.said == FINISHED:  # it died before the card and the preview
                one = replace(one, recipe=one.recipe.copy(update={"overwrite": True}))
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
    threads, there = torch.get_num_threads(), ray.cluster_resources()
    gpus = 0 if host[2] == "cpu" else int(there.get("GPU", 0))
    room = gpus or max(1, int(there.get("CPU", 1)) // threads)
    # a worker that dies is started again, and its pair with it
    again = {"max_restarts": AGAIN, "max_task_retries": AGAIN}
    kind = ray.remote(num_cpus=1 if gpus else threads, num_gpus=1 if gpus else 0, **again)(Worker)
    # one for which the cluster has no room yet gets no pair
    starting = {}
    for _ in range(min(len(waiting), room)):
        worker = kind.remote(*host, threads)
        starting[worker.ready.remote()] = worker
    total, at_work, free, failed = len(waiting), {}, [], None
    while waiting or at_work:
        while waiting and free:
            i, worker = waiting.pop(0), free.pop()
            at_work[worker.merge.remote(planned[i])] = i, worker
        if not at_work and not starting:
            break
        for answer in ray.wait([*starting, *at_work], timeout=1)[0]:
            if answer in starting:
                worker = starting.pop(answer)
                try:
                    ray.get(answer)
                    free.append(worker)
                except ray.exceptions.RayError as error:
                    failed = error
                continue
            i, worker = at_work.pop(answer)
            try:
                outcomes[i] = ray.get(answer)
                free.append(worker)
            except ray.exceptions.RayTaskError as error:
                outcomes[i] = replace(outcomes[i], state="failed", said=_cause(error))
                free.append(worker)
            except ray.exceptions.RayError as error:
                failed = error
                outcomes[i] = replace(outcomes[i], state="failed", said=f"its worker died {AGAIN + 1} times")
        step = total - len(waiting) - len(at_work)
        names = ", ".join(planned[i].output for i, _ in at_work.values())
        if callback(
            {"phase": "many", "step": step, "steps": total, "what": f"{step} of {total} done; at work: {names}"}
        ):
            return Batch(outcomes)
    if len(waiting) == total and failed is not None:
        raise BadInput(
            f"no worker could be started ({_cause(failed)})", remedy="See whether --model and --device are right"
        )
    for i in waiting:
        outcomes[i] = replace(outcomes[i], state="failed", said="no worker is left")
    return Batch(outcomes)


def _cause(error: Exception) -> str:
    """What went wrong on a worker, in a line: the last of what Ray passes on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
