"""What runs have left that were killed: offered when the page opens, to go on with or to forget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import gradio as gr

from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Host
from ziplora_lib.jobs import Job, Work
from ziplora_lib.later import later
from ziplora_lib.merge.method import Callback
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import QUIET

if TYPE_CHECKING:
    from ziplora_lib.snapshot import Unfinished

snapshots = later("ziplora_lib.snapshot")


class Offer:
    """A row that is seen only where there is something to go on with. ending: of the files that are meant.

    `outputs` are its components, `shown()` gives updates for them.
    """

    def __init__(self, place: Place, ending: str, name: str):
        self.place, self.ending = place, ending
        with gr.Row(visible=False, elem_id=f"ziplora_unfinished_{name}") as self.row:
            self.which = gr.Dropdown(
                [],
                label="Broken off",
                info="A run that ended before it was done; what it had reached was kept",
                elem_id=f"ziplora_unfinished_{name}_which",
                scale=4,
            )
            self.go_on = gr.Button("Go on", elem_id=f"ziplora_unfinished_{name}_go_on", min_width=80, scale=1)
            self.forget = gr.Button("Forget it", elem_id=f"ziplora_unfinished_{name}_forget", min_width=80, scale=1)
        self.outputs = [self.row, self.which]
        self.forget.click(self._forget, self.which, self.outputs, **QUIET)
        place.runner.resume.click(self.shown, None, self.outputs, **QUIET)

    def preparing(self, job_of: Callable[[Unfinished], Job]) -> Callable[[str], Job]:
        """For `Runner.offer`: the job that goes on with what is chosen, which is not offered again when it is done."""

        def prepare(chosen: str) -> Job:
            one = self._of(chosen)
            job = job_of(one)
            job.work = _and_then(job.work, one.forget)
            return job

        return prepare

    def shown(self) -> list:
        names = [str(one) for one in self._found()]
        return [gr.update(visible=bool(names)), gr.update(choices=names, value=names[0] if names else None)]

    def _found(self) -> list[Unfinished]:
        if any(not job.ended for job in list(self.place.jobs.values())):  # it may be that one's
            return []
        return [one for one in snapshots.unfinished(self.place.host.scratch()) if one.file.suffix == self.ending]

    def _of(self, chosen: str) -> Unfinished:
        for one in self._found():
            if str(one) == chosen:
                return one
        raise BadInput("that run is no longer there to go on with", remedy="Reload the page")

    def _forget(self, chosen: str) -> list:
        for one in self._found():
            if str(one) == chosen:
                one.forget()
        return self.shown()


def _and_then(work: Work, after: Callable[[], None]) -> Work:
    def both(host: Host, callback: Callback):
        result = work(host, callback)
        after()
        return result

    return both
