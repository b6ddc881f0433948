"""The section Many: every chosen subject with every chosen style, looked over before any work, then zipped one by one."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ziplora_lib import access, effort
from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Host
from ziplora_lib.jobs import Job
from ziplora_lib.later import later
from ziplora_lib.merge.method import Callback
from ziplora_lib.naming import ROLES
from ziplora_lib.recipe import Recipe
from ziplora_lib.tab import words
from ziplora_lib.tab.controls import recipe_of
from ziplora_lib.tab.place import Place
from ziplora_lib.tab.running import QUIET
from ziplora_lib.tab.unfinished import Offer

if TYPE_CHECKING:
    from ziplora_lib.snapshot import Unfinished

batches, merges = later("ziplora_lib.batch"), later("ziplora_lib.many")

# fields of the section Zip that are decided here
OWN = {"output", "overwrite", "balance_points"}
# seconds that a change may take to look at pairs; those that are left are looked at by Plan
SOON = 0.3
# rows of a table; those with a problem come first where there are more pairs
SEEN = 200


@dataclass(frozen=True)
class Plan:
    """The pairs as the job of the button Plan has looked them over."""

    planned: list[merges.Planned]

    def public(self) -> dict:
        return {"pairs": [{"name": one.output, "problem": one.problem, "taken": one.taken} for one in self.planned]}


def build(place: Place, settings: Mapping[str, gr.components.Component]) -> Many:
    """The section's components and events. settings: the controls of the section Zip, by the recipe's fields."""
    return Many(place, settings)


class Many:
    """`pickers` list the LoRAs, `listed()` gives updates for them; `looking` is the event that tells of the pairs.

    The settings are another section's: this one looks at them whenever it is opened.
    """

    def __init__(self, place: Place, settings: Mapping[str, gr.components.Component]):
        self.place = place
        self.settings = {field: control for field, control in settings.items() if field not in OWN}
        gr.HTML(
            words.line(
                "Every subject here is merged with every style here. The settings are those of the section Zip; one picture "
                "of each is drawn."
            )
        )
        self.unfinished = Offer(place, ".pairs", "many")
        with gr.Row():
            self.pickers = [
                gr.Dropdown(
                    [],
                    value=[],
                    multiselect=True,
                    label=f"{role.capitalize()} LoRAs",
                    info=f"Type a part of a name to find it; each {role} goes with every {other}",
                    elem_id=f"ziplora_many_{role}s",
                )
                for role, other in zip(ROLES, reversed(ROLES))
            ]
            refresh = gr.Button("Refresh", elem_id="ziplora_many_refresh", min_width=80, scale=0)
        self.prompts = gr.Textbox(
            label="Prompts",
            info="Only where the trigger words in a LoRA's file will not do: a line for each, NAME: prompt",
            placeholder="dog: a photo of sks dog",
            lines=2,
            elem_id="ziplora_many_prompts",
        )
        with gr.Row():
            self.pattern = gr.Textbox(
                str(place.host.option("name")),
                label="Names",
                info="{subject}, {style}, {method} and {date} are filled in",
                max_lines=1,
                elem_id="ziplora_many_names",
            )
            self.existing = gr.Radio(
                ["skip", "overwrite"] if place.overwriting else ["skip"],
                value="skip",
                label="Names that are taken",
                info="Leave those pairs out, or replace the LoRAs that have them",
                elem_id="ziplora_many_existing",
            )
        with gr.Row():
            zip_button = gr.Button("Zip all", variant="primary", elem_id="ziplora_many_zip", scale=3)
            plan_button = gr.Button("Plan", elem_id="ziplora_many_plan", scale=1)
        said = gr.HTML(elem_id="ziplora_many_said")
        self.table = gr.HTML(elem_id="ziplora_many_table")
        self.sheet = gr.Image(
            label="All of them: a row for each subject, a column for each style",
            type="pil",
            interactive=False,
            visible=False,
            elem_id="ziplora_many_sheet",
        )
        self.reports = gr.File(
            label="What became of each, as CSV and as JSON",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id="ziplora_many_reports",
        )

        own = [*self.pickers, self.existing]
        inputs = [*self.pickers, self.prompts, self.pattern, self.existing, *self.settings.values()]
        self.looking = (self.looked_at, inputs, self.table)
        for event in (*(component.change for component in own), self.prompts.blur, self.pattern.blur):
            event(*self.looking, **QUIET)
        refresh.click(self._rescan, None, self.pickers, **QUIET)
        place.runner.offer(plan_button, self.planning, inputs, said, self.plan_shown, [self.table], "plan")
        shown = [self.table, self.sheet, self.reports, *self.unfinished.outputs, *self.pickers]
        place.runner.offer(zip_button, self.zipping, inputs, said, self.batch_shown, shown, "many")
        going_on = self.unfinished.preparing(self.going_on)
        place.runner.offer(
            self.unfinished.go_on, going_on, [self.unfinished.which], said, self.batch_shown, shown, "many"
        )

    # --- what is there -------------------------------------------------------------------------------------

    def listed(self) -> list:
        names = self.place.names()
        return [gr.update(choices=names) for _ in self.pickers]

    def _rescan(self) -> list:
        self.place.host.refresh()
        return self.listed()

    # --- from the page to a plan ------------------------------------------------------------------------------

    def _drafted(self, values: Sequence) -> list[merges.Planned]:
        """The pairs that the page asks for. Raises BadInput where that cannot be told."""
        subjects, styles, prompts, pattern, existing, *rest = values
        for role, chosen in zip(ROLES, (subjects, styles)):
            if not chosen:
                raise BadInput(f"no {role} is picked", remedy=f"Pick one {role} LoRA or more")
        access.check_overwriting(existing == "overwrite", self.place.overwriting)
        if (pairs := len(subjects) * len(styles)) > access.MOST_PAIRS:
            raise BadInput(
                f"these are {pairs:,} pairs, and {access.MOST_PAIRS:,} are the most", remedy="Pick fewer LoRAs"
            )
        parents = [{"lora": role, "role": role} for role in ROLES]  # what goes in is not a matter of the settings
        recipe = access.admitted(recipe_of(parents, dict(zip(self.settings, rest))), self.place.overwriting)
        settings = recipe.dict(exclude={"parents", "output"})
        given = prompts_of(prompts or "", {*subjects, *styles})
        pairs = [
            merges.Pair(merges.Chosen(subject, given.get(subject, "")), merges.Chosen(style, given.get(style, "")))
            for subject in subjects
            for style in styles
        ]
        host = self.place.host
        return merges.drafted(pairs, pattern or "", settings, existing, host.peek, host.destination)

    def looked_at(self, *values) -> str:
        """The plan as far as it is known at once."""
        if not values[0] or not values[1]:
            return ""
        until = time.monotonic() + SOON
        try:
            planned = self._drafted(values)
            return self._table(merges.with_preflight(planned, self.place.host, lambda _: time.monotonic() > until))
        except BadInput as error:
            return words.error(str(error))
        except Exception as error:
            traceback.print_exc()
            return words.error(f"{type(error).__name__}: {error}")

    def planning(self, *values) -> Job:
        planned = self._drafted(values)

        def work(host: Host, callback: Callback) -> Plan:
            return Plan(merges.with_preflight(planned, host, callback))

        return Job("plan", "Plan", work, planned)

    def zipping(self, *values) -> Job:
        planned = self._drafted(values)
        to_do = [one for one in planned if one.to_do]
        if not to_do:
            first = next((one.problem for one in planned if one.refusal), "")
            raise BadInput(
                f"none of the {len(planned)} pairs is left to zip" + (f" ({first.removesuffix('.')})" if first else ""),
                remedy="See the table, and press Plan to look again",
            )

        return self._batch(planned)

    def going_on(self, one: Unfinished) -> Job:
        """A list that was broken off, as it was asked for."""
        for recipe in one.recipes:
            access.admitted(recipe, self.place.overwriting)
        return self._batch(merges.left(one.recipes, self.place.host))

    def _batch(self, planned: list[merges.Planned]) -> Job:
        def work(host: Host, callback: Callback) -> batches.Batch:
            return merges.run_many(merges.with_preflight(planned, host, callback), host, callback)

        to_do = sum(one.to_do for one in planned)
        return Job("many", f"{to_do} pairs" if to_do != 1 else planned[0].output, work, planned)

    # --- what is shown ------------------------------------------------------------------------------------------

    def plan_shown(self, job: Job | None) -> list:
        if job is None:
            return [gr.update()]
        return [self._table(job.result.planned) if job.result else _without_result(job)]

    def batch_shown(self, job: Job | None) -> list:
        nothing = [gr.update(value=None, visible=False) for _ in (self.sheet, self.reports)]
        if job is None:
            return ["", *nothing, *self.unfinished.shown(), *(gr.update() for _ in self.pickers)]
        if job.result is None:
            return [_without_result(job), *nothing, *self.unfinished.shown(), *self.listed()]
        sheet = job.result.sheet()
        return [
            outcomes_table(job.result, job.seconds),
            gr.update(value=sheet, visible=sheet is not None),
            gr.update(value=reports(job.result), visible=True),
            *self.unfinished.shown(),
            *self.listed(),
        ]

    def _table(self, planned: Sequence[merges.Planned]) -> str:
        """The pairs, then what they take together."""
        facts = self._facts({chosen.lora for one in planned for chosen in (one.pair.subject, one.pair.style)})
        wrong = [one for one in planned if one.refusal]
        rows = planned if len(planned) <= SEEN else [*wrong, *(one for one in planned if not one.refusal)][:SEEN]
        table = words.table(["New LoRA", "Subject", "Style", ""], [_row(one, facts) for one in rows])
        left = len(planned) - len(rows)
        more = words.line(f"… and {left} pairs more.") if left else ""
        return table + more + words.line(together(planned, timed(self.place.jobs.values())))

    def _facts(self, names: set[str]) -> dict[str, str]:
        """What is known of LoRAs, in words."""
        found = {}
        for entry in self.place.host.listing():
            if entry.name in names:
                known = self.place.catalogue.facts(entry)
                told = [known.base, known.kind, f"rank {known.rank}" if known.rank else ""]
                found[entry.name] = ", ".join(filter(None, told))
        return found


def prompts_of(text: str, names: set[str]) -> dict[str, str]:
    """Lines NAME: prompt -> the prompts by name. Raises BadInput for a line that is none."""
    prompts = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        # a name may have a colon itself
        name = max((n for n in names if line.strip().startswith(f"{n}:")), key=len, default=None)
        if name is None:
            raise BadInput(
                f"Prompts, line {number}: {line.strip()[:60]!r} does not begin with a LoRA that is picked, and a colon",
                remedy="For instance dog: a photo of sks dog",
            )
        prompts[name] = line.strip()[len(name) + 1 :].strip()
    return prompts


def timed(jobs: Iterable[Job]) -> list[tuple[Recipe, float]]:
    """The merges of this session, by themselves and in batches, with the seconds that each took."""
    found = []
    for job in jobs:
        if job.kind == "merge" and job.state == "done":
            found.append((job.asked, job.seconds))
        elif job.kind == "many" and job.result is not None:
            pairs = zip(job.asked, job.result.outcomes)
            found += [(one.recipe, outcome.seconds) for one, outcome in pairs if outcome.state == "done"]
    return found


def together(planned: Sequence[merges.Planned], known: Sequence[tuple[Recipe, float]]) -> str:
    """How many there are, and what they take: time and size."""
    to_do = [one for one in planned if one.to_do]
    taken, wrong = (
        sum(one.taken and not one.refusal for one in planned),
        sum(one.refusal is not None for one in planned),
    )
    counts = [f"{len(to_do)} to zip", f"{taken} left out" if taken else "", f"{wrong} cannot be done" if wrong else ""]
    said = f"{len(planned)} pairs: {', '.join(filter(None, counts))}."
    if not to_do:
        return said
    expected = [effort.expected(one.recipe, known) for one in to_do]
    if None in expected:
        pictures, side = sum(effort.as_pictures(one.recipe) for one in to_do), to_do[0].recipe.resolution
        said += f" They take as long as about {pictures} pictures of {side} pixels."
    else:
        said += f" They take about {words.duration(sum(expected))}, by the merges before."
    sizes = [one.bytes for one in to_do if one.bytes is not None]
    if len(sizes) == len(to_do):
        return f"{said} The new files will have {words.size(sum(sizes))}."
    return f"{said} {len(to_do) - len(sizes)} were not looked at yet: press Plan to see whether they fit the model."


def _row(one: merges.Planned, facts: Mapping[str, str]) -> list:
    sources = dict(zip(ROLES, one.sources))
    prompts = {parent.role: parent.prompt for parent in one.recipe.parents} if one.recipe else {}

    def cell(role: str, chosen: merges.Chosen) -> str:
        known = f" ({facts[chosen.lora]})" if facts.get(chosen.lora) else ""
        prompt = prompts.get(role, "")
        shortened = prompt if len(prompt) <= 80 else prompt[:80] + " …"
        source = {"given": "as given"}.get(sources.get(role, ""), sources.get(role, ""))
        return f"{chosen.lora}{known}" + (f": “{shortened}”, {source}" if prompt else "")

    state = words.Wrong(one.problem) if one.refusal else "is there already, left out" if one.taken else ""
    return [one.output, cell("subject", one.pair.subject), cell("style", one.pair.style), state]


def outcomes_table(batch: batches.Batch, seconds: float) -> str:
    """What became of every pair."""
    head = words.line(f"{words.capital(batch.counted())}, in {words.duration(seconds)}.")
    return head + words.table(
        ["New LoRA", "Subject", "Style", "State", "Time", ""], list(map(_outcome, batch.outcomes))
    )


def _outcome(one: batches.Outcome) -> list:
    wrong = words.Wrong if one.state in ("failed", "refused") else str
    said = f"{one.tag} {one.said}".strip()
    spent = words.duration(one.seconds) if one.seconds else ""
    return [one.name, one.subject, one.style, wrong(one.state), spent, wrong(said)]


def reports(batch: batches.Batch) -> list[str]:
    """The files to download."""
    folder = Path(tempfile.mkdtemp(prefix="ziplora-"))
    table, data = folder / "zip-many.csv", folder / "zip-many.json"
    table.write_text(batch.csv(), encoding="utf-8-sig")  # the mark by which spreadsheets know UTF-8
    data.write_text(json.dumps(batch.public(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [str(table), str(data)]


def _without_result(job: Job) -> str:
    said = job.error or job.state
    return words.error(said, "Failed") if job.state == "failed" else words.line(words.capital(said))
