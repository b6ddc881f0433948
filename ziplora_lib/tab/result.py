"""The result card: the strip along the balance, the tag and where it can go, what was learned, the check of the file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from ziplora_lib.errors import BadInput
from ziplora_lib.jobs import Job
from ziplora_lib.later import later
from ziplora_lib.merge import balance
from ziplora_lib.naming import at_balance
from ziplora_lib.tab import words
from ziplora_lib.tab.controls import in_labels, property_of
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import JS, QUIET
from ziplora_lib.verdict import short

bake, memory = later("ziplora_lib.lora.bake"), later("ziplora_lib.memory")
comparing, merging = later("ziplora_lib.comparison"), later("ziplora_lib.job")

# columns of a comparison
MOST_SEEDS = 6


class ResultCard:
    """`shown(job)` gives updates for `outputs`: what a merge has made, or nothing yet."""

    def __init__(self, place: Place):
        self.place = place
        # the job that is shown
        self.merge = gr.Textbox(visible=False, elem_id="ziplora_merge")
        with gr.Column(elem_id="ziplora_result"):
            self.gallery = gr.Gallery(
                label="The balance: one seed, from more of the subject to more of the style. Click the one you like",
                visible=False,
                object_fit="contain",
                show_share_button=False,
                elem_id="ziplora_gallery",
            )
            with gr.Column(visible=False, elem_id="ziplora_card") as self.card:
                with gr.Row():
                    self.tag = gr.Textbox(
                        label="In a prompt", max_lines=1, interactive=False, elem_id="ziplora_tag", scale=3
                    )
                    self.words = gr.Textbox(visible=False, elem_id="ziplora_words")
                    self.copy = gr.Button("Copy", elem_id="ziplora_copy", min_width=80, scale=1)
                    self.send = gr.Button("Add to txt2img", elem_id="ziplora_send", min_width=130, scale=1)
                    self.generate = gr.Button("Generate now", elem_id="ziplora_generate", min_width=130, scale=1)
                with gr.Row():
                    self.point = gr.Slider(
                        -1,
                        1,
                        0,
                        step=0.05,
                        label="Balance",
                        info="-1: more subject, 0: as learned, 1: more style",
                        elem_id="ziplora_balance",
                        scale=2,
                    )
                    self.baked_name = gr.Textbox(
                        label="Save this balance as",
                        info="Another LoRA beside the first, without learning again",
                        placeholder="named after the balance",
                        max_lines=1,
                        elem_id="ziplora_baked_name",
                        scale=2,
                    )
                    self.bake = gr.Button("Save balance", elem_id="ziplora_bake", min_width=120, scale=1)
                self.baked = gr.HTML(elem_id="ziplora_baked")
            self.summary = gr.HTML(elem_id="ziplora_summary")
            with gr.Column(visible=False, elem_id="ziplora_compare_card") as self.compare_card:
                with gr.Row():
                    self.prompt = gr.Textbox(
                        label="Compare at this prompt",
                        info="The same seeds without LoRA, with each LoRA alone, with both tags, and zipped",
                        elem_id="ziplora_compare_prompt",
                        scale=4,
                    )
                    self.seeds = gr.Slider(
                        1,
                        MOST_SEEDS,
                        3,
                        step=1,
                        label="Seeds",
                        info="Pictures of each",
                        elem_id="ziplora_compare_seeds",
                        scale=2,
                    )
                    self.compare = gr.Button("Compare", elem_id="ziplora_compare", min_width=120, scale=1)
                self.compared = gr.HTML(elem_id="ziplora_compared")
                self.compare_note = gr.HTML(elem_id="ziplora_compare_note")
                self.sheet = gr.Image(
                    label="A row for each, a column for each seed",
                    type="pil",
                    interactive=False,
                    visible=False,
                    show_share_button=False,
                    elem_id="ziplora_compare_sheet",
                )
                with gr.Row(elem_id="ziplora_onward"):
                    self.to_strengths = gr.Button("Change its strengths", size="sm", elem_id="ziplora_to_strengths")
                    self.to_why = gr.Button("See what the merge did", size="sm", elem_id="ziplora_to_why")
        self.outputs = [
            self.card,
            self.tag,
            self.words,
            self.gallery,
            self.summary,
            self.point,
            self.baked_name,
            self.baked,
            self.compare_card,
            self.prompt,
            self.sheet,
            self.merge,
        ]

    def shown(self, job: Job | None) -> list:
        """Updates for `outputs`; None: a merge has begun."""
        no_sheet, hidden = gr.update(value=None, visible=False), gr.update(visible=False)
        if job is None or job.result is None:
            text = ""
            if job is not None:
                said = in_labels(job.error or job.state)
                what = "Cannot zip" if job.bad_input else "Failed"
                text = words.error(said, what) if job.state == "failed" else words.line(words.capital(said))
            nothing = gr.update(value=[], visible=False)
            return [hidden, "", "", nothing, text, 0, "", "", hidden, "", no_sheet, ""]
        result: merging.Result = job.result
        pictures = [(picture, _caption(point, result)) for point, picture in result.pictures]
        gallery = gr.update(value=pictures, columns=max(1, len(pictures)), visible=bool(pictures))
        seen, prompt = gr.update(visible=True), job.asked.picture_prompt
        card = [seen, result.tag, prompt, gallery, _summary(job), 0, "", ""]
        return [*card, seen, prompt, no_sheet, job.id]

    def connect(self) -> None:
        self.gallery.select(_chosen_balance, self.gallery, self.point, **QUIET)
        self.bake.click(self._save, [self.tag, self.point, self.baked_name], self.baked, **QUIET)
        self.copy.click(None, self.tag, None, **{JS: "ziplora_copy"})
        self.send.click(None, [self.tag, self.words], None, **{JS: "ziplora_send"})
        self.generate.click(None, [self.tag, self.words], None, **{JS: "ziplora_generate"})

        compared = [self.merge, self.prompt, self.seeds]
        self.place.runner.offer(
            self.compare,
            self._comparing,
            compared,
            self.compared,
            _sheet_shown,
            [self.sheet, self.compare_note],
            "compare",
        )

    def _comparing(self, job_id: str, prompt: str, seeds: int) -> Job:
        merge = self.place.jobs.get(job_id)
        if merge is None or merge.result is None:
            raise BadInput("the merge that is shown is no longer known", remedy="Look at it under Strengths")
        recipe, path, prompt = merge.asked, Path(merge.result.file), prompt.strip()
        if len(prompt) > (longest := property_of("preview_prompt")["maxLength"]):
            raise BadInput(f"the prompt is longer than {longest} letters", remedy="Write a shorter one")
        chosen = [recipe.seed + k for k in range(min(int(seeds), MOST_SEEDS))]
        return Job(
            "compare",
            f"{path.stem} beside its LoRAs",
            lambda host, callback: comparing.comparison(recipe, path, host, chosen, callback, prompt),
        )

    def _save(self, current: str, value: float, output: str) -> str:
        """The balance as a LoRA of its own."""
        name, host = current.removeprefix("<lora:").rpartition(":")[0], self.place.host
        try:
            parents = bake.origins(host.peek(name))
            roles, names = [parent["role"] for parent in parents], [parent["name"] for parent in parents]
            output = output.strip() or at_balance(name, value, balance.side(value, roles, names))
            done = merging.bake_balance(host, name, output, balance.weights(value, roles))
        except (BadInput, OSError) as error:
            return words.error(str(error), "Not saved")
        return words.line(f"Saved: {done['tag']} ({words.size(done['bytes'])})")


def _sheet_shown(job: Job | None) -> list:
    if job is None:
        return [gr.update(value=None, visible=False), ""]
    if job.result is None or not job.result.rows:
        said = words.capital(job.error or (job.state if job.result is None else words.GONE))
        return [
            gr.update(value=None, visible=False),
            words.error(said, "Failed") if job.state == "failed" else words.line(said),
        ]
    note = words.line("Stopped: the last pictures are missing.") if job.result.stopped else ""
    return [gr.update(value=job.result.whole, visible=True), note]


def _chosen_balance(pictures, chosen: gr.SelectData):
    return balance.points(len(pictures))[chosen.index]


def _caption(point: float, result: merging.Result) -> str:
    parents = result.preflight["parents"]
    return balance.caption(point, [p["role"] for p in parents], [p["name"] for p in parents])


def _summary(job: Job) -> str:
    result = job.result
    parents = result.preflight["parents"]
    state = "Stopped early, and kept" if result.stopped else "Done"
    prompts = " and ".join(f"“{p.prompt}”" for p in job.asked.parents if p.prompt)
    use = f"{result.tag} is in your Lora folder. " + (
        f"Prompt it with the words of {'both' if len(parents) == 2 else 'all'}: {prompts}." if prompts else ""
    )
    head = f"<p><b>{state}:</b> {html.escape(use)}</p>{words.line(result.verdict)}"
    saved = result.saved
    check = (
        f"{result.file} ({words.size(saved['bytes'])}), read back and compared: largest error "
        f"{saved['largest_error']:.0e} of a layer's largest value."
    )
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items() if seconds >= 0.5)
    how = f" The steps ran {memory.Plan(**result.memory)}." if result.memory else ""
    foot = words.line(f"{check} Time taken: {words.duration(job.seconds)} ({spent}).{how}", small=True)
    return head + _learned(result.learned, parents) + words.warnings(map(in_labels, result.warnings)) + foot


def _learned(learned: dict, parents: Sequence[dict]) -> str:
    """The errors, in a table."""
    merged, summed = learned.get("error"), learned.get("error_plain_sum")
    if not merged or not summed:
        return ""
    rows = [
        [f"{words.capital(parent['role'])} {parent['name']}", short(was), short(now)]
        for parent, was, now in zip(parents, summed, merged)
    ]
    best = f" Best at step {learned['best_step']}." if "best_step" in learned else ""
    explained = f"0: just as that LoRA alone; 1: as far off as with no LoRA at all.{best}"
    return words.table(["Distance from the LoRA alone", "plain sum", "zipped"], rows) + words.line(
        explained, small=True
    )
