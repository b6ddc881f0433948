"""The recipe: what is not in it is refused, what is wrong is named, what is left out is the objective's own."""

import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziplora_lib.errors import BadInput
from ziplora_lib.merge.method import Settings
from ziplora_lib.merge.methods import METHODS
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.recipe import Recipe, parse, schema, stored

# the body of POST /ziplora/v1/merge as the API's users send it; what it says of the learning are the defaults
DESIGN = {
    "parents": [
        {"lora": "dog", "role": "subject", "prompt": "a photo of sks dog", "strength": 1.0},
        {"lora": "watercolour", "role": "style", "prompt": "a house in szn style", "strength": 1.0},
    ],
    "output": "dog-watercolour", "method": "ziplora", "steps": 50, "lr": 0.02, "seed": 0, "resolution": 1024,
    "dtype": "fp16", "overwrite": False,
}  # fmt: skip


def changed(**fields):
    return {**copy.deepcopy(DESIGN), **fields}


def refused(fields, word):
    with pytest.raises(BadInput) as caught:
        parse(fields)
    assert word in str(caught.value), str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_the_body_of_the_design_is_a_recipe():
    recipe = parse(DESIGN)
    assert [p.lora for p in recipe.parents] == ["dog", "watercolour"]
    assert (recipe.steps, recipe.lr, recipe.lam, recipe.start, recipe.loss_guidance) == (50, 0.02, 0.0, 1.0, 3.0)
    assert parse(json.loads(recipe.json())) == recipe


def test_parents_and_output_are_enough():
    assert parse({"parents": DESIGN["parents"], "output": "x"}) == parse(changed(output="x"))


def test_the_subject_comes_first_whatever_the_order():
    recipe = parse(changed(parents=DESIGN["parents"][::-1]))
    assert [p.role for p in recipe.parents] == ["subject", "style"]
    assert recipe == parse(DESIGN)


@given(st.lists(st.sampled_from(["subject", "style"]), min_size=2, max_size=8))
def test_any_two_to_eight_are_a_cast_and_subjects_come_first_in_their_order(roles):
    parents = [{"lora": f"lora{i}", "role": role} for i, role in enumerate(roles)]
    recipe = parse({"parents": parents, "output": "x"})
    wanted = [p for role in ("subject", "style") for p in parents if p["role"] == role]
    assert [{"lora": p.lora, "role": p.role} for p in recipe.parents] == wanted
    assert parse(json.loads(recipe.json())) == recipe


@pytest.mark.parametrize("n", [0, 1, 9])
def test_too_few_and_too_many_are_refused(n):
    refused(changed(parents=[{"lora": f"lora{i}", "role": "style"} for i in range(n)]), "parents: ")
    told = schema()["properties"]["parents"]
    assert (told["minItems"], told["maxItems"]) == (2, 8)


def test_parents_are_called_by_their_role_and_by_name_where_it_is_not_enough():
    parents = [("subject", "/home/me/dog.v2.safetensors"), ("subject", "cat"), ("style", "ink.safetensors")]
    recipe = parse({"parents": [{"lora": lora, "role": role} for role, lora in parents], "output": "x"})
    assert recipe.titles == ["subject dog.v2", "subject cat", "style"]
    assert parse(DESIGN).titles == ["subject", "style"]


def test_unknown_roles_are_refused():
    refused(changed(parents=[{"lora": "x", "role": "content"}, DESIGN["parents"][1]]), "parents.0.role")


@pytest.mark.parametrize("where", ["", "parents.1."])
def test_unknown_fields_are_refused(where):
    fields = changed()
    (fields["parents"][1] if where else fields)["learning_rate"] = 1
    refused(fields, f"{where}learning_rate: no such field")


@pytest.mark.parametrize("missing", ["parents", "output"])
def test_missing_fields_are_refused(missing):
    fields = changed()
    del fields[missing]
    refused(fields, missing)


@pytest.mark.parametrize("field", ["lr", "lam", "start", "loss_guidance", "empty_share", "guidance"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(field, value):
    refused(changed(**{field: value}), field)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 0, 5])
def test_wrong_strengths_are_refused(value):
    fields = changed()
    fields["parents"][0]["strength"] = value
    refused(fields, "parents.0.strength")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("steps", 1001), ("steps", "many"), ("steps", None), ("lr", 0), ("lr", -0.1), ("lr", 1.1),
     ("lam", -0.1), ("start", 2.1), ("seed", -1), ("seed", 2**31), ("resolution", 100), ("resolution", 0),
     ("resolution", 2112), ("dtype", "fp8"), ("method", "magic"), ("objective", "mse"), ("samples", 1), ("batch", 0),
     ("at_once", 0), ("empty_share", 0.95), ("pictures", 0), ("sampler_steps", 0), ("guidance", 0.5),
     ("balance_points", 0), ("output", None), ("parents", None), ("parents", "dog"), ("preview_prompt", "x" * 2001)],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field, value):
    refused(changed(**{field: value}), field)


@pytest.mark.parametrize("prompt", ["\ud800", "cat \udfff"])
def test_half_characters_in_prompts_are_refused(prompt):
    """JSON can hold them, but no file and no tokenizer."""
    fields = changed()
    fields["parents"][0]["prompt"] = prompt
    refused(fields, "parents.0.prompt")
    refused(changed(preview_prompt=prompt), "preview_prompt")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_left_out_is_the_objectives_own(objective):
    recipe = parse(changed(objective=objective))
    own = OBJECTIVES[objective]
    assert (recipe.lam, recipe.start, recipe.loss_guidance) == (own.lam, own.start, own.guidance)
    given = parse(changed(objective=objective, lam=0.0, start=0.0))
    assert (given.lam, given.start) == (0.0, 0.0)
    assert parse(changed(objective=objective, lam=None, start=None)) == recipe


def test_a_recipe_cannot_be_changed_into_a_wrong_one():
    recipe = parse(DESIGN)
    with pytest.raises(ValueError, match="steps"):
        recipe.steps = 0
    with pytest.raises(ValueError, match="stepz"):
        recipe.stepz = 1


def test_everything_that_is_no_object_is_refused():
    for value in (None, [], "recipe", 3):
        with pytest.raises(BadInput):
            parse(value)


def test_the_schema_is_json_and_describes_every_field():
    told = json.loads(json.dumps(schema()))
    assert told["additionalProperties"] is False
    assert set(told["required"]) == {"parents", "output"}
    assert told["properties"].keys() == Recipe.__fields__.keys()
    assert DESIGN.keys() <= told["properties"].keys()
    parent = told["definitions"]["Parent"]
    assert parent["additionalProperties"] is False
    for field in (*told["properties"].values(), *parent["properties"].values()):
        assert field["description"]


def test_every_method_and_setting_has_a_place_in_the_recipe():
    told = schema()["properties"]
    assert set(told["method"]["enum"]) == METHODS.keys()
    assert set(told["objective"]["enum"]) == OBJECTIVES.keys()
    own = {name: field for name, field in Settings.__dataclass_fields__.items() if name != "keeper"}  # no setting
    assert own.keys() <= Recipe.__fields__.keys()
    recipe = parse(DESIGN)
    for name, field in own.items():
        # what the recipe leaves open is decided when the steps begin
        assert getattr(recipe, name) == field.default or name == "at_once", name


def test_the_stored_recipe_has_names_not_paths_and_makes_the_same_merge():
    fields = changed(overwrite=True, memory="fast")
    fields["parents"][0].update(lora="/home/me/dog.safetensors", reference=["/home/me/a.png", "/home/me/b.png"])
    kept = stored(parse(fields), ["dog", "watercolour"], [1.0, 1.0])
    assert "/home" not in json.dumps(kept)
    assert [p["lora"] for p in kept["parents"]] == ["dog", "watercolour"]
    assert [p["reference"] for p in kept["parents"]] == [2, 0]
    assert not {"overwrite", "allow_same", "memory"} & kept.keys()
    assert kept["loss_guidance"] == 3.0
    for parent in kept["parents"]:
        parent["reference"] = []
    again, recipe = parse(kept), parse(DESIGN)
    assert again == recipe


def test_the_preview_prompt_is_all_prompts_unless_given():
    assert parse(DESIGN).picture_prompt == "a photo of sks dog, a house in szn style"
    assert parse(changed(preview_prompt="x")).picture_prompt == "x"
