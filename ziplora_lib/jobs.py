"""Jobs: work on the host's model, one at a time, each with a state that faces look at from other threads."""

from __future__ import annotations

import json
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from ziplora_lib.errors import BadInput, MergeFailed, Stopped
from ziplora_lib.hosts.host import Host
from ziplora_lib.later import later
from ziplora_lib.merge.method import Callback
from ziplora_lib.recipe import Recipe

merging = later("ziplora_lib.job")

# (host, callback) -> an outcome: `public()` is it as JSON; a true `stopped` says that it was broken off and kept
Work = Callable[[Host, Callback], Any]

# ended jobs that can still be asked about, and those of them whose pictures are kept: 20 MB of five at 1024 pixels
KEPT_JOBS, KEPT_PICTURES = 100, 3
# jobs that wait for the host, each with a thread
MOST_WAITING = 20

_remembering = threading.Lock()


class QueueFull(BadInput):
    """Refused because too much waits already, whatever was asked for."""


class Job:
    """One run of some work: queued, running, done, stopped or failed. Safe to look at from another thread.

    kind: what work it is; asked: what was asked for, such as the Recipe; history: the steps that had a loss.
    """

    def __init__(self, kind: str, title: str, work: Work, asked: Any = None):
        self.id = uuid.uuid4().hex[:12]
        self.kind, self.title, self.asked = kind, title, asked
        self.state = "queued"
        self.progress: dict = {}
        self.history: list[dict] = []
        self.result: Any = None
        self.error: str | None = None
        self.bad_input = False
        self.seconds = 0.0
        self.work = work
        self._stop = False
        self._phase_began = 0.0

    @classmethod
    def merge(cls, recipe: Recipe) -> Job:
        """A merge by this recipe."""
        return cls("merge", recipe.output, lambda host, callback: merging.run(recipe, host, callback), recipe)

    @property
    def task(self) -> str:
        """What the host's progress bar knows it by."""
        return f"ziplora {self.id}"

    @property
    def ended(self) -> bool:
        return self.state not in ("queued", "running")

    def stop(self) -> None:
        """Asks the run to stop at its next step and keep the best so far."""
        self._stop = True

    def start(self, host: Host) -> None:
        """Runs in a thread of its own, as soon as the host is free."""

        def work() -> None:
            try:
                with host.exclusive(self.task):
                    self.run(host, host.progress)
            except BaseException as error:
                if not self.ended:  # the host could not be had
                    self.state, self.error = "failed", f"{type(error).__name__}: {error}"
                raise

        threading.Thread(target=work, name=self.task, daemon=True).start()

    def run(self, host: Host, callback: Callback = lambda _: None) -> None:
        """Runs to one of the end states; never raises for what went wrong in the work, but keeps it in `error`."""
        self.state, began = "running", time.monotonic()

        def watch(info: dict) -> bool:
            if info.get("phase") != self.progress.get("phase"):
                self._phase_began = time.monotonic()
            self.progress = info
            if info.get("again"):  # what was learned so far is lost
                self.history = []
            if "loss" in info:
                self.history.append(info)
            return bool(callback(info)) or self._stop

        try:
            if self._stop:
                raise Stopped
            self.result = self.work(host, watch)
            state = "stopped" if getattr(self.result, "stopped", False) else "done"
        except Stopped:
            nothing = "stopped before anything was learned; nothing was saved"
            state, self.error = (
                "stopped",
                nothing if self.kind == "merge" else "stopped before there was anything to show",
            )
        except (BadInput, MergeFailed) as error:
            state, self.error, self.bad_input = "failed", str(error), isinstance(error, BadInput)
        except Exception as error:
            traceback.print_exc()
            state, self.error = "failed", f"{type(error).__name__}: {error}"
        except BaseException:  # the thread or the program is ended
            self.state, self.error = "failed", "it was ended from outside"
            raise
        self.seconds = round(time.monotonic() - began, 1)
        self.state = state  # last: whoever waits for it finds the rest

    def eta(self) -> float | None:
        """Seconds left in this phase, by its pace so far."""
        step, steps = self.progress.get("step", 0), self.progress.get("steps", 0)
        if self.state != "running" or not step or not steps:
            return None
        return round((time.monotonic() - self._phase_began) / step * (steps - step), 1)

    def public(self) -> dict:
        """As JSON, for GET /ziplora/v1/jobs/{id}."""
        keys = ("phase", "step", "steps", "loss", "errors", "penalty", "mean_m", "retained")
        view = {"job": self.id, "state": self.state, **{k: self.progress[k] for k in keys if k in self.progress}}
        view["eta"] = self.eta()
        if self.result is not None:
            view["result"] = json.loads(json.dumps(self.result.public()))
        if self.error is not None:
            view["error"] = self.error
        return view


def check_queue(jobs: dict[str, Job]) -> None:
    """Raises QueueFull where as many jobs wait as may."""
    if sum(job.state == "queued" for job in list(jobs.values())) >= MOST_WAITING:
        raise QueueFull(f"{MOST_WAITING} jobs are waiting already", remedy="Wait for one of them, or stop it")


def remember(jobs: dict[str, Job], job: Job) -> None:
    """Adds a job; of ended ones the pictures are forgotten first, then the oldest themselves. Raises QueueFull."""
    with _remembering:
        check_queue(jobs)
        jobs[job.id] = job
        ended = [key for key, j in jobs.items() if j.ended]
        pictured = [jobs[key].result for key in ended if getattr(jobs[key].result, "forget_pictures", None)]
        for result in pictured[:-KEPT_PICTURES]:
            result.forget_pictures()
        for key in ended[: max(0, len(jobs) - KEPT_JOBS)]:
            del jobs[key]
