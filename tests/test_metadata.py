"""What a merged file says of itself, and what is understood of what other files say."""

import json
from pathlib import Path

import pytest

from ziplora_lib import __version__
from ziplora_lib.lora.metadata import merged_metadata, tag_frequency, trained_elsewhere, trigger_words
from ziplora_lib.lora.reader import Lora


def lora(name="dog", metadata=None, sidecar=None):
    return Lora(name, Path(f"/home/me/{name}.safetensors"), {}, metadata or {}, sidecar or {}, hash=f"hash of {name}")


# what a recipe says of its parents
CAST = {"parents": [{"role": "subject", "prompt": "a photo of it"}, {"role": "style", "prompt": ""}]}
TAGS = {"10_dog": {"sks dog": 10, "grass": 3}, "5_other": {" sks dog": 4, "tree": 12}}


def test_trigger_words_in_order_of_trust():
    said = {"ss_tag_frequency": json.dumps(TAGS), "modelspec.trigger_phrase": "phrase"}
    assert trigger_words(lora(metadata=said, sidecar={"activation text": " card "}))[0] == "card"
    assert trigger_words(lora(metadata=said, sidecar={"activation text": ""}))[0] == "phrase"
    assert trigger_words(lora(metadata={"ss_tag_frequency": json.dumps(TAGS)}))[0] == "sks dog"
    assert trigger_words(lora()) == ("", "")


@pytest.mark.parametrize("tags", ["", "{", "[]", "3", "null", '{"a": 3}', '{"a": {"b": "many"}}', '{"a": {"b": null}}'])
def test_unreadable_tags_count_as_none(tags):
    assert tag_frequency(lora(metadata={"ss_tag_frequency": tags})) == {}
    assert trigger_words(lora(metadata={"ss_tag_frequency": tags})) == ("", "")


@pytest.mark.parametrize("card", [{"activation text": None}, {"activation text": 3}, {"activation text": ["a"]}])
def test_odd_cards_do_not_fail(card):
    trigger_words(lora(sidecar=card))


def test_a_merged_file_says_what_others_need():
    parents = [
        lora("dog", {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": json.dumps(TAGS)}),
        lora("ink", {"ss_sd_model_name": "sd_xl_base.safetensors", "modelspec.trigger_phrase": "szn style"}),
    ]
    ranks = {"a": (8, 4), "b": (8, 4), "c": (0, 4)}
    recipe = {"resolution": 512, "seed": 0, **CAST}
    meta = merged_metadata("dog-ink", parents, ranks, recipe, {"mean": [0.5, 0.6]}, "sdxl", "epsilon")
    assert all(isinstance(value, str) for value in meta.values())
    assert meta["ss_output_name"] == meta["modelspec.title"] == "dog-ink"
    assert meta["ss_base_model_version"] == "sdxl_base_v1-0"
    assert meta["ss_network_module"] == "networks.lora"
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("12", "12.0")
    assert meta["ss_sd_model_name"] == "sd_xl_base.safetensors"
    assert meta["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert meta["modelspec.prediction_type"] == "epsilon"
    assert meta["modelspec.resolution"] == "512x512"
    assert meta["modelspec.merged_from"] == "dog, ink"
    assert meta["modelspec.trigger_phrase"] == "sks dog, szn style"
    assert json.loads(meta["ss_tag_frequency"]) == {f"dog: {folder}": tags for folder, tags in {
        "10_dog": {"sks dog": 10, "grass": 3}, "5_other": {" sks dog": 4, "tree": 12}}.items()}  # fmt: skip
    assert meta["ziplora.version"] == __version__
    assert json.loads(meta["ziplora.recipe"]) == recipe
    assert json.loads(meta["ziplora.parents"]) == [
        {"name": "dog", "sha256": "hash of dog", "role": "subject", "trigger": "sks dog"},
        {"name": "ink", "sha256": "hash of ink", "role": "style", "trigger": "szn style"},
    ]  # fmt: skip
    assert json.loads(meta["ziplora.ranks"]) == {"*": [8, 4], "c": [0, 4]}
    assert json.loads(meta["ziplora.coefficients"]) == {"mean": [0.5, 0.6]}
    assert "/home" not in json.dumps(meta)


def test_the_merged_file_of_silent_parents():
    meta = merged_metadata("x", [lora("a"), lora("b")], {"k": (1, 1)}, CAST, {}, "sdxl", "v")
    assert meta["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "modelspec.trigger_phrase" not in meta
    assert [parent["trigger"] for parent in json.loads(meta["ziplora.parents"])] == ["a photo of it", ""], "the prompts"


def test_shared_trigger_words_are_named_once():
    said = {"modelspec.trigger_phrase": "sks"}
    meta = merged_metadata("x", [lora("a", said), lora("b", said)], {"k": (1, 1)}, CAST, {}, "sdxl", "epsilon")
    assert meta["modelspec.trigger_phrase"] == "sks"


@pytest.mark.parametrize(
    ("base", "prediction", "version", "v2", "architecture"),
    [
        ("sd1", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd1", "v", "sd_v1_v", "False", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "v", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "v", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_base_model_is_named_as_kohyas_trainer_names_it(base, prediction, version, v2, architecture):
    other = lora("b", {"ss_base_model_version": "flux1"})
    meta = merged_metadata("x", [lora("a"), other], {"k": (1, 1)}, CAST, {}, base, prediction)
    assert meta["ss_base_model_version"] == version
    assert meta["ss_v2"] == v2
    assert meta["modelspec.architecture"] == architecture
    assert meta["modelspec.prediction_type"] == prediction


def test_what_a_parent_says_of_its_base_is_kept():
    said = {"ss_base_model_version": "sd_v1_v"}
    meta = merged_metadata("x", [lora("a"), lora("b", said)], {"k": (1, 1)}, CAST, {}, "sd1", "epsilon")
    assert meta["ss_base_model_version"] == "sd_v1_v"


@pytest.mark.parametrize(
    ("trained_on", "model", "warned"),
    [
        ("ponyDiffusionV6XL.safetensors", "ponyDiffusionV6XL", False),
        ("/models/ponyDiffusionV6XL.safetensors", "some-other-xl", True),
        (r"C:\models\Illustrious-XL-v0.1.safetensors", "ponyDiffusionV6XL", True),
        ("sd_xl_base_1.0.safetensors", "ponyDiffusionV6XL", False),
        ("stabilityai/stable-diffusion-xl-base-1.0", "anything", False),
        ("", "anything", False),
    ],
)
def test_a_lora_of_another_fine_tune_is_told(trained_on, model, warned):
    dog = lora(metadata={"ss_sd_model_name": trained_on})
    said = trained_elsewhere(dog, model, "epsilon")
    assert len(said) == warned
    if warned:
        assert "dog" in said[0]
        assert model in said[0]


@pytest.mark.parametrize(
    ("own", "model", "warned"), [("v", "epsilon", True), ("epsilon", "v", True), ("v", "v", False)]
)
def test_a_lora_for_another_prediction_is_told(own, model, warned):
    dog = lora(metadata={"modelspec.prediction_type": own})
    assert len(trained_elsewhere(dog, "base", model)) == warned
    assert not trained_elsewhere(lora(), "base", model)
