"""Recipe: everything that decides a merge. The tab, the API's schema, the command line and the metadata come from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Literal, Optional

try:  # pydantic 2 keeps version 1's interface here; the WebUI ships pydantic 1, its forks 2
    from pydantic.v1 import BaseModel, Extra, Field, ValidationError, root_validator, validator
except ImportError:
    from pydantic import BaseModel, Extra, Field, ValidationError, root_validator, validator

from ziplora_lib.errors import BadInput
from ziplora_lib.merge import BY_STEPS, MODES, SAID
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.naming import lora_name


def _whole_characters(text: str) -> str:
    """JSON can hold half a character; no file and no tokenizer can."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("has a broken character (a lone surrogate)")
    return text


class Parent(BaseModel, extra=Extra.forbid):
    """One LoRA that goes into the merge."""

    lora: str = Field(
        ..., min_length=1, max_length=4096, description="the LoRA: its name in the WebUI, its path on the command line"
    )
    role: Literal["subject", "style"] = Field(..., description="what it stands for")
    prompt: str = Field("", max_length=2000, description="the prompt it was trained with, trigger word included")
    strength: float = Field(1.0, gt=0, le=4, description="its strength in the merge, as in <lora:name:strength>")
    reference: list[str] = Field(
        [],
        max_items=64,
        description="its training pictures (files or a folder), instead of pictures that the LoRA makes itself",
    )

    _prompt_is_text = validator("prompt", allow_reuse=True)(_whole_characters)

    @property
    def name(self) -> str:
        """The LoRA's name, also where `lora` is a path."""
        return lora_name(self.lora)


class Recipe(BaseModel, extra=Extra.forbid, validate_assignment=True):
    """Everything that decides a merge."""

    parents: list[Parent] = Field(
        ..., min_items=2, max_items=8, description="the LoRAs to merge, subjects and styles in any number"
    )
    output: str = Field(..., description="the name of the new LoRA")
    method: Literal[tuple(SAID)] = Field(
        "ziplora", description="; ".join(f"{name}: {what}" for name, what in SAID.items())
    )
    # steps, lr, pictures, samples and what the objective brings: the row "ZipLoRA, default" of benchmarks/results/
    # quality-main.json; around it, quality-ablations.json
    objective: Literal[tuple(OBJECTIVES)] = Field(
        "guided",
        description="form of the loss; guided begins with what ssr makes of the LoRAs, the paper's with the LoRAs",
    )
    steps: int = Field(50, ge=1, le=1000, description="gradient steps")
    lr: float = Field(0.02, gt=0, le=1, description="learning rate: about how far a coefficient moves in a step")
    lam: Optional[float] = Field(
        None,
        ge=0,
        le=100,
        description="weight of the overlap penalty; the objective's own if not given (0 by default)",
    )
    start: Optional[float] = Field(
        None,
        ge=-2,
        le=2,
        description="where every coefficient starts; the objective's own if not given (1 by default)",
    )
    loss_guidance: Optional[float] = Field(
        None,
        ge=1,
        le=30,
        description="guidance under which the merge is compared with each LoRA, whose own is taken against the bare model's "
        "empty prompt; 1 compares without; the objective's own if not given (3 by default)",
    )
    ridge: Optional[float] = Field(
        None,
        gt=0,
        le=1000,
        description="how strongly regmean, ssr and ziplora's beginning are drawn to the start where the samples say little; "
        "the method's own if not given",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    resolution: int = Field(1024, ge=64, le=2048, description="side of the calibration pictures in pixels")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="number format of the saved file")
    text_encoders: Literal["sum", "learn"] = Field(
        "sum", description="text encoder layers: added as they are, or their coefficients learned too, which is slower"
    )
    equal_norms: bool = Field(
        False, description="bring the LoRAs to one norm first, for a pair of which one is far stronger than the other"
    )
    dense_rank: int = Field(
        64,
        ge=0,
        le=4096,
        description="rank for layers without factors (DoRA, full, OFT, (IA)³ …); 0 keeps them whole: exact, a large file",
    )
    max_rank: Optional[int] = Field(
        None, ge=1, le=8192, description="largest rank of a saved layer; no limit if not given"
    )
    keep_energy: Optional[float] = Field(
        None,
        gt=0,
        le=1,
        description="share of each layer's squared norm to keep when its rank is cut; all if not given",
    )
    keep_norm: Optional[float] = Field(
        None, gt=0, le=1, description="the same as a share of the Frobenius norm; the stricter of the two counts"
    )
    layer_names: Literal["kohya", "diffusers", "peft"] = Field(
        "kohya", description="whose layer names the file has; the WebUI reads kohya's only"
    )
    overwrite: bool = Field(False, description="replace a LoRA of the same name")
    allow_same: bool = Field(False, description="merge a LoRA with itself, if two parents are the same file")
    pictures: int = Field(4, ge=1, le=32, description="calibration pictures that each LoRA makes")
    samples: int = Field(64, ge=2, le=1024, description="noised calibration samples of each LoRA")
    empty_share: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="share of the samples on the empty prompt alone, compared without guidance",
    )
    sampler_steps: int = Field(20, ge=1, le=100, description="sampler steps of calibration and preview pictures")
    guidance: float = Field(5.0, ge=1, le=30, description="guidance of calibration and preview pictures")
    batch: int = Field(1, ge=1, le=16, description="samples of each LoRA in a step")
    at_once: Optional[int] = Field(
        None,
        ge=1,
        le=32,
        description="samples in one forward pass, two rows each under guidance; if not given all of a step, or one where "
        "memory is short",
    )
    memory: Literal[("auto", *MODES)] = Field(
        "auto",
        description="how the steps save memory; "
        + "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
        + "; auto: the first of them that fits into what is free",
    )
    balance_points: int = Field(
        5,
        ge=1,
        le=9,
        description="pictures along the balance subject … style after the merge; 1 makes the preview only",
    )
    preview_size: int = Field(
        0, ge=0, le=2048, description="side of the pictures after the merge in pixels; 0: as the calibration pictures"
    )
    preview_prompt: str = Field("", max_length=2000, description="prompt of the preview; all parents' if empty")

    _preview_prompt_is_text = validator("preview_prompt", allow_reuse=True)(_whole_characters)

    @validator("parents")
    def _subjects_first(cls, parents: list[Parent]) -> list[Parent]:  # noqa: N805
        return sorted(parents, key=lambda p: p.role != "subject")

    @validator("resolution", "preview_size")
    def _multiple_of_64(cls, resolution: int) -> int:  # noqa: N805
        if resolution % 64:
            raise ValueError("must be a multiple of 64")
        return resolution

    @validator("balance_points")
    def _has_a_middle(cls, n: int) -> int:  # noqa: N805
        if n % 2 == 0:
            raise ValueError("must be odd: the picture in the middle is the preview")
        return n

    @root_validator(skip_on_failure=True)
    def _objective_decides(cls, values: dict) -> dict:  # noqa: N805
        chosen = OBJECTIVES[values["objective"]]
        own = {"lam": chosen.lam, "start": chosen.start, "loss_guidance": chosen.guidance}
        for field, default in own.items():
            if values.get(field) is None:
                values[field] = default
        for field, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field} must be a finite number")
        return values

    @property
    def titles(self) -> list[str]:
        """What each parent is called in messages: its role, and its LoRA where several have that role."""
        roles = [p.role for p in self.parents]
        return [p.role if roles.count(p.role) == 1 else f"{p.role} {p.name}" for p in self.parents]

    @property
    def strengths(self) -> list[float]:
        return [p.strength for p in self.parents]

    @property
    def held_out(self) -> int:
        """Samples of each LoRA that are learned on by none: what a merge is judged by."""
        return max(4, self.samples // 8)

    @property
    def taught(self) -> int:
        """Training samples of each LoRA that a step looks at; of the others only the inputs are of use."""
        return min(self.samples, self.steps * self.batch) if self.method in BY_STEPS else 0

    @property
    def together(self) -> int:
        """Samples in one pass, where memory allows it."""
        return self.at_once or self.batch * len(self.parents)

    @property
    def whole_or_rank(self) -> int | None:
        """The rank for layers without factors; None to keep them whole."""
        return self.dense_rank or None

    @property
    def kept_share(self) -> float:
        """The share of a layer's squared norm that a cut of its rank has to keep."""
        asked = [self.keep_energy, None if self.keep_norm is None else self.keep_norm**2]
        return max((share for share in asked if share is not None), default=1.0)

    @property
    def picture_size(self) -> int:
        """The side of preview pictures in pixels."""
        return self.preview_size or self.resolution

    @property
    def picture_prompt(self) -> str:
        """The prompt of preview pictures."""
        return self.preview_prompt or self.parents_prompt

    @property
    def parents_prompt(self) -> str:
        """The prompts of all parents together."""
        return ", ".join(p.prompt for p in self.parents if p.prompt)


def parse(fields: dict) -> Recipe:
    """A Recipe from plain data. Raises BadInput that names the first wrong field; unknown fields are refused."""
    try:
        return Recipe.parse_obj(fields)
    except OverflowError as error:
        raise BadInput("a number in it is beyond all bounds", remedy="Use numbers that fit their fields") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "__root__")
        message = "no such field" if first["type"] == "value_error.extra" else first["msg"]
        raise BadInput(
            f"{where}: {message}" if where else message,
            remedy="See the recipe's schema: GET /ziplora/v1/schema, or --help on the command line",
        ) from error


def schema() -> dict:
    """The recipe as JSON schema."""
    return Recipe.schema()


def stored(recipe: Recipe, names: Sequence[str], strengths: Sequence[float]) -> dict:
    """The recipe as a merged file keeps it: parents by name, no path of this machine, what does not decide left out.

    strengths: those that were used, which equal norms can make others than the recipe's.
    """
    fields = json.loads(recipe.json())
    for parent, name, strength in zip(fields["parents"], names, strengths):
        parent["lora"], parent["strength"] = name, float(f"{strength:.6g}")
        parent["reference"] = len(parent["reference"])
    for field in ("overwrite", "allow_same", "memory"):
        fields.pop(field)
    return fields
