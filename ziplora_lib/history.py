"""Merges that were done: what a merged file and its pictures keep of their recipe, and how it comes out of them again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from ziplora_lib import infotext as info
from ziplora_lib.catalogue import Catalogue
from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import PREVIEWS
from ziplora_lib.lora.reader import peek
from ziplora_lib.merge import balance
from ziplora_lib.pictures import png_texts
from ziplora_lib.recipe import Parent, Recipe, parse

# the text of a PNG that has the recipe
TEXT = "ziplora"
# characters of the longest recipe, and bytes of the longest JSON file with one in it: a report has every step as well
LONGEST, LARGEST = 1_000_000, 50_000_000
# of unknown fields, how many are named, and how much of a name
NAMED, LETTERS = 8, 40
STRONGEST = Parent.__fields__["strength"].field_info.le

_TAKE = "Take a LoRA that ZipLoRA merged, its preview picture (.png) or a recipe (.json)"


@dataclass(frozen=True)
class Past:
    """A LoRA that ZipLoRA merged. when: seconds since 1970; preview: its picture's URL, picture: its file.

    recipe: what of it can be merged by again, {} with a problem where nothing can; notes: what of it could not be kept.
    """

    name: str
    when: float
    preview: str = ""
    picture: Path | None = None
    recipe: dict = field(default_factory=dict)
    notes: Sequence[str] = ()
    problem: str = ""

    @property
    def parents(self) -> list[str]:
        """Their names, subjects first."""
        return [parent["lora"] for parent in self.recipe.get("parents", [])]

    @property
    def method(self) -> str:
        return self.recipe.get("method", "")


def merges(catalogue: Catalogue, limit: int) -> list[Past]:
    """The LoRAs that ZipLoRA merged, the newest first."""
    found = []
    for entry, facts in catalogue.zipped()[:limit]:
        picture = next((p for end in PREVIEWS if (p := entry.path.with_name(entry.path.stem + end)).is_file()), None)
        common = {"name": entry.name, "when": facts.when, "preview": entry.preview, "picture": picture}
        try:
            fields, notes = understood(facts.recipe, entry.path.name)
            found.append(Past(**common, recipe=fields, notes=notes))
        except BadInput as error:  # one odd file is told, and costs nobody the list
            found.append(Past(**common, problem=str(error)))
    return found


# --- in words, and into pictures ---------------------------------------------------------------------------------


def in_words(recipe: Mapping, point: float = 0.0) -> str:
    """A recipe, as `stored` or `understood` gives it, in a line. point: a balance that it was taken to afterwards."""

    def value(name: str):
        return recipe.get(name, Recipe.__fields__[name].default)

    parents = recipe["parents"]
    said = " + ".join(f"{p['role']} {p['lora']} at {p.get('strength', 1.0):g}" for p in parents)
    norms = ", brought to one norm" if value("equal_norms") else ""
    steps = f", {value('steps')} steps" if value("method") == "ziplora" else ""
    at = balance.caption(point, [p["role"] for p in parents], [p["lora"] for p in parents])
    return f"{said}{norms}; {value('method')}{steps}, seed {value('seed')}, {value('resolution')} pixels, balance {at}"


def texts(recipe: Mapping, infotext: str, tag: str, sha256: str, point: float = 0.0) -> dict[str, str]:
    """What a picture carries: `parameters` for the WebUI's PNG Info, and the recipe.

    tag: the merged LoRA's, sha256: its tensors', by which the WebUI finds it under another name; point: the balance of the
    picture, if it is another than the LoRA's.
    """
    name = tag.removeprefix("<lora:").rpartition(":")[0]
    settings = {"Lora hashes": f"{name}: {sha256[:12]}", "ZipLoRA": in_words(recipe, point)}
    carried = json.dumps(recipe, ensure_ascii=False, sort_keys=True)
    return {"parameters": info.extended(infotext, settings), TEXT: carried}


def as_json(recipe: Mapping) -> str:
    """A recipe as POST /ziplora/v1/merge takes it. Raises BadInput for what is none."""
    return json.dumps(understood(recipe)[0], ensure_ascii=False, indent=2)


# --- and out of them again ----------------------------------------------------------------------------------------


def recipe_from(path: Path) -> dict:
    """The recipe in a merged LoRA, in a picture that ZipLoRA wrote, or in a JSON file: a recipe, a report or a result.

    As it stands there: see `understood`, which it passes. Raises BadInput for all else.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".safetensors":
        text = peek(path).metadata.get("ziplora.recipe")
        if text is None:
            raise BadInput("is not a LoRA that ZipLoRA merged: it has no recipe in it", file=path.name, remedy=_TAKE)
    elif ending == ".png":
        text = png_texts(path).get(TEXT)
        if text is None:
            raise BadInput(
                "carries no recipe: ZipLoRA did not write it, or another program saved it without its texts",
                file=path.name,
                remedy="Take the merged LoRA itself",
            )
    elif ending == ".json":
        text = _written(path)
    else:
        raise BadInput("is neither a LoRA, nor a PNG picture, nor JSON", file=path.name, remedy=_TAKE)
    recipe = _loaded(text, path.name, LARGEST if ending == ".json" else LONGEST)
    understood(recipe, path.name)
    return recipe


def _written(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # reading a pipe never ends
            problem = "is no file"
        elif path.stat().st_size > LARGEST:
            problem = "is larger than any recipe"
        else:
            return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        problem = "is not JSON: it is no text"
    except ValueError:  # a name that no file can have
        problem = "there is no such file"
    raise BadInput(problem, file=path.name, remedy=_TAKE)


def _loaded(text: str, file: str, longest: int) -> dict:
    """The recipe in a JSON text, where it stands in a report or in a job's result too."""
    if len(text) > longest:
        raise BadInput("has a text that is longer than any recipe", file=file, remedy=_TAKE)
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise BadInput("is nested more deeply than any recipe", file=file, remedy=_TAKE) from error
    except ValueError as error:
        raise BadInput(f"its recipe is not JSON ({error})", file=file, remedy=_TAKE) from error
    for part in ("result", "recipe"):
        if isinstance(found, dict) and "parents" not in found:
            found = found.get(part, found)
    return found


def understood(recipe: Mapping, file: str | None = None) -> tuple[dict, list[str]]:
    """A stored recipe as this version and its API take it; and, in words, what of it could not be kept.

    What the recipe does not say is not in it. Raises BadInput, naming the file, for what is no recipe.
    """
    parents = recipe.get("parents") if isinstance(recipe, Mapping) else None
    if not isinstance(parents, list) or not all(isinstance(parent, Mapping) for parent in parents):
        raise BadInput("is not a recipe: it does not say which LoRAs were merged", file=file, remedy=_TAKE)
    kept = {name: recipe[name] for name in Recipe.__fields__ if name in recipe}
    kept["parents"] = [{name: parent[name] for name in Parent.__fields__ if name in parent} for parent in parents]
    for parent in kept["parents"]:
        parent.pop("reference", None)  # files of whoever merged: a recipe has their number at most
    _within_bounds(kept)
    try:
        full = json.loads(parse(kept).json())
        # JSON can hold half a character; no page and no file name can
        json.dumps(full, ensure_ascii=False).encode()
    except BadInput as error:
        raise BadInput(
            f"its recipe cannot be used, {error.problem}", file=file, remedy="Correct it, or pick the LoRAs anew"
        ) from error
    except UnicodeEncodeError as error:
        raise BadInput("its recipe has a broken character", file=file, remedy="Pick the LoRAs anew") from error
    unknown = [name for name in recipe if name not in Recipe.__fields__]
    unknown += [name for parent in parents for name in parent if name not in Parent.__fields__]
    notes = [
        f"{parent['lora']}: its training pictures; pick them again" for parent in parents if parent.get("reference")
    ]
    notes += [f"fields that this version of ZipLoRA does not know: {_named(unknown)}"] if unknown else []
    return {name: full[name] for name in full if name in kept}, notes


def _within_bounds(kept: dict) -> None:
    """Strengths that equal norms led out of bounds, put back to their mean: evened out again, they are the same."""
    strengths = [parent.get("strength", 1.0) for parent in kept["parents"]]
    numbers = all(type(strength) in (int, float) and 0 < strength < 1e9 for strength in strengths)
    if kept.get("equal_norms") is True and numbers and max(strengths, default=0) > STRONGEST:
        mean = math.exp(sum(map(math.log, strengths)) / len(strengths))
        for parent in kept["parents"]:
            parent["strength"] = float(f"{mean:.6g}")


def _named(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(str(name)[:LETTERS].encode("utf-8", "replace").decode() for name in names))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def matched(recipe: Mapping, names: Iterable[str]) -> tuple[dict, list[str]]:
    """The recipe with each parent's LoRA as it is listed now, None where it is gone; and those that are, as "style ink".

    recipe: as `understood` gives it. A path stands for the LoRA of its name; one that differs in upper and lower case alone
    is the same.
    """
    known = list(names)
    caseless = {name.lower(): name for name in known} | {name: name for name in known}
    found, gone = [], []
    for parent in recipe["parents"]:
        name = PureWindowsPath(parent["lora"]).name.removesuffix(".safetensors")  # of either system's paths
        asked = (parent["lora"], name, parent["lora"].lower(), name.lower())
        there = next((caseless[wanted] for wanted in asked if wanted in caseless), None)
        if there is None:
            gone.append(f"{parent['role']} {name}")
        found.append({**parent, "lora": there})
    return {**recipe, "parents": found}, gone
