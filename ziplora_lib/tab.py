"""The tab: pick a subject and a style, press Zip, watch, prompt. Every setting is a field of the Recipe, with its default,
bounds and hint; what is shown of files, names and prompts is escaped, since they may be a stranger's.
"""

from __future__ import annotations

import html
import time
import traceback
from collections.abc import Callable

import gradio as gr

from ziplora_lib.errors import BadInput
from ziplora_lib.job import Job, Result, bake_balance, preflight, remember
from ziplora_lib.lora.bake import origins
from ziplora_lib.lora.metadata import trigger_words
from ziplora_lib.merge import balance
from ziplora_lib.recipe import parse, schema
from ziplora_lib.verdict import short

ROLES = ("subject", "style")

# what each field is called; the accordion shows them in these groups
ADVANCED = {
    "Learning": {
        "method": "Method",
        "objective": "Objective",
        "lr": "Learning rate",
        "lam": "Overlap penalty",
        "start": "Start",
        "loss_guidance": "Guidance in the loss",
        "ridge": "Ridge",
        "batch": "Samples a step",
        "at_once": "Samples at once",
        "checkpointing": "Save memory",
    },
    "Calibration": {
        "resolution": "Resolution",
        "pictures": "Pictures of each LoRA",
        "samples": "Samples of each LoRA",
        "empty_share": "Empty prompt share",
        "sampler_steps": "Sampler steps",
        "guidance": "Guidance",
    },
    "LoRAs": {
        "equal_norms": "Equal norms",
        "text_encoders": "Text encoders",
        "dense_rank": "Rank of dense layers",
    },
    "Result": {
        "balance_points": "Pictures along the balance",
        "preview_prompt": "Preview prompt",
        "dtype": "Precision",
        "max_rank": "Largest rank",
        "keep_energy": "Energy to keep",
        "keep_norm": "Norm to keep",
        "layer_names": "Layer names",
        "overwrite": "Overwrite",
        "allow_same": "Allow the same LoRA twice",
    },
}
LABELS = {"output": "Output name", "steps": "Steps", "seed": "Seed"}
LABELS |= {field: label for group in ADVANCED.values() for field, label in group.items()}

# fields typed as a number; the other numbers are sliders with these steps, 1 where nothing is said
TYPED = {"seed", "lr", "dense_rank"}
SLIDER_STEP = {"resolution": 64, "balance_points": 2, "empty_share": 0.05, "guidance": 0.5}
# what an empty box means
NOT_GIVEN = {**dict.fromkeys(("lam", "start", "loss_guidance"), "the objective's own"), "ridge": "the method's own"}
# what changes what Check says
CHECKED = (
    "method",
    "objective",
    "overwrite",
    "allow_same",
    "dtype",
    "text_encoders",
    "equal_norms",
    "dense_rank",
    "layer_names",
)
# what depends on the machine rather than on the pair: the WebUI may keep the user's own default of it
KEPT = {"steps", "resolution", "checkpointing", "at_once", "dtype"}


def build(host, jobs: dict[str, Job], queued: Callable, progress: Callable[[dict], bool]) -> gr.Blocks:
    """The tab's blocks.

    host: a Host with `refresh()`; jobs: shared with the API; queued(fn, extra_outputs): fn in the host's queue, where the
    first input is a task id and the last output HTML; progress: shows a step, and says whether the host was interrupted.
    """
    # jobs that were made by Zip and have not begun: each runs once, whatever the browser sends
    fresh: set[str] = set()

    def names() -> list[str]:
        try:
            return host.loras()
        except BadInput as error:
            print(f"ZipLoRA: {error}")
            return []

    def listed() -> list:
        """The pickers, with the LoRAs as they are listed now, also for a page that is loaded later."""
        choices = names()
        for picker in pickers.values():
            picker.choices = [(name, name) for name in choices]
        return [gr.update(choices=choices) for _ in pickers]

    def rescan():
        host.refresh()
        return listed()

    # --- picking ---------------------------------------------------------------------------------------

    def pick(role: str):
        def picked(subject, style, prompt, output, filled):
            name = {"subject": subject, "style": style}[role]
            prompt, note, filled = _suggested(host, name, prompt or "", role, dict(filled))
            output, filled = _named(subject, style, output or "", filled)
            return prompt, note, output, filled

        return picked

    def swap(subject, style, subject_prompt, style_prompt, subject_strength, style_strength, *rest):
        subject_files, style_files, subject_note, style_note, output, filled = rest
        filled = {**filled, "subject": filled.get("style", ""), "style": filled.get("subject", "")}
        output, filled = _named(style, subject, output or "", filled)
        files = [_paths(style_files) or None, _paths(subject_files) or None]
        return (
            *(style, subject, style_prompt, subject_prompt, style_strength, subject_strength),
            *(*files, style_note, subject_note, output, filled),
        )

    def check(*values) -> str:
        given = dict(zip(fields, values))
        if not given["subject_lora"] or not given["style_lora"]:
            return ""
        try:
            return _ready(preflight(_recipe(given), host).report)
        except BadInput as error:
            return _error(str(error))
        except Exception as error:
            traceback.print_exc()
            return _error(f"{type(error).__name__}: {error}")

    # --- a job: prepare, then run in the host's queue, then release, which comes whatever happened ------------------

    def prepare(*values):
        try:
            recipe = _recipe(dict(zip(fields, values)))
            preflight(recipe, host)
        except BadInput as error:
            return "", gr.update(), gr.update(), _error(str(error)), *_nothing("")
        except Exception as error:
            traceback.print_exc()
            return "", gr.update(), gr.update(), _error(f"{type(error).__name__}: {error}"), *_nothing("")
        job = Job(recipe)
        remember(jobs, job)
        fresh.add(job.id)
        return job.id, gr.update(interactive=False), gr.update(interactive=True), "", *_nothing("")

    def run(task: str, job_id: str):
        if job_id not in fresh:
            return [gr.update() for _ in shown]
        fresh.discard(job_id)
        return work(task, job_id)

    def in_queue(_task: str, job_id: str):
        job = jobs[job_id]
        job.run(host, progress)
        return show(job)

    work = queued(in_queue, extra_outputs=[gr.update() for _ in range(5)])

    def show(job: Job) -> list:
        pickers_now = listed()
        if job.result is None:
            text = job.error or job.state
            return [*pickers_now, *_nothing(_error(text, "Failed") if job.state == "failed" else _line(_capital(text)))]
        pictures = [(picture, _caption(point, job.result)) for point, picture in job.result.pictures]
        gallery = gr.update(value=pictures, columns=max(1, len(pictures)), visible=bool(pictures))
        return [*pickers_now, gr.update(visible=True), job.result.tag, gallery, _result(job)]

    def choose(pictures, chosen: gr.SelectData):
        return balance.points(len(pictures))[chosen.index]

    def save_balance(current: str, value: float, output: str):
        name = current.removeprefix("<lora:").rpartition(":")[0]
        try:
            parents = origins(host.peek(name))
            roles, names = [parent["role"] for parent in parents], [parent["name"] for parent in parents]
            side = balance.side(value, roles, names)
            output = output.strip() or f"{name}-{side}{abs(value):.0%}".replace("%", "")
            done = bake_balance(host, name, output, balance.weights(value, roles))
        except (BadInput, OSError) as error:
            return *[gr.update() for _ in pickers], _error(str(error), "Not saved")
        return *listed(), _line(f"Saved: {done['tag']} ({_size(done['bytes'])})")

    def stop(job_id: str):
        job = jobs.get(job_id)
        if job is None or job.state not in ("queued", "running"):
            return gr.update(), _line("Nothing is running.")
        job.stop()
        return gr.update(interactive=False), _line("Stopping at the next step; the best so far will be kept …")

    def release():
        return "", gr.update(interactive=True), gr.update(interactive=False), ""

    def rejoin(job_id: str):
        running = job_id in jobs and job_id not in fresh
        return job_id if running else "", gr.update(interactive=not running), gr.update(interactive=running)

    def wait(job_id: str):
        job = jobs.get(job_id)
        if job is None:
            return [gr.update() for _ in shown]
        while job.state in ("queued", "running"):
            time.sleep(0.3)
        return show(job)

    # --- what is seen -------------------------------------------------------------------------------------

    fields: dict[str, gr.components.Component] = {}
    pickers, prompts, strengths, files, notes, refreshes = {}, {}, {}, {}, {}, {}

    with gr.Blocks(analytics_enabled=False) as blocks, gr.Column(elem_id="ziplora_tab"):
        filled = gr.State({})
        task = gr.Textbox(visible=False, elem_id="ziplora_task")
        running = gr.Textbox(visible=False, elem_id="ziplora_job")
        gr.HTML(_line("Merges two LoRAs, what is in the picture and how it looks, into one new LoRA."))
        with gr.Row(elem_id="ziplora_pair", equal_height=False):
            for role in ROLES:
                with gr.Column(variant="compact", elem_id=f"ziplora_{role}", min_width=260):
                    with gr.Row(elem_classes=["ziplora_pick"]):
                        pickers[role] = gr.Dropdown(
                            names(),
                            label=f"{role.capitalize()} LoRA",
                            info={"subject": "Who or what is in the picture", "style": "How the picture looks"}[role],
                            elem_id=f"ziplora_{role}_lora",
                        )
                        refreshes[role] = gr.Button("🔄", elem_classes=["tool"], elem_id=f"ziplora_{role}_refresh")
                    prompts[role] = gr.Textbox(
                        label=f"{role.capitalize()} prompt",
                        info=_hint("prompt", parent=True),
                        lines=2,
                        elem_id=f"ziplora_{role}_prompt",
                    )
                    notes[role] = gr.HTML(elem_id=f"ziplora_{role}_note", elem_classes=["ziplora_note"])
                    strengths[role] = gr.Slider(
                        0.1,
                        2,
                        _property("strength", parent=True)["default"],
                        step=0.05,
                        label=f"{role.capitalize()} strength",
                        info=_hint("strength", parent=True),
                        elem_id=f"ziplora_{role}_strength",
                    )
                if role == "subject":
                    exchange = gr.Button("⇄", elem_classes=["tool"], elem_id="ziplora_swap")
        with gr.Row(elem_id="ziplora_main"):
            fields["output"] = _control("output", scale=2)
            fields["steps"] = _control("steps", scale=2)
            fields["seed"] = _control("seed", scale=1)
        with gr.Accordion("Advanced", open=False, elem_id="ziplora_advanced"):
            for title, group in ADVANCED.items():
                gr.HTML(f"<h4>{title}</h4>", elem_classes=["ziplora_heading"])
                with gr.Row(elem_classes=["ziplora_grid"]):
                    fields |= {field: _control(field) for field in group}
            gr.HTML(
                "<h4>Reference pictures</h4><p>Optional: the pictures that a LoRA was trained on. Without them it makes "
                "its own calibration pictures.</p>",
                elem_classes=["ziplora_heading"],
            )
            with gr.Row():
                for role in ROLES:
                    files[role] = gr.File(
                        label=f"Pictures of the {role}",
                        file_count="multiple",
                        file_types=["image"],
                        height=140,
                        elem_id=f"ziplora_{role}_reference",
                    )
        with gr.Row(elem_id="ziplora_buttons"):
            zip_button = gr.Button("Zip", variant="primary", elem_id="ziplora_zip", scale=3)
            stop_button = gr.Button("Stop", variant="stop", interactive=False, elem_id="ziplora_stop", scale=1)
            check_button = gr.Button("Check", elem_id="ziplora_check", scale=1)
        checked = gr.HTML(elem_id="ziplora_checked")
        stopping = gr.HTML(elem_id="ziplora_stopping")
        with gr.Column(elem_id="ziplora_result"):
            gallery = gr.Gallery(
                label="The balance: one seed, from more of the subject to more of the style. Click the one you like",
                visible=False,
                object_fit="contain",
                show_share_button=False,
                elem_id="ziplora_gallery",
            )
            with gr.Column(visible=False, elem_id="ziplora_tag_row") as tag_row:
                with gr.Row():
                    point = gr.Slider(
                        -1,
                        1,
                        0,
                        step=0.05,
                        label="Balance",
                        info="-1: more subject, 0: as learned, 1: more style",
                        elem_id="ziplora_balance",
                        scale=2,
                    )
                    baked_name = gr.Textbox(
                        label="Save this balance as",
                        info="Another LoRA beside the first, without learning again",
                        placeholder="named after the balance",
                        max_lines=1,
                        elem_id="ziplora_baked_name",
                        scale=2,
                    )
                    bake_button = gr.Button("Save balance", elem_id="ziplora_bake", min_width=120, scale=1)
                baked = gr.HTML(elem_id="ziplora_baked")
                with gr.Row():
                    tag = gr.Textbox(
                        label="In a prompt", max_lines=1, interactive=False, elem_id="ziplora_tag", scale=3
                    )
                    copy = gr.Button("Copy", elem_id="ziplora_copy", min_width=80, scale=1)
                    send = gr.Button("Send to txt2img", elem_id="ziplora_send", min_width=140, scale=1)
            summary = gr.HTML(elem_id="ziplora_summary")
        resume = gr.Button("Resume", elem_id="ziplora_resume")

        for role in ROLES:
            fields[f"{role}_lora"], fields[f"{role}_prompt"] = pickers[role], prompts[role]
            fields[f"{role}_strength"], fields[f"{role}_reference"] = strengths[role], files[role]
        own = {*pickers.values(), *prompts.values(), *strengths.values(), tag, point, baked_name}
        for component in {*fields.values(), *own, *refreshes.values()}:
            component.do_not_save_to_config = component not in {fields[name] for name in KEPT}
        for button in (exchange, check_button, stop_button, zip_button, bake_button, copy, send, resume):
            button.do_not_save_to_config = True

        # --- what happens ---------------------------------------------------------------------------------

        shown = [*pickers.values(), tag_row, tag, gallery, summary]
        inputs = list(fields.values())
        quiet = {"show_progress": "hidden"}
        name, picked = fields["output"], list(pickers.values())

        for role in ROLES:
            pickers[role].input(
                pick(role),
                [*picked, prompts[role], name, filled],
                [prompts[role], notes[role], name, filled],
                **quiet,
            ).then(check, inputs, checked, **quiet)
            refreshes[role].click(rescan, None, picked, **quiet)
            prompts[role].blur(check, inputs, checked, **quiet)
        name.blur(check, inputs, checked, **quiet)
        for field in CHECKED:
            fields[field].change(check, inputs, checked, **quiet)
        check_button.click(check, inputs, checked)
        both = [*picked, *prompts.values(), *strengths.values(), *files.values(), *notes.values(), name, filled]
        exchange.click(swap, both, both, **quiet).then(check, inputs, checked, **quiet)

        state = [running, zip_button, stop_button]
        released = {"fn": release, "inputs": None, "outputs": [*state, stopping], "_js": "ziplora_ended", **quiet}
        prepared = zip_button.click(prepare, inputs, [*state, checked, *shown[2:]], **quiet)
        prepared.then(run, [task, running], shown, _js="ziplora_submit", **quiet).then(**released)
        stop_button.click(stop, running, [stop_button, stopping], queue=False, **quiet)
        rejoined = resume.click(rejoin, running, state, _js="ziplora_rejoin", **quiet)
        rejoined.then(wait, running, shown, **quiet).then(**released)
        zip_button.click(lambda: (0, "", ""), None, [point, baked_name, baked], **quiet)
        gallery.select(choose, gallery, point, **quiet)
        bake_button.click(save_balance, [tag, point, baked_name], [*pickers.values(), baked])
        copy.click(None, tag, None, _js="ziplora_copy")
        send.click(None, tag, None, _js="ziplora_send")
    return blocks


# --- controls from the recipe's fields ----------------------------------------------------------------------


def _property(field: str, parent: bool = False) -> dict:
    known = schema()
    return (known["definitions"]["Parent"] if parent else known)["properties"][field]


def _hint(field: str, parent: bool = False) -> str:
    return _capital(_property(field, parent)["description"])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _control(field: str, **layout) -> gr.components.Component:
    """The control of one field: its default, bounds and hint as the recipe has them."""
    about = _property(field)
    default = about.get("default")
    hint = _hint(field)
    hint = _capital(hint[len(LABELS[field]) + 2 :]) if hint.startswith(f"{LABELS[field]}: ") else hint
    common = {"label": LABELS[field], "info": hint, "elem_id": f"ziplora_{field}", **layout}
    if "enum" in about:
        return gr.Radio(about["enum"], value=default, **common)
    if about["type"] == "boolean":
        return gr.Checkbox(default, **common)
    if about["type"] == "string":
        return gr.Textbox(default or "", max_lines=1, **common)
    if default is None:
        return gr.Textbox("", placeholder=NOT_GIVEN.get(field, "no limit"), max_lines=1, **common)
    if field in TYPED:
        return gr.Number(default, precision=0 if about["type"] == "integer" else None, **common)
    return gr.Slider(about["minimum"], about["maximum"], default, step=SLIDER_STEP.get(field, 1), **common)


def _recipe(given: dict):
    """The Recipe of what the controls hold. Raises BadInput, with the control's label."""
    for role in ROLES:
        if not given[f"{role}_lora"]:
            raise BadInput(f"no {role} is picked", remedy=f"Pick a {role} LoRA")
    parents = [
        {
            "role": role,
            "lora": given[f"{role}_lora"],
            "prompt": given[f"{role}_prompt"] or "",
            "strength": given[f"{role}_strength"],
            "reference": _paths(given[f"{role}_reference"]),
        }
        for role in ROLES
    ]
    # an emptied box means the default
    rest = {field: given[field] for field in LABELS if given[field] is not None and given[field] != ""}
    try:
        return parse({"parents": parents, "output": "", **rest})
    except BadInput as error:
        where, _, message = error.problem.partition(": ")
        for i, role in enumerate(ROLES):
            where = where.replace(f"parents.{i}.", f"{role.capitalize()} ")
        raise BadInput(f"{LABELS.get(where, where)}: {message}" if message else where) from error


def _paths(files) -> list[str]:
    return [file.name for file in files or []]


def _named(subject: str | None, style: str | None, output: str, filled: dict) -> tuple[str, dict]:
    """The output name, which follows the two LoRAs for as long as nobody has written another."""
    if not subject or not style or output.strip() not in ("", filled.get("output", "")):
        return output, filled
    output = f"{subject}-{style}"
    return output, {**filled, "output": output}


def _suggested(host, name: str | None, prompt: str, role: str, filled: dict) -> tuple[str, str, dict]:
    """The prompt that a LoRA's file suggests, and where it came from; a prompt that was typed stays."""
    if not name:
        return prompt, "", filled
    try:
        words, source = trigger_words(host.peek(name))
    except BadInput as error:
        return prompt, _error(str(error), "Cannot read it"), filled
    typed = prompt.strip() not in ("", filled.get(role, ""))
    if typed:
        shortened = words if len(words) <= 200 else words[:200] + " …"
        note = f"Your prompt was kept; {source}: “{shortened}”." if words else "Your prompt was kept."
        return prompt, _line(note), filled
    note = f"Filled in from the {source}." if words else "Its file names no trigger word: write its prompt yourself."
    return words, _line(note), {**filled, role: words}


# --- what is said, as HTML -----------------------------------------------------------------------------------


def _error(text: str, what: str = "Cannot zip") -> str:
    return f"<div class='error'>{what}: {html.escape(text)}</div>"


def _line(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _nothing(text: str) -> list:
    """No tag and no pictures, but this text."""
    return [gr.update(visible=False), "", gr.update(value=[], visible=False), text]


def _warnings(warnings: list[str]) -> str:
    items = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    return f"<p>Worth knowing:</p><ul class='ziplora_warnings'>{items}</ul>" if items else ""


def _ready(report: dict) -> str:
    """The preflight in a line, and its warnings."""
    parents = report["parents"]
    bases = list(dict.fromkeys(p["base"] for p in parents))
    base = f"{_count(parents)} {bases[0]}" if len(bases) == 1 else " and ".join(bases)
    what = " and ".join(map(_kinds_and_ranks, parents))
    said = (
        f"{base}, {what}, {report['learned_layers']} layers learned, a file of {_size(report['bytes'])}, "
        f"on {report['model']['name']}"
    )
    return f"<p><b>Ready:</b> {html.escape(said)}.</p>{_warnings(report['warnings'])}"


def _kinds_and_ranks(parent: dict) -> str:
    kinds = "/".join(parent["kinds"])
    ranks = "/".join(map(str, parent["ranks"][:3])) + ("/…" if len(parent["ranks"]) > 3 else "")
    return f"{kinds} of rank {ranks}" if ranks else kinds


def _size(n: int) -> str:
    return f"{n / 1e6:.0f} MB" if n >= 1e7 else f"{n / 1e6:.1f} MB"


def _caption(point: float, result: Result) -> str:
    parents = result.preflight["parents"]
    return balance.caption(point, [p["role"] for p in parents], [p["name"] for p in parents])


def _result(job: Job) -> str:
    result = job.result
    state = "Stopped early, and kept" if result.stopped else "Done"
    words = " and ".join(f"“{p.prompt}”" for p in job.recipe.parents if p.prompt)
    use = f"{result.tag} is in your Lora folder. " + (
        f"Prompt it with the words of {_count(job.recipe.parents)}: {words}." if words else ""
    )
    head = f"<p><b>{state}:</b> {html.escape(use)}</p>"
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items() if seconds >= 0.5)
    foot = f"<p class='ziplora_small'>{html.escape(result.file)} ({_size(result.saved['bytes'])}). {spent}.</p>"
    head += _line(result.verdict)
    return head + _learned(result.learned, result.preflight["parents"]) + _warnings(result.warnings) + foot


def _count(parents: list) -> str:
    return "both" if len(parents) == 2 else "all"


def _learned(learned: dict, parents: list[dict]) -> str:
    """The errors, in a table."""
    merged, summed = learned.get("error"), learned.get("error_plain_sum")
    if not merged or not summed:
        return ""
    rows = "".join(
        f"<tr><td>{_capital(parent['role'])} <i>{html.escape(parent['name'])}</i></td>"
        f"<td>{short(was)}</td><td>{short(now)}</td></tr>"
        for parent, was, now in zip(parents, summed, merged)
    )
    return (
        "<table class='ziplora_errors'><tr><th>Distance from the LoRA alone</th><th>plain sum</th><th>zipped</th></tr>"
        f"{rows}</table><p class='ziplora_small'>0: just as that LoRA alone; 1: as far off as with no LoRA at all."
        + (f" Best at step {learned['best_step']}.</p>" if "best_step" in learned else "</p>")
    )
