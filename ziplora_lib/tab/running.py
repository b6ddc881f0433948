"""The run: one place for whatever is at work, with the host's progress bar, a chart and Stop; found again after a reload."""

from __future__ import annotations

import html
import time
import traceback
from collections.abc import Callable, Sequence

import gradio as gr

from ziplora_lib import charts
from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Host
from ziplora_lib.jobs import Job, remember
from ziplora_lib.tab import words

# seconds between two looks at a job
EVERY = 0.5
# the parameter that takes JavaScript has another name in newer gradios
JS = "_js" if gr.__version__.startswith("3.") else "js"
QUIET = {"show_progress": "hidden"}
# how a refusal begins, by the kind of job
REFUSED = {"merge": "Cannot zip", "many": "Cannot zip them"}


def flat(values: Sequence):
    """What an event returns: where it has one output, gradio wants the value itself rather than a list of it."""
    return values[0] if len(values) == 1 else list(values)


class Runner:
    """Starts jobs for the sections of the tab, and shows the one that runs.

    `area` makes its components; a section says with `offer` which button starts what; `connect` comes last.
    """

    def __init__(self, host: Host, jobs: dict[str, Job]):
        self.host, self.jobs = host, jobs
        self._offers: list[tuple] = []

    def area(self) -> None:
        """What is seen of a running job, at this place of the page."""
        self.job = gr.Textbox(visible=False, elem_id="ziplora_job")
        with gr.Column(visible=False, elem_id="ziplora_run") as self.column:
            # the host's progress bar is laid above the one, the picture that is being made into the other
            gr.HTML("<div></div>", elem_id="ziplora_bar")
            with gr.Row(elem_id="ziplora_run_row"):
                self.live = gr.HTML(elem_id="ziplora_live")
                gr.HTML("<div></div>", elem_id="ziplora_live_preview")
            with gr.Row(elem_id="ziplora_stop_row"):
                self.stop_button = gr.Button("Stop", variant="stop", elem_id="ziplora_stop", min_width=120, scale=0)
                self.stopping = gr.HTML(elem_id="ziplora_stopping")
        self.resume = gr.Button("Resume", elem_id="ziplora_resume")

    def offer(
        self,
        button: gr.Button,
        prepare: Callable[..., Job],
        inputs: Sequence[gr.components.Component],
        said: gr.HTML,
        show: Callable[[Job | None], Sequence],
        outputs: Sequence[gr.components.Component],
        what: str,
    ) -> None:
        """A button that starts a job.

        prepare(*inputs) makes the job; what it refuses, with BadInput, is said in `said`. show(job) gives the outputs when
        the job has ended, and show(None) what they are while it runs. what: the kind of job.
        """
        self._offers.append((button, prepare, list(inputs), said, show, list(outputs), what))

    def connect(self) -> None:
        """Wires what was offered. Every start button is off while one job runs."""
        buttons = [offer[0] for offer in self._offers]
        state = [self.job, self.column, self.stop_button, *buttons]
        on, off = gr.update(interactive=True), gr.update(interactive=False)

        def busy() -> Job | None:
            return next((job for job in list(self.jobs.values()) if not job.ended), None)

        def began(job: Job) -> list:
            return [job.id, gr.update(visible=True), on, *[off] * len(buttons)]

        idle = ["", gr.update(visible=False), off, *[on] * len(buttons)]

        def released() -> list:
            return [*idle, "", ""]

        for button, prepare, inputs, said, show, outputs, what in self._offers:

            def start(*values, prepare=prepare, show=show, outputs=outputs, what=what):
                refused = [gr.update() for _ in outputs]
                try:
                    if at_work := busy():
                        raise BadInput(
                            f"ZipLoRA is at work already, on {at_work.title}", remedy="Wait for it, or press Stop"
                        )
                    job = prepare(*values)
                    remember(self.jobs, job)
                except BadInput as error:
                    return [*idle, words.error(str(error), REFUSED.get(what, "Not possible")), *refused]
                except Exception as error:
                    traceback.print_exc()
                    return [*idle, words.error(f"{type(error).__name__}: {error}", "Failed"), *refused]
                job.start(self.host)
                return [*began(job), "", *show(None)]

            started = button.click(start, inputs, [*state, said, *outputs], **QUIET)
            watched = started.then(self.watch, self.job, self.live, **{JS: "ziplora_watch"}, **QUIET)
            shown = watched.then(self._shown(show, outputs, what), self.job, outputs, **QUIET)
            shown.then(released, None, [*state, self.live, self.stopping], **QUIET)

        def rejoin():
            job = busy()
            return idle if job is None else began(job)

        resumed = self.resume.click(rejoin, None, state, **{JS: "ziplora_rejoined"}, **QUIET)
        resumed = resumed.then(self.watch, self.job, self.live, **{JS: "ziplora_watch"}, **QUIET)
        for _, _, _, _, show, outputs, what in self._offers:
            resumed = resumed.then(self._shown(show, outputs, what), self.job, outputs, **QUIET)
        resumed.then(released, None, [*state, self.live, self.stopping], **QUIET)
        self.stop_button.click(self.stop, self.job, [self.stop_button, self.stopping], queue=False, **QUIET)

    def _shown(self, show: Callable[[Job | None], Sequence], outputs: Sequence, what: str) -> Callable[[str], object]:
        """What has come of a job, if it is one of this kind."""

        def shown(job_id: str):
            job = self.jobs.get(job_id)
            return flat(show(job) if job and job.kind == what else [gr.update() for _ in outputs])

        return shown

    def watch(self, job_id: str):
        """What is seen of a job, again and again until it has ended."""
        job = self.jobs.get(job_id)
        while job is not None and not job.ended:
            yield live(job)
            time.sleep(EVERY)
        yield "" if job is None else live(job)

    def stop(self, job_id: str):
        job = self.jobs.get(job_id)
        if job is None or job.ended:
            return gr.update(), words.line("Nothing is running.")
        job.stop()
        said = "Stopping at the next step; once the steps of the merge have begun, the best so far is kept …"
        if job.kind != "merge":
            said = "Stopping at the next step …"
        return gr.update(interactive=False), words.line(said)


def live(job: Job) -> str:
    """Phase, step, loss and time left in words, and how the losses went."""
    info = job.progress
    parts = [info.get("what") or info.get("phase") or "waiting for the WebUI's other work"]
    if info.get("steps", 0) > 1:
        parts.append(f"step {info['step']} of {info['steps']}")
    if "loss" in info:
        parts.append(f"loss {info['loss']:.3f}")
    if (eta := job.eta()) is not None:
        parts.append(f"about {words.duration(eta)} left in this phase")
    said = f"<p class='ziplora_step'><b>{html.escape(job.title)}</b>: {html.escape(', '.join(parts))}</p>"
    titles = getattr(job.asked, "titles", [])
    rows = words.table(["LoRA", "State", ""], info["rows"]) if "rows" in info else ""
    return said + charts.learning(job.history, titles, getattr(job.asked, "lam", 0) > 0) + rows
