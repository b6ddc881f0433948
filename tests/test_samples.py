"""The sample LoRAs, zipped as `make try` does: the default brings the merge closer to each, and does not collapse."""

import json

import pytest
from safetensors import safe_open

from ziplora_lib.lora.reader import read

pytest.importorskip("diffusers")

from ziplora_lib.hosts import world


def test_the_samples_are_what_a_user_would_bring(samples):
    subject, style = (read(path) for path in samples)
    assert (subject.base, style.base) == ("sdxl", "sdxl")
    assert (subject.ranks, style.ranks) == ([8], [4])
    kernels = {delta.shape[2:] for delta in subject.deltas.values()}
    assert {(), (1, 1), (3, 3)} <= kernels
    assert any(key.startswith("lora_te2_") for key in subject.deltas)
    assert not any(key.startswith("lora_te") for key in style.deltas)
    scales = [{round(delta.scale, 6) for delta in lora.deltas.values()} for lora in (subject, style)]
    assert scales == [{0.5}, {2.0}], "alpha is not the rank"
    with safe_open(str(samples[0]), "pt") as file:
        assert json.loads(file.metadata()["ss_tag_frequency"])


@pytest.fixture(scope="module")
def zipped(samples, tmp_path_factory):
    """(the job's result, the file) of the samples merged with the defaults."""
    from ziplora_lib.hosts.diffusers import DiffusersHost
    from ziplora_lib.hosts.samples import STYLE_PROMPT, SUBJECT_PROMPT
    from ziplora_lib.job import run
    from ziplora_lib.recipe import parse

    recipe = {
        "parents": [
            {"lora": str(samples[0]), "role": "subject", "prompt": SUBJECT_PROMPT},
            {"lora": str(samples[1]), "role": "style", "prompt": STYLE_PROMPT},
        ],
        "output": "zipped", "resolution": world.SIDE, "sampler_steps": 12, "guidance": 3.0,
        "balance_points": 1, "checkpointing": False, "at_once": 8,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("zipped")
    return run(parse(recipe), DiffusersHost("miniature", folder, "cpu")), folder / "zipped.safetensors"


def test_zipping_them_halves_the_error_of_the_plain_sum(zipped):
    learned, plain = zipped[0].learned["error"], zipped[0].learned["error_plain_sum"]
    assert sum(learned) <= sum(plain) / 2, f"{learned} after, plain sum {plain}"


def test_the_default_does_not_collapse(zipped):
    result = zipped[0]
    assert not [warning for warning in result.warnings if "collapsed" in warning]
    assert result.learned["retained"] > 0.25
    assert min(result.learned["mean"]) > 0.1
