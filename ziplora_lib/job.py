"""A merge from start to end: preflight → calibrate → merge → check → save → publish → preview.

Every merge that a face (tab, API, command line) starts goes through `run`; jobs.py is about runs with a state to look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image

from ziplora_lib import calibration, history, memory, snapshot, verdict
from ziplora_lib.errors import BadInput, MergeFailed, NotFinite, NotSaved, Stopped, out_of_memory
from ziplora_lib.hosts.host import Host
from ziplora_lib.lora import keys, writer
from ziplora_lib.lora.bake import bake, split
from ziplora_lib.lora.extras import embedding_tensors, extra_tensors
from ziplora_lib.lora.limit import limit
from ziplora_lib.lora.metadata import merged_metadata, trained_elsewhere, trigger_words
from ziplora_lib.lora.reader import Lora
from ziplora_lib.lora.stack import Stack
from ziplora_lib.lora.vectors import Vectors
from ziplora_lib.merge import BY_STEPS, NEEDS_MODEL, balance
from ziplora_lib.merge.attach import Router, Slot, attach
from ziplora_lib.merge.method import Callback, Keeper, Merged, Settings
from ziplora_lib.merge.methods import METHODS
from ziplora_lib.merge.pairing import Pairing, equalising, norm_warnings, outlines, pair, refuse_unfit, report
from ziplora_lib.opening import opened
from ziplora_lib.pictures import png
from ziplora_lib.recipe import Recipe, stored

# pixels a side up to which SD 1.5, trained at 512, still makes one picture and not two side by side
LARGEST_SD1 = 768


@dataclass(frozen=True)
class Preflight:
    """What is known before any work. report: see `pairing.report`, with the model and the size of the file to come."""

    loras: list[Lora]
    slots: dict[str, Slot]
    destination: Path
    report: dict

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each layer key's weight shape in the model, (out, in…)."""
        return {key: slot.shape for key, slot in self.slots.items()}


@dataclass(frozen=True)
class Result:
    """A finished merge.

    recipe: as the file keeps it; verdict: whether it paid, in words; memory: how the steps ran (`memory.Plan`); pictures:
    (balance, picture) from subject to style, the same seed.
    """

    file: str
    tag: str
    stopped: bool
    recipe: dict
    warnings: list[str]
    losses: dict
    learned: dict
    verdict: str
    saved: dict
    memory: dict | None
    preflight: dict
    seconds: dict
    history: list[dict] = field(repr=False, default_factory=list)
    pictures: list[tuple[float, Image.Image]] = field(repr=False, default_factory=list)

    def forget_pictures(self) -> None:
        """Frees their memory."""
        self.pictures.clear()

    def public(self) -> dict:
        """As JSON: all but the history and the pictures."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("history", "pictures")}


def preflight(recipe: Recipe, host: Host, values: bool = True) -> Preflight:
    """Everything that can be refused before any work; raises BadInput that says what, where and what to do.

    values: without them the files' headers tell alone, at once: no norms, and not what the host leaves out; and a model is
    not waited for: where none is loaded yet, the LoRAs are only held against each other.
    """
    destination = host.destination(writer.check_name(recipe.output))
    writer.check_free(destination, recipe.overwrite)
    model = host.model() if values else host.model_at_hand()
    loras = [(host.open if values else host.glance)(parent.lora) for parent in recipe.parents]
    for i, k in combinations(range(len(loras)), 2):
        if loras[i].hash == loras[k].hash and not recipe.allow_same:
            raise BadInput(
                f"{recipe.titles[i]} and {recipe.titles[k]} are the same LoRA ({loras[i].name}, {loras[k].name})",
                file=loras[i].path.name,
                remedy="Pick another one, or allow it: allow_same, --allow-same, or the box in the tab",
            )
    if destination.exists() and any(lora.path.resolve() == destination.resolve() for lora in loras):
        raise BadInput(f"the output {destination.name} is one of the LoRAs that go in", remedy="Choose another name")
    every_key = [key for lora in loras for key in (*lora.layers, *lora.vectors)]
    slots = host.slots(every_key) if model else {}
    shapes = {key: slot.shape for key, slot in slots.items()} if model else outlines(loras)
    fits = (model.name, model.base) if model else next(((x.name, x.base) for x in loras if x.base != "unknown"), None)
    for lora in loras if fits else ():
        refuse_unfit(lora, shapes, *fits)
    if recipe.method in NEEDS_MODEL:
        for parent, title, lora in zip(recipe.parents, recipe.titles, loras):
            if not parent.prompt.strip():
                raise BadInput(
                    f"the {title} has no prompt",
                    file=lora.path.name,
                    remedy="Write the prompt it was trained with, trigger word included",
                )
            calibration.references(parent.reference, 64)
    learn_text = recipe.text_encoders == "learn"
    if learn_text and model and model.moves:
        raise BadInput(
            "the text encoders cannot be learned while the model's parts are moved to and fro (--medvram, --lowvram)",
            remedy="Set text_encoders to sum, or start the WebUI without it",
        )
    only_factors = recipe.layer_names != "kohya"
    if only_factors and not any(lora.layers for lora in loras):
        raise BadInput(
            f"with {recipe.layer_names} layer names nothing of these LoRAs can be saved: they change norms and biases alone",
            remedy="Choose kohya layer names",
        )
    details = report(
        loras, recipe.strengths, shapes, learn_text, recipe.whole_or_rank, recipe.equal_norms, only_factors
    )
    _, clashing = embedding_tensors(loras)
    details["warnings"] += [f"two LoRAs bring an embedding {name!r}; the first one's is kept" for name in clashing]
    if only_factors and fits:
        for lora in loras:
            for key in lora.layers:
                keys.spelled(key, fits[1], recipe.layer_names)  # refuses what has no such name
        details["warnings"].append(f"with {recipe.layer_names} layer names the WebUI cannot read the file")
    for lora in loras if values else ():
        details["warnings"] += _left_out(lora, [key for key in host.unapplied(lora) if key in shapes])
    for i, (parent, lora) in enumerate(zip(details["parents"], loras)):
        parent["role"], parent["title"] = recipe.parents[i].role, recipe.titles[i]
        parent["trigger"], parent["trigger_from"] = trigger_words(lora)
        if model:
            details["warnings"] += trained_elsewhere(lora, model.name, model.prediction)
    if fits and fits[1] == "sd1" and recipe.resolution > LARGEST_SD1:
        details["warnings"].append(
            f"SD 1.5 doubles what it shows in pictures above {LARGEST_SD1} pixels, and these have {recipe.resolution}; "
            "a resolution of 512 suits it better"
        )
    details["model"] = asdict(model) if model else None
    details["free_memory"] = memory.free_memory(torch.device(model.device)) if model else None
    details["bytes"] = details.pop("values") * torch.empty(0, dtype=writer.DTYPES[recipe.dtype]).element_size()
    writer.check_room(destination.parent, details["bytes"])
    return Preflight(loras, slots, destination, details)


def _left_out(lora: Lora, unapplied: list[str]) -> list[str]:
    """What is to be said of layers that the host does not apply. Raises BadInput if that is all that the LoRA has."""
    said = []
    if kept := [key for key in unapplied if key not in lora.dense]:
        said.append(
            f"{lora.name}: left out, or their biases, when it is prompted with by itself, but not in the merge: "
            f"{keys.listed(kept)}"
        )
    if lost := [key for key in unapplied if key in lora.dense]:
        kinds = ", ".join(dict.fromkeys(lora.dense[key].kind for key in lost))
        if len(lost) == len(lora.layers) and not lora.vectors:
            raise BadInput(
                f"none of its layers ({kinds}) can be applied to the model here, in a prompt no more than in a merge",
                file=lora.path.name,
                key=lost[0],
                remedy="Pick another LoRA, or one that another tool has converted",
            )
        said.append(f"{lora.name}: {len(lost)} layers ({kinds}) cannot be applied here, and are left out of the merge")
    return said


def prepare(recipe: Recipe, ready: Preflight, host: Host, callback: Callback) -> tuple[Pairing, list[float], list[str]]:
    """The parents as they go into the merge, in the host's session: all layers as factors; at which strengths.

    With warnings in words: what that lost, what had to be left out, which strengths were chosen.
    """
    parents = opened(ready.loras, host, recipe.whole_or_rank, callback)
    loras, warnings = [parent.lora for parent in parents], [said for parent in parents for said in parent.warnings()]
    strengths = recipe.strengths
    if recipe.equal_norms:
        norms = [lora.norm() * abs(w) for lora, w in zip(loras, strengths)]
        strengths = [w * f for w, f in zip(strengths, equalising(norms))]
        said = ", ".join(f"{lora.name} {w:.3g}" for lora, w in zip(loras, strengths))
        warnings.append(f"brought to one norm: strengths {said}")
        warnings += [f"{lora.name} has no norm that could be evened out" for lora, n in zip(loras, norms) if n == 0]
    elif any(lora.dense for lora in ready.loras):
        warnings += norm_warnings(loras, strengths)
    first = sum(balance.first_side([parent.role for parent in recipe.parents]))
    pairing = pair(loras, strengths, ready.shapes, recipe.text_encoders == "learn", first)
    if pairing.cancels:
        warnings.append("the LoRAs cancel each other: their plain sum changes nothing")
    return pairing, strengths, warnings


def run(recipe: Recipe, host: Host, callback: Callback = lambda _: None) -> Result:
    """Merges, saves and publishes. The callback gets a dict a step; a true answer stops and keeps the best so far.

    Where memory runs out it begins again by itself, more sparingly, and where the model's precision gives no finite numbers,
    once in fp32; it says so in a warning. Raises BadInput before any work, Stopped when there was nothing to keep,
    MergeFailed when no right result came. However it ends, the host is as it was before.
    """
    attempt = Attempt(recipe)
    while True:
        try:
            return _run(attempt, host, callback)
        except Exception as error:
            if attempt.keeper and isinstance(error, NotSaved | BadInput):  # a name, a folder, a disk: to be mended
                attempt.keeper.keep_last()
            elif attempt.keeper and isinstance(error, MergeFailed):  # it would end so again
                attempt.keeper.forget()
            if attempt.saved:
                raise
            attempt = _again(attempt, error, host)
        # only here is the error gone, and with it what its frames still held
        memory.give_back()
        callback({"phase": "preflight", "step": 0, "steps": 1, "what": attempt.said[-1], "again": True})


@dataclass
class Attempt:
    """One try at a merge. said: why it is not the first; plan: how its steps run, and what keeps them, once that is known."""

    recipe: Recipe
    full_precision: bool = False
    said: tuple[str, ...] = ()
    plan: memory.Plan | None = None
    keeper: snapshot.Keeper | None = None
    saved: bool = False


def _again(attempt: Attempt, error: Exception, host: Host) -> Attempt:
    """The next try after this error. Raises it, or what it means, where there is none."""
    if isinstance(error, NotFinite) and not attempt.full_precision and (now := host.model().dtype) != "float32":
        said = f"the model gave no finite values in {now}: begun again in float32"
        return Attempt(attempt.recipe, True, (*attempt.said, said))
    if not out_of_memory(error):
        raise error
    if attempt.full_precision and attempt.plan is None:
        raise MergeFailed(
            "The model gives no finite values in half precision, and for full precision there is too little memory. Use "
            "it in bf16, or close what else uses the GPU."
        ) from None
    if (less := memory.sparing(attempt.recipe, attempt.plan)) is None:
        raise MergeFailed(
            "There is too little memory, and nothing is left that would save some. Choose a smaller resolution than "
            f"{attempt.recipe.resolution}, or close what else uses the GPU."
        ) from None
    recipe, what = less
    return Attempt(recipe, attempt.full_precision, (*attempt.said, f"memory ran out: begun again with {what}"))


def _run(attempt: Attempt, host: Host, callback: Callback) -> Result:
    recipe = attempt.recipe
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def phase_done(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 3)

    callback({"phase": "preflight", "step": 0, "steps": 1})
    ready = preflight(recipe, host)
    phase_done("preflight")
    warnings = [*attempt.said, *ready.report["warnings"]]
    # the session first: it takes out what the last generation's LoRAs had brought
    with host.session(attempt.full_precision), host.embeddings(ready.loras):
        pairing, strengths, said = prepare(recipe, ready, host, callback)
        warnings += said
        phase_done("open")
        with attach(ready.slots, pairing.stacks, pairing.vectors) as router:
            merged = _merge(attempt, ready, host, router, pairing, callback, phase_done)
        warnings += merged.warnings
        if merged.stopped:
            warnings.append(
                f"stopped at step {len(merged.history)} of {recipe.steps}; the best coefficients so far, of "
                f"step {merged.summary['best_step']}, were kept"
            )
        callback({"phase": "save", "step": 0, "steps": 1})
        stacks, loss = limit(merged.stacks, recipe.max_rank, recipe.kept_share)
        if loss is not None and loss.worst > 1e-5:
            before = "; the errors are those from before the cut" if "error" in merged.summary else ""
            warnings.append(f"cutting the rank of {loss.layers} layers lost {loss}{before}")
        kept = stored(recipe, [lora.name for lora in ready.loras], strengths)
        if attempt.plan and recipe.method in BY_STEPS:
            kept["at_once"] = attempt.plan.at_once  # rounding depends on it
        saved = _save(recipe, ready, merged, stacks, pairing.vectors, kept, warnings)
        if attempt.keeper:
            attempt.keeper.forget()
        attempt.saved = True
        saved["rank_loss"] = asdict(loss) if loss is not None else None
        tag = _published(host, ready.destination, warnings)
        phase_done("save")
        pictures = []
        if not merged.stopped:
            texts = partial(_texts, recipe, host, tag, saved["sha256"], kept)
            attached = partial(attach, ready.slots, stacks, pairing.vectors)
            pictures = _pictures(recipe, host, attached, ready.destination, texts, callback, warnings)
        phase_done("preview")
    last = merged.history[-1] if merged.history else {}
    errors, summed = (merged.summary.get(name, []) for name in ("error", "error_plain_sum"))
    return Result(
        file=str(ready.destination),
        tag=tag,
        stopped=merged.stopped,
        recipe=kept,
        warnings=warnings,
        losses={k: last[k] for k in ("step", "loss", "errors", "penalty", "mean_m", "retained") if k in last},
        learned=merged.summary,
        verdict=verdict.verdict(errors, summed, ready.report["parents"], recipe.loss_guidance > 1),
        saved=saved,
        memory=asdict(attempt.plan) if attempt.plan and recipe.method in BY_STEPS else None,
        preflight=ready.report,
        seconds=seconds,
        history=merged.history,
        pictures=pictures,
    )


def _merge(
    attempt: Attempt,
    ready: Preflight,
    host: Host,
    router: Router,
    pairing: Pairing,
    callback: Callback,
    phase_done: Callable[[str], None],
) -> Merged:
    recipe = attempt.recipe
    if recipe.method not in NEEDS_MODEL:
        return METHODS[recipe.method](pairing, None, settings_of(recipe), callback)
    if not pairing.learned:
        return METHODS["direct"](pairing, None, settings_of(recipe), callback)
    samples = calibration.calibrated(host, router, recipe, callback)
    phase_done("calibrate")
    with host.resting(text=recipe.text_encoders == "learn"):
        memory.give_back()
        attempt.plan = memory.Plan("fast" if recipe.memory == "auto" else recipe.memory, recipe.together)
        attempt.plan = plan = memory.choose(recipe, host, pairing, samples)
        if recipe.method in BY_STEPS:
            callback({"phase": "warm start", "step": 0, "steps": 1, "what": f"memory: {plan}"})
            model = ready.report["model"]
            identity = [*(lora.hash for lora in ready.loras), model["name"], model["base"], model["prediction"]]
            attempt.keeper = snapshot.Keeper(host.scratch(), recipe, identity)
        settings = settings_of(recipe, plan.at_once, attempt.keeper)
        with memory.followed(plan, host.unet(), samples.device):
            merged = METHODS[recipe.method](pairing, samples, settings, callback)
    phase_done("merge")
    return merged


def settings_of(recipe: Recipe, at_once: int | None = None, keeper: Keeper | None = None) -> Settings:
    """What of the recipe is the method's. at_once: samples in one pass, as the recipe has it if not given."""
    names = Settings.__dataclass_fields__.keys() - {"at_once", "keeper"}
    return Settings(
        **{name: getattr(recipe, name) for name in names}, at_once=at_once or recipe.together, keeper=keeper
    )


def _save(
    recipe: Recipe,
    ready: Preflight,
    merged: Merged,
    stacks: dict[str, Stack],
    vectors: dict[str, Vectors],
    kept: dict,
    warnings: list[str],
) -> dict:
    notes = f"Merged by ZipLoRA: {history.in_words(kept)}. The whole recipe is in the file's metadata (ziplora.recipe)."
    model = ready.report["model"]
    metadata = merged_metadata(
        ready.destination.stem,
        ready.loras,
        {key: stack.ranks for key, stack in stacks.items()},
        kept,
        merged.summary,
        model["base"],
        model["prediction"],
    )
    extra = {}
    if recipe.layer_names == "kohya":  # the others have no place for these
        spelled = partial(keys.spelled, base=model["base"], names="kohya")
        stacks, extra = extra_tensors(stacks, vectors, ready.shapes, spelled)
        extra |= embedding_tensors(ready.loras)[0]
    names = {"names": recipe.layer_names, "base": model["base"]}
    try:
        saved = writer.write(ready.destination, stacks, recipe.dtype, metadata, recipe.overwrite, extra=extra, **names)
    except OSError as error:
        raise NotSaved(
            f"The merge is done, but could not be saved in {ready.destination.parent} ({error.strerror or error}). Mend "
            "that and zip again with the same settings: what was learned is kept."
        ) from error
    words = ", ".join(dict.fromkeys(w for w, _ in map(trigger_words, ready.loras) if w))
    card = writer.card(words or recipe.parents_prompt, notes, base=model["base"])
    try:
        writer.write_beside(ready.destination, ".json", card)
    except OSError as error:  # the LoRA itself is there, whole
        warnings.append(f"the LoRA is saved, but its card could not be written ({error.strerror})")
    return saved


def _texts(recipe: Recipe, host: Host, tag: str, sha256: str, kept: dict, point: float) -> dict[str, str]:
    """What a picture of the merged LoRA at this balance carries."""
    settings = (recipe.seed, recipe.picture_size, recipe.sampler_steps, recipe.guidance)
    return history.texts(kept, host.infotext(f"{recipe.picture_prompt} {tag}", *settings), tag, sha256, point)


def _published(host: Host, destination: Path, warnings: list[str]) -> str:
    """The LoRA's tag. What the host fails at costs no merge: the file is there."""
    try:
        return host.publish(destination)
    except Exception as error:
        warnings.append(f"the LoRA is saved, but could not be put into the list ({error}): refresh it")
        return f"<lora:{destination.stem}:1>"


def _pictures(
    recipe: Recipe,
    host: Host,
    attached: Callable[[], AbstractContextManager[Router]],
    destination: Path,
    texts: Callable[[float], dict[str, str]],
    callback: Callback,
    warnings: list[str],
) -> list[tuple[float, Image.Image]]:
    """The strip along the balance; its middle is the preview beside the file. What fails here costs no merge."""
    pictures = []
    try:
        with attached() as router:
            # the middle first: it is the preview
            for k, point in enumerate(sorted(balance.points(recipe.balance_points), key=abs)):
                if callback({"phase": "preview", "step": k, "steps": recipe.balance_points}):
                    raise Stopped
                router.merged(weights=balance.weights(point, [p.role for p in recipe.parents]))
                latent = host.sample(
                    recipe.picture_prompt, recipe.seed, recipe.picture_size, recipe.sampler_steps, recipe.guidance
                )
                if not torch.isfinite(latent).all():
                    raise MergeFailed("with it the model gives no finite values: lower the LoRAs' strengths")
                picture = host.decode(latent)
                picture.info = texts(point)
                pictures.append((point, picture))
                if point == 0:
                    writer.write_beside(destination, ".png", png(picture))
    except Stopped:
        warnings.append("the LoRA is saved; making its preview pictures was interrupted")
    except Exception as error:  # whatever it is, the merge itself is done and saved
        warnings.append(f"the LoRA is saved, but its preview pictures could not be made ({error})")
    if len(pictures) < recipe.balance_points:  # a strip with gaps would mislead; the preview stands by itself
        pictures = pictures[:1]
    return sorted(pictures, key=lambda p: p[0])


def bake_balance(host: Host, name: str, output: str, weights: Sequence[float], overwrite: bool = False) -> dict:
    """Saves a merged LoRA at other strengths under another name and publishes it; returns file, tag and the writer's facts.

    Raises BadInput for a LoRA that ZipLoRA did not make, and for a name that cannot be used.
    """
    destination = host.destination(writer.check_name(output))
    with host.exclusive("ziplora bake"):
        saved = bake(host.peek(name).path, destination, weights, overwrite)
        return {"file": str(destination), "tag": host.publish(destination), **saved}


def split_merged(host: Host, name: str, outputs: Sequence[str], overwrite: bool = False) -> list[dict]:
    """Saves each parent's half of a merged LoRA as a LoRA of its own and publishes it; for each what `bake_balance` returns.

    Raises BadInput for a LoRA that ZipLoRA did not make, and for names that cannot be used or are not one a parent.
    """
    destinations = [host.destination(writer.check_name(output)) for output in outputs]
    with host.exclusive("ziplora split"):
        halves = split(host.peek(name).path, destinations, overwrite)
        return [{"file": str(path), "tag": host.publish(path), **saved} for path, saved in zip(destinations, halves)]
