"""The sample LoRAs, zipped as `make try` does in half the steps: on an overtrained pair ZipLoRA beats the plain sum."""

import json

from safetensors import safe_open

from ziplora_lib.lora.reader import read


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


def test_zipping_them_halves_the_error_of_the_plain_sum_on_either_side(samples, tmp_path):
    from ziplora_lib.hosts.diffusers import DiffusersHost
    from ziplora_lib.hosts.samples import PIXELS, STYLE_PROMPT, SUBJECT_PROMPT
    from ziplora_lib.job import run
    from ziplora_lib.recipe import parse

    result = run(
        parse({
            "parents": [
                {"lora": str(samples[0]), "role": "subject", "prompt": SUBJECT_PROMPT},
                {"lora": str(samples[1]), "role": "style", "prompt": STYLE_PROMPT},
            ],
            "output": "zipped", "resolution": PIXELS, "pictures": 2, "sampler_steps": 12, "guidance": 3.0,
            "balance_points": 1, "checkpointing": False, "at_once": 2, "steps": 50, "samples": 32,
        }),
        DiffusersHost("miniature", tmp_path, "cpu"),
    )  # fmt: skip
    learned, plain = result.learned["error"], result.learned["error_plain_sum"]
    for error, plain_error, role in zip(learned, plain, ("subject", "style")):
        assert error <= plain_error / 2, f"{role}: {error:.3f} after, plain sum {plain_error:.3f}"
