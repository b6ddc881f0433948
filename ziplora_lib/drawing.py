"""Pictures of a merged LoRA at other strengths: from the halves in its file, without its parents and without learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.history import understood
from ziplora_lib.hosts.host import Host
from ziplora_lib.lora.bake import check_strengths, origins, stacks, vectors_of
from ziplora_lib.lora.metadata import made_by
from ziplora_lib.lora.reader import Lora
from ziplora_lib.merge import balance
from ziplora_lib.merge.attach import attach
from ziplora_lib.merge.method import Callback
from ziplora_lib.merge.pairing import refuse_unfit
from ziplora_lib.pictures import strip
from ziplora_lib.recipe import Recipe, parse

# rows, and columns, that a sheet can have
MOST = 16
HIGHEST_SEED = 2**31 - 1


def recipe_of(lora: Lora, prompt: str = "", **given: float | None) -> Recipe:
    """What a merged LoRA is drawn by: the recipe that it was made by, with what is given in its place.

    given: `resolution`, `sampler_steps`, `guidance`, `seed`; None is not given. A file whose recipe cannot be read tells its
    parents' trigger words at least. Raises BadInput for a LoRA that ZipLoRA did not make, and for values that cannot be.
    """
    parents = origins(lora)
    try:
        fields, _ = understood(made_by(lora), lora.path.name)
    except BadInput:
        told = [{"lora": p["name"] or "?", "role": p["role"], "prompt": p["trigger"][:2000]} for p in parents]
        fields = {"parents": told, "output": lora.name}
    given = {name: value for name, value in given.items() if value is not None}
    if prompt:
        given["preview_prompt"] = prompt
    if "resolution" in given:
        given["preview_size"] = 0
    return parse({**fields, **given})


@dataclass(frozen=True)
class Plan:
    """A sheet of a merged LoRA, to be drawn. cells: in rows, for each picture the strengths, one a parent, and the seed."""

    recipe: Recipe
    cells: list[list[tuple[list[float], int]]]
    row_labels: list[str]
    column_labels: list[str]


def along_balance(lora: Lora, recipe: Recipe, seeds: Sequence[int], points: int = 5) -> Plan:
    """From more of the subject to more of the style; a row for each seed. Raises BadInput for what cannot be drawn."""
    roles, names = cast(lora)
    values = balance.points(points) if 1 <= points <= MOST else []
    cells = [[(balance.weights(value, roles), seed) for value in values] for seed in seeds]
    rows = [f"seed {seed}" if len(seeds) > 1 else "" for seed in seeds]
    return _checked(lora, Plan(recipe, cells, rows, [balance.caption(value, roles, names) for value in values]))


def over_strengths(
    lora: Lora, recipe: Recipe, seeds: Sequence[int], first: Sequence[float], second: Sequence[float]
) -> Plan:
    """At every pair from two lists of strengths, the subject's from left to right, the style's downwards.

    Where all parents have one role, they are the first one's and the others'. Raises BadInput for what cannot be drawn.
    """
    roles, names = cast(lora)
    left, right = balance.sides(roles, names)
    cells = [[(balance.spread(x, y, roles), seed) for x in first] for seed in seeds for y in second]
    ends = [f", seed {seed}" if len(seeds) > 1 else "" for seed in seeds]
    rows = [f"{right} {y:g}{end}" for end in ends for y in second]
    return _checked(lora, Plan(recipe, cells, rows, [f"{left} {x:g}" for x in first]))


def cast(lora: Lora) -> tuple[list[str], list[str]]:
    """The roles and the names of a merged LoRA's parents. Raises BadInput for a LoRA that ZipLoRA did not make."""
    parents = origins(lora)
    return [parent["role"] for parent in parents], [parent["name"] for parent in parents]


def _checked(lora: Lora, plan: Plan) -> Plan:
    rows, columns = len(plan.row_labels), len(plan.column_labels)
    if not (1 <= rows <= MOST and 1 <= columns <= MOST):
        raise BadInput(
            "this makes no sheet of pictures", remedy=f"Ask for 1 to {MOST} in a row, and as many rows at most"
        )
    if not plan.recipe.picture_prompt.strip():
        raise BadInput("there is no prompt for the pictures", remedy="Write one")
    for weights, seed in (cell for row in plan.cells for cell in row):
        check_strengths(lora, weights)
        if not 0 <= seed <= HIGHEST_SEED:
            raise BadInput(f"the seed {seed} is not between 0 and {HIGHEST_SEED}", remedy="For instance 1")
    return plan


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows. weights: for each picture the strength of each parent, where it is of a merged file's halves.

    stopped: the last pictures are missing.
    """

    rows: list[list[Image.Image]] = field(repr=False)
    row_labels: list[str]
    column_labels: list[str]
    prompt: str
    weights: list[list[list[float]]] = field(default_factory=list)
    stopped: bool = False

    def forget_pictures(self) -> None:
        """Frees their memory."""
        self.rows.clear()

    @property
    def pictures(self) -> list[tuple[Image.Image, str]]:
        """All of them in order, each with its caption."""
        return [
            (picture, caption(self.row_labels[r], self.column_labels[c]))
            for r, row in enumerate(self.rows)
            for c, picture in enumerate(row)
        ]

    @property
    def whole(self) -> Image.Image:
        """One picture of them all, with the labels at its edges."""
        return strip(self.rows, self.row_labels, self.column_labels)

    def public(self) -> dict:
        """As JSON: all but the pictures."""
        names = ("prompt", "row_labels", "column_labels", "weights", "stopped")
        return {name: getattr(self, name) for name in names}


def caption(row: str, column: str) -> str:
    """A picture in words, by where it stands on its sheet."""
    return ", ".join(label for label in (column, row) if label)


class Drawing:
    """A sheet in the making, on the host in its session. After a stop the rest of it stays empty."""

    def __init__(
        self, host: Host, recipe: Recipe, row_labels: Sequence[str], column_labels: Sequence[str], callback: Callback
    ):
        self.host, self.recipe, self.callback = host, recipe, callback
        self.row_labels, self.column_labels = list(row_labels), list(column_labels)
        self.rows: list[list[Image.Image]] = []
        self.stopped = False

    def row(self, cells: Sequence[tuple[Callable[[], None], int]]) -> None:
        """Draws the next row. cells: for each picture what decides which LoRAs take part, and the seed."""
        if self.stopped:
            return
        self.rows.append([])
        recipe = self.recipe
        try:
            for choose, seed in cells:
                self._tell()
                choose()
                latent = self.host.sample(
                    recipe.picture_prompt, seed, recipe.picture_size, recipe.sampler_steps, recipe.guidance
                )
                self.rows[-1].append(self.host.decode(latent))
        except Stopped:
            self.stopped = True

    def _tell(self) -> None:
        """Says which picture is next. Raises Stopped."""
        columns, done = len(self.column_labels), sum(map(len, self.rows))
        name = caption(self.row_labels[done // columns], self.column_labels[done % columns])
        info = {"phase": "draw", "step": done, "steps": columns * len(self.row_labels), "what": f"drawing {name}"}
        if self.callback(info):
            raise Stopped

    def sheet(self, weights: Sequence[Sequence[Sequence[float]]] = ()) -> Sheet:
        """What was drawn. Raises Stopped if that is nothing."""
        rows = [row for row in self.rows if row]
        if not rows:
            raise Stopped
        drawn = [[list(given) for given, _ in zip(cells, row)] for cells, row in zip(weights, rows)]
        return Sheet(rows, self.row_labels, self.column_labels, self.recipe.picture_prompt, drawn, self.stopped)


def draw(host: Host, name: str, plan: Plan, callback: Callback = lambda _: None) -> Sheet:
    """A merged LoRA's pictures, from its own ranks on the host's model, which is as before afterwards.

    Raises BadInput, before any picture, for a LoRA that another tool changed or that does not fit the model; Stopped when it
    was stopped before the first picture.
    """
    if callback({"phase": "preflight", "step": 0, "steps": 1, "what": f"opening {name}"}):
        raise Stopped
    lora, model = host.open(name), host.model()
    layers, vectors = stacks(lora), vectors_of(lora)
    slots = host.slots([*layers, *vectors])
    refuse_unfit(lora, {key: slot.shape for key, slot in slots.items()}, model.name, model.base)
    drawing = Drawing(host, plan.recipe, plan.row_labels, plan.column_labels, callback)
    with host.session(), host.embeddings([lora]), attach(slots, layers, vectors) as router:
        for row in plan.cells:
            drawing.row([(partial(router.merged, weights=weights), seed) for weights, seed in row])
    return drawing.sheet([[weights for weights, _ in row] for row in plan.cells])
