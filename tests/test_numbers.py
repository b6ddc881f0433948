"""Odd numbers in LoRAs: a whole merge gives a right result or a plain message, and leaves the model as it was."""

import json

import pytest
import torch
from loras import dense_deltas
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from ziplora_lib.jobs import Job
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import read


def of_rank(rank):
    generator = torch.Generator().manual_seed(0)

    def change(name, value):
        if name.endswith("alpha"):
            return torch.tensor(float(rank))
        shape = (value.shape[0], rank, *value.shape[2:]) if "lora_up" in name else (rank, *value.shape[1:])
        return torch.randn(shape, generator=generator) * 0.02

    return change


def times(factor, *parts):
    return lambda name, value: value * factor if any(part in name for part in parts) else value


FACTORS = ("lora_up", "lora_down")
# what the second LoRA is made of the first by; what a merge of the two says, and whether it is refused
CASES = {
    "opposite": (times(-1.0, "lora_up"), "cancel each other", False),
    "the same values": (times(1.0, "lora_up"), "", False),
    "zero": (times(0.0, "lora_up"), "changes nothing: all its values are zero", False),
    "denormal": (times(1e-40, "lora_up"), "changes nothing: all its values are zero", False),
    "a trillionth": (times(1e-12, "lora_up"), "times as strong as", False),
    "a rank above the width": (of_rank(700), "", False),
    "a rank of none": (of_rank(0), "has no values (rank or width 0)", True),
    "beyond all models": (times(1e18, *FACTORS), "beyond what any model can hold", True),
    "not a number": (times(float("nan"), "lora_down"), "NaN", True),
    "infinite": (times(float("inf"), "lora_up"), "infinit", True),
}


@pytest.fixture
def second(pair_files, tmp_path):
    """second(change): the subject with other values."""

    def make(change):
        path = tmp_path / "second.safetensors"
        tensors = {name: change(name, value).contiguous() for name, value in load_file(pair_files[0]).items()}
        save_file(tensors, path)
        return path

    return make


@pytest.mark.parametrize("method", ["direct", "ziplora", "ssr"])
@pytest.mark.parametrize("case", CASES)
def test_a_merge_with_odd_numbers(host, recipe_of, second, case, method):
    change, said, refused = CASES[case]
    before = host.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), [host.encode("a cat", 64)])
    job = Job.merge(recipe_of(style=second(change), method=method, steps=2, dtype="fp32", allow_same=True))
    job.run(host)
    after = host.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), [host.encode("a cat", 64)])
    assert torch.equal(before, after)
    assert job.state == ("failed" if refused else "done"), job.error
    json.dumps(job.public(), allow_nan=False)
    if refused:
        assert said in job.error
        assert "second.safetensors: key 'lora_" in job.error
        assert not host.destination("merged").exists()
        return
    assert said in " ".join(job.result.warnings)
    assert all(delta.dense().isfinite().all() for delta in read(host.destination("merged")).deltas.values())
    assert 0 <= job.result.learned.get("retained", 1.0) < 20


@pytest.mark.parametrize("case", ["opposite", "the same values", "zero", "a trillionth", "a rank above the width"])
def test_their_plain_sum_is_the_sum(host, recipe_of, pair_files, second, case):
    path = second(CASES[case][0])
    job = Job.merge(recipe_of(style=path, method="direct", dtype="fp32", allow_same=True))
    job.run(host)
    one, other = dense_deltas(pair_files[0]), dense_deltas(path)
    merged = read(host.destination("merged")).deltas
    for name, delta in one.items():
        wanted = delta + other[name]
        given = merged[layer_key(name)].dense().double().reshape(wanted.shape)
        # rounding is that of what is added up, not of what is left of it
        assert float((given - wanted).norm()) <= 1e-5 * float(delta.norm() + other[name].norm()), name


@pytest.mark.parametrize("method", ["direct", "ziplora"])
def test_a_million_times_too_strong(host, recipe_of, second, method):
    """The plain sum is saved, as asked, and its pictures are told to be none; what the model has to say is not learned."""
    job = Job.merge(recipe_of(style=second(times(1e6, "lora_up")), method=method, steps=2, dtype="fp32"))
    job.run(host)
    json.dumps(job.public(), allow_nan=False)
    if method == "direct":
        assert any(
            "preview pictures could not be made (with it the model gives no finite" in w for w in job.result.warnings
        )
        assert not host.destination("merged").with_suffix(".png").exists()
    else:
        assert "no finite values" in job.error
        assert "lower the LoRAs' strengths" in job.error
        assert not host.destination("merged").exists()


def test_what_does_not_fit_the_saved_format_is_refused_by_key(host, recipe_of, second):
    job = Job.merge(recipe_of(style=second(times(1e6, *FACTORS)), method="direct", steps=2, dtype="fp16"))
    job.run(host)
    assert job.state == "failed"
    assert "do not fit fp16" in job.error
    assert "bf16" in job.error
    assert list(host.folder.glob("merged*")) == []
