"""The sample LoRAs, zipped as `make try` does: the default brings the merge closer to each, and does not collapse."""

import json

import pytest
import torch
from safetensors import safe_open

from ziplora_lib.lora.reader import read

pytest.importorskip("diffusers")

from ziplora_lib.hosts import world

GUIDANCE = 2.0


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
        "output": "zipped", "resolution": world.SIDE, "sampler_steps": 12, "guidance": GUIDANCE,
        "balance_points": 1, "memory": "fast", "at_once": 8,
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


def test_in_pictures_the_default_does_not_lose_to_the_plain_sum(zipped, samples):
    """A slice of the benchmark, one pair and few seeds: no score, only against the plain sum of the same LoRAs."""
    from benchmarks import sampling
    from benchmarks.judge import verdicts
    from ziplora_lib.hosts.diffusers import DiffusersHost
    from ziplora_lib.hosts.samples import JOINT_PROMPT, STYLE, STYLE_PROMPT, SUBJECT, SUBJECT_PROMPT
    from ziplora_lib.lora import bake
    from ziplora_lib.merge import balance
    from ziplora_lib.merge.attach import attach
    from ziplora_lib.merge.pairing import pair

    host = DiffusersHost("miniature", device="cpu")
    loras = [read(path) for path in samples]
    slots = host.slots(sorted({key for lora in loras for key in lora.deltas}))

    def shown(prompt, subject, style):
        found = verdicts(sampling.pictures(host, prompt, range(8), GUIDANCE), subject, style)
        return float(torch.stack(list(found.values())).all(0).float().mean())

    def success(stacks):
        with attach(slots, stacks) as router:
            router.merged()
            own = [shown(SUBJECT_PROMPT, SUBJECT, None), shown(STYLE_PROMPT, None, STYLE)]
            joint = []
            for at in (-0.5, 0.0, 0.5):  # the user's choice
                router.merged(weights=balance.weights(at, ["subject", "style"]))
                joint.append(shown(JOINT_PROMPT, SUBJECT, STYLE))
        return {"own subject": own[0], "own style": own[1], "joint": max(joint)}

    plain = success(pair(loras, [1.0, 1.0], {key: slot.shape for key, slot in slots.items()}).stacks)
    zip_ = success(bake.stacks(read(zipped[1])))
    assert sum(plain.values()) > 0, "this pair says nothing"
    for what, share in plain.items():
        assert zip_[what] >= share - 0.25, (what, zip_, plain)
