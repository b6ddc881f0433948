"""Many merges as one piece of work: every subject with every style, planned before any of it, then one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image

from ziplora_lib import snapshot
from ziplora_lib.batch import Batch, Outcome
from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Host, share
from ziplora_lib.job import preflight
from ziplora_lib.jobs import Job
from ziplora_lib.lora.metadata import made_by, trigger_words
from ziplora_lib.lora.reader import Lora, peek, tensor_sha256
from ziplora_lib.lora.writer import check_free, check_name
from ziplora_lib.merge import NEEDS_MODEL
from ziplora_lib.merge.method import Callback
from ziplora_lib.naming import ROLES, lora_name, named
from ziplora_lib.recipe import Recipe, parse, stored

# what is done about a name that is taken
EXISTING = ("skip", "refuse", "overwrite")
# the side in pixels to which the pictures of a batch are kept; beside the LoRAs they are whole
KEPT = 384
# as many merges as are told of while they run: the last ones that began
TOLD = 20


@dataclass(frozen=True)
class Chosen:
    """A LoRA of the batch. One without a prompt gets the trigger words that its file names."""

    lora: str
    prompt: str = ""
    strength: float = 1.0


@dataclass(frozen=True)
class Pair:
    """A subject and a style to be merged. output: the new LoRA's name; by the pattern if empty."""

    subject: Chosen
    style: Chosen
    output: str = ""


@dataclass(frozen=True)
class Planned:
    """A merge to come.

    sources: where each prompt is from; refusal: why it cannot be done, and `where` it is wrong: "subject", "style",
    "subject_prompt", "output" …, "" for the pair as a whole; taken: to be skipped, its name is there already; bytes: of the
    file to come, None before the preflight.
    """

    pair: Pair
    output: str
    recipe: Recipe | None = None
    file: Path | None = None
    sources: tuple[str, ...] = ()
    refusal: BadInput | None = None
    where: str = ""
    taken: bool = False
    bytes: int | None = None

    @property
    def to_do(self) -> bool:
        return self.refusal is None and not self.taken

    @property
    def problem(self) -> str:
        return str(self.refusal) if self.refusal else ""

    def refused(self, error: BadInput, where: str = "") -> Planned:
        return replace(self, refusal=error, where=where)


# --- the plan ------------------------------------------------------------------------------------------------


def plan(
    host: Host,
    subjects: Sequence[Chosen],
    styles: Sequence[Chosen],
    pattern: str,
    settings: Mapping,
    existing: str = "skip",
) -> list[Planned]:
    """Each subject with each style, and what is wrong with a pair as its `problem`. See `drafted` for what is raised."""
    pairs = [Pair(subject, style) for subject in subjects for style in styles]
    return with_preflight(drafted(pairs, pattern, settings, existing, host.peek, host.destination), host)


def drafted(
    pairs: Sequence[Pair],
    pattern: str,
    settings: Mapping,
    existing: str,
    peek: Callable[[str], Lora],
    destination: Callable[[str], Path],
) -> list[Planned]:
    """The pairs' recipes, and what can be said against them without a model; `peek` and `destination` as a host has them.

    settings: the recipe's other fields. Only the preview is drawn of each, and `existing` decides what is overwritten. Raises
    BadInput for settings and for a pattern that cannot be.
    """
    if existing not in EXISTING:
        raise BadInput(f"{existing!r} says nothing about names that are taken", remedy=f"Use {', '.join(EXISTING)}")
    settings = {**settings, "balance_points": 1, "overwrite": existing == "overwrite"}
    method = parse({**settings, "parents": [{"lora": role, "role": role} for role in ROLES], "output": ""}).method

    @cache
    def known(lora: str) -> Lora | BadInput:
        try:
            return peek(lora)
        except BadInput as error:
            return error

    def draft(pair: Pair) -> Planned:
        chosen = dict(zip(ROLES, (pair.subject, pair.style)))
        names = [{"role": role, "lora": lora.lora} for role, lora in chosen.items()]
        planned = Planned(pair, pair.output or named(pattern, names, method))
        parents, sources = [], []
        for role, lora in chosen.items():
            found = known(lora.lora)
            if isinstance(found, BadInput):
                return planned.refused(found, role)
            prompt, source = (lora.prompt, "given") if lora.prompt.strip() else trigger_words(found)
            if not prompt.strip() and method in NEEDS_MODEL:
                error = BadInput(
                    f"the {role} has no prompt, and its file names no trigger words",
                    file=found.path.name,
                    remedy="Give the prompt that it was trained with",
                )
                return planned.refused(error, f"{role}_prompt")
            parents.append({"lora": lora.lora, "role": role, "prompt": prompt, "strength": lora.strength})
            sources.append(source)
        planned = replace(planned, sources=tuple(sources))
        try:
            file = destination(check_name(planned.output))
            if existing == "refuse":
                check_free(file, overwrite=False)
        except BadInput as error:
            return planned.refused(error, "output")
        if file.resolve() in going_in:
            error = BadInput(
                f"{file.name} is one of the LoRAs that go in", remedy="Choose another name for what comes out"
            )
            return planned.refused(error, "output")
        try:
            recipe = parse({**settings, "parents": parents, "output": planned.output})
        except BadInput as error:
            return planned.refused(*_of_a_parent(error))
        return replace(planned, recipe=recipe, file=file, taken=existing == "skip" and file.exists())

    every_one = [known(chosen.lora) for pair in pairs for chosen in (pair.subject, pair.style)]
    going_in = {found.path.resolve() for found in every_one if isinstance(found, Lora)}
    planned = [draft(pair) for pair in pairs]
    times = Counter(one.output.casefold() for one in planned)
    return [
        one if times[one.output.casefold()] == 1 else one.refused(_collides(one, times), "output") for one in planned
    ]


def _of_a_parent(error: BadInput) -> tuple[BadInput, str]:
    """What a recipe says of a parent's field, in words, and which field that is."""
    place, _, message = error.problem.partition(": ")
    for i, role in enumerate(ROLES):
        if place.startswith(f"parents.{i}."):
            part = place.rpartition(".")[2]
            return BadInput(f"the {role}'s {part}: {message}", remedy="Change it"), f"{role}_{part}"
    return error, ""


def _collides(one: Planned, times: Counter) -> BadInput:
    return BadInput(
        f"{times[one.output.casefold()]} pairs would be called {one.output}",
        remedy="Give each a name of its own, for instance with {subject} and {style} in the pattern",
    )


class _ReadOnce:
    """A host whose LoRAs are glanced at once, however many pairs they are in."""

    def __init__(self, host: Host):
        self._host = host
        self.glance = cache(host.glance)

    def __getattr__(self, name: str):
        return getattr(self._host, name)


def with_preflight(planned: Sequence[Planned], host: Host, callback: Callback = lambda _: None) -> list[Planned]:
    """The same with what the preflight says by the files' headers; a true answer of the callback leaves the rest as it is."""
    told, once = list(planned), _ReadOnce(host)
    for i, one in enumerate(planned):
        if callback({"phase": "preflight", "step": i, "steps": len(planned), "what": "looking at the pairs"}):
            break
        if one.to_do:
            try:
                told[i] = replace(one, bytes=preflight(one.recipe, once, values=False).report["bytes"])
            except BadInput as error:
                told[i] = one.refused(error)
    return told


# --- the work ------------------------------------------------------------------------------------------------


def run_many(planned: Sequence[Planned], host: Host, callback: Callback = lambda _: None) -> Batch:
    """Merges one pair after another; what is refused or fails is kept as text, and the rest is done.

    The callback's steps are those of all merges together, and "rows" tells how the last ones went: name, state, said. A true
    answer keeps what is finished, the merge at work as `job.run` does, and begins no other.
    """
    outcomes: list[Outcome] = []
    for i, one in enumerate(planned):
        looking = {"phase": "preflight", "step": i, "steps": len(planned), "what": f"looking at {one.output}"}
        if one.taken and callback(looking):
            return Batch([*outcomes, *(as_found(replace(left, taken=False)) for left in planned[i:])])
        outcomes.append(as_found(one))
    if not any(one.to_do for one in planned):  # nor is a host needed
        return Batch(outcomes)
    with snapshot.listed(host.scratch(), [one.recipe for one in planned if one.recipe]):
        _zip_all(planned, outcomes, host, callback)
    return Batch(outcomes)


def _zip_all(planned: Sequence[Planned], outcomes: list[Outcome], host: Host, callback: Callback) -> None:
    """Puts what becomes of those that are to do into the outcomes."""
    to_do = [i for i, one in enumerate(planned) if one.to_do]
    steps, before = sum(planned[i].recipe.steps for i in to_do), 0
    asked_to_stop = False
    for number, i in enumerate(to_do, start=1):
        one = planned[i]
        begun = [outcomes[k] for k in to_do[max(0, number - TOLD) : number - 1]]
        rows = [*((other.name, other.state, other.tag or other.said) for other in begun), (one.output, "at work", "")]

        def tell(info: dict, number=number, one=one, rows=rows, before=before) -> bool:
            nonlocal asked_to_stop
            told = {
                "phase": "many",
                "step": before + int(share(info) * one.recipe.steps),
                "steps": steps,
                "what": f"{number} of {len(to_do)}: {one.output}: {info.get('what') or info['phase']}",
                "rows": rows,
            }
            asked_to_stop = bool(callback(told)) or asked_to_stop
            return asked_to_stop

        if tell({"phase": "preflight"}):
            break
        outcomes[i] = merged(one, outcomes[i], host, tell)
        before += one.recipe.steps
        if asked_to_stop or outcomes[i].state == "stopped":
            break


def left(recipes: Sequence[Recipe], host: Host) -> list[Planned]:
    """The plan of a list that was broken off: what it had finished is taken as it is, whatever it was told to overwrite."""
    return [_left(recipe, host) for recipe in recipes]


def _left(recipe: Recipe, host: Host) -> Planned:
    subject, style = (Chosen(parent.lora, parent.prompt, parent.strength) for parent in recipe.parents)
    planned = Planned(Pair(subject, style, recipe.output), recipe.output, recipe, sources=("given", "given"))
    try:
        planned = replace(planned, file=host.destination(check_name(recipe.output)))
        if not planned.file.exists():
            return planned
        return replace(planned, taken=not recipe.overwrite or found(planned) == FINISHED)
    except BadInput as error:  # a damaged file in its place may be overwritten, a name that cannot be may not
        return planned if planned.file and recipe.overwrite else planned.refused(error)


def as_found(one: Planned) -> Outcome:
    """A pair's outcome if nothing is done about it. A LoRA that is there already is read, and held against its hash."""
    names = [lora_name(chosen.lora) for chosen in (one.pair.subject, one.pair.style)]
    if one.refusal:
        return Outcome(one.output, *names, "refused", said=one.problem)
    if one.taken:
        try:
            said = found(one)
        except (BadInput, OSError) as error:
            return Outcome(one.output, *names, "refused", said=str(error))
        return Outcome(one.output, *names, "skipped", said=said, picture=_picture_beside(one.file))
    return Outcome(one.output, *names, "not begun")


# what is said of a LoRA that an earlier run has left
FINISHED = "finished before by this recipe, and whole"


def found(one: Planned) -> str:
    """What stands under a pair's name, in words. Raises BadInput where it is one of ours, but not whole."""
    lora = peek(one.file)
    if not (recipe := made_by(lora)):
        return "a LoRA of this name is there already"
    if lora.metadata.get("sshs_model_hash") != tensor_sha256(one.file):
        raise BadInput(
            "is there already, but is not what its own hash says",
            file=one.file.name,
            remedy="It is damaged: delete it, or ask to overwrite",
        )
    wanted = stored(one.recipe, [parent.name for parent in one.recipe.parents], one.recipe.strengths)
    baked = {"ziplora.strengths", "ziplora.split_from"} & lora.metadata.keys()
    if baked or _decisive(recipe) != _decisive(wanted):
        return "a LoRA of this name is there already, merged in another way"
    return FINISHED


def _decisive(recipe: Mapping) -> dict:
    """What of a stored recipe is the same whatever became of it on the way: memory that ran out, norms that were evened."""
    kept = {field: value for field, value in recipe.items() if field != "at_once"}
    if recipe.get("equal_norms"):
        kept["parents"] = [{k: v for k, v in parent.items() if k != "strength"} for parent in recipe["parents"]]
    return kept


def merged(one: Planned, outcome: Outcome, host: Host, callback: Callback) -> Outcome:
    """A pair's outcome, of the one from before it, after it was merged on this host."""
    job = Job.merge(one.recipe)
    job.run(host, callback)
    outcome = replace(outcome, state="refused" if job.bad_input else job.state, seconds=job.seconds)
    if job.result is None:
        return replace(outcome, said=job.error or "")
    preview = next((picture for point, picture in job.result.pictures if point == 0), None)
    return replace(
        outcome,
        tag=job.result.tag,
        said=job.result.verdict,
        warnings=job.result.warnings,
        picture=_smaller(preview) if preview else None,
    )


def _picture_beside(file: Path) -> Image.Image | None:
    """The preview of a LoRA that is there already, if there is one that can be read."""
    try:
        with Image.open(file.with_suffix(".png"), formats=["PNG"]) as picture:
            return _smaller(picture)
    except Exception:  # Pillow raises a dozen kinds, all of which mean that there is none
        return None


def _smaller(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((KEPT, KEPT))
    return small
