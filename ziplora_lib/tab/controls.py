"""Controls from the recipe's fields: each with the field's default, bounds and hint; and the recipe from what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import gradio as gr

from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Host
from ziplora_lib.options import OPTIONS
from ziplora_lib.recipe import Recipe, parse, schema
from ziplora_lib.tab.words import capital

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
        "memory": "Memory",
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
        "preview_size": "Preview size",
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
SLIDER_STEP = {"resolution": 64, "preview_size": 64, "balance_points": 2, "empty_share": 0.05, "guidance": 0.5}
# what an empty box means
NOT_GIVEN = {
    **dict.fromkeys(("lam", "start", "loss_guidance"), "the objective's own"),
    "ridge": "the method's own",
    "at_once": "all of a step",
}


# fields as messages name them, for the command line and the API too
_FIELDS = re.compile(rf"\b({'|'.join(['lr', 'lam', *(field for field in LABELS if '_' in field)])})\b")


def in_labels(message: str) -> str:
    """A message with the controls' labels in place of the recipe's fields."""
    return _FIELDS.sub(lambda found: f"“{LABELS[found[1]]}”", message)


def property_of(field: str, parent: bool = False) -> dict:
    """A field's entry in the recipe's schema."""
    known = schema()
    return (known["definitions"]["Parent"] if parent else known)["properties"][field]


def hint(field: str, parent: bool = False) -> str:
    return capital(property_of(field, parent)["description"])


def default_of(field: str, host: Host):
    """The user's own default, or the recipe's."""
    return host.option(field) if field in OPTIONS else property_of(field).get("default")


def control(field: str, host: Host, **layout) -> gr.components.Component:
    """The control of one field: its default, bounds and hint as the recipe has them."""
    about = property_of(field)
    default = default_of(field, host)
    said = hint(field)
    said = capital(said[len(LABELS[field]) + 2 :]) if said.startswith(f"{LABELS[field]}: ") else said
    common = {"label": LABELS[field], "info": said, "elem_id": f"ziplora_{field}", **layout}
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


def shown(field: str, value):
    """A value of the recipe as its control takes it."""
    if value is None:
        return ""
    return value if property_of(field).get("default") is not None or field == "output" else str(value)


def recipe_of(parents: Sequence[Mapping], settings: Mapping) -> Recipe:
    """The Recipe of what the controls hold. Raises BadInput, with the control's label."""
    if not parents:
        raise BadInput("no LoRA is picked", remedy="Pick a subject LoRA and a style LoRA")
    if len(parents) == 1:
        missing = "style" if parents[0]["role"] == "subject" else "subject"
        raise BadInput(f"no {missing} is picked", remedy=f"Pick a {missing} LoRA")
    # an emptied box means the default
    rest = {field: value for field, value in settings.items() if value is not None and value != ""}
    try:
        return parse({"parents": list(parents), "output": "", **rest})
    except BadInput as error:
        where, _, message = error.problem.partition(": ")
        for i, parent in enumerate(parents):
            where = where.replace(f"parents.{i}.", f"{parent['role'].capitalize()} ")
        raise BadInput(f"{LABELS.get(where, where)}: {message}" if message else where) from error
