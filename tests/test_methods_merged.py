"""Every merge method in a whole job on the miniature: what it returns is what is saved, and its halves are its halves."""

import json

import pytest
import torch
from loras import dense_deltas, kohya_name, write_lora

from ziplora_lib import job
from ziplora_lib.errors import BadInput
from ziplora_lib.job import preflight, run
from ziplora_lib.jobs import Job
from ziplora_lib.lora.bake import bake, split
from ziplora_lib.lora.keys import is_unet, layer_key
from ziplora_lib.lora.reader import read
from ziplora_lib.merge import NEEDS_MODEL
from ziplora_lib.merge.methods import METHODS

SOLVED = ["regmean", "ssr"]
FREE = sorted(METHODS.keys() - NEEDS_MODEL)


def by_key(path):
    return {layer_key(name): delta for name, delta in dense_deltas(path).items()}


@pytest.fixture(scope="session")
def small_style(layers, tmp_path_factory):
    """A style for `third_file`: self-attention, which it has too, and what it lacks: a few convolutions and time layers."""
    marks = ("attn1", "conv_in", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers", "time_embedding")
    shapes = {
        kohya_name(part, name): shape
        for (part, name), shape in layers.items()
        if part == "unet" and any(mark in name for mark in marks)
    }
    assert {len(shape) for shape in shapes.values()} == {2, 4}
    return write_lora(tmp_path_factory.mktemp("small") / "style.safetensors", shapes, rank=4, seed=4, size=0.3)


@pytest.fixture
def returned(monkeypatch):
    """The stacks of the runs that follow, as the method returned them."""
    kept = {}
    for name, method in METHODS.items():

        def recording(*args, method=method):
            merged = method(*args)
            kept.update(merged.stacks)
            return merged

        monkeypatch.setitem(job.METHODS, name, recording)
    return kept


def close(a, b):
    b = b.double().reshape(a.shape)
    torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_file_is_the_merge_and_splits_into_its_halves(
    host, recipe_of, third_file, small_style, returned, method
):
    """With a LoRA of attention alone beside the style: layers that both have, and that one has alone."""
    result = run(recipe_of(third_file, small_style, method=method, dtype="fp32"), host)
    path = host.destination("merged")
    merged, plain = by_key(path), by_key(third_file)
    for key, delta in by_key(small_style).items():
        plain[key] = plain.get(key, 0) + delta
    assert merged.keys() == returned.keys() == plain.keys()
    changed = 0
    for key, delta in merged.items():
        close(delta, returned[key].total().dense())
        changed += not torch.allclose(delta, plain[key].reshape(delta.shape), rtol=1e-3)
    assert (changed == 0) == (method == "direct")
    halves = [host.folder / f"half-{i}.safetensors" for i in (0, 1)]
    split(path, halves)
    halves = [by_key(half) for half in halves]
    assert [half.keys() for half in halves] == [by_key(third_file).keys(), by_key(small_style).keys()]
    for key in merged:
        for i, half in enumerate(halves):
            if key in half:
                close(half[key], returned[key].part(i).dense())
    bake(path, host.folder / "baked.safetensors", [0.5, 2.0])
    for key, delta in by_key(host.folder / "baked.safetensors").items():
        close(delta, sum(w * half[key] for w, half in zip((0.5, 2.0), halves) if key in half))
    told = json.loads(read(path).metadata["ziplora.coefficients"])
    assert told == result.learned
    assert told["method"] == method
    assert ("error" in told) == (method in NEEDS_MODEL)


@pytest.mark.parametrize("method", SOLVED)
def test_least_squares_are_closer_than_the_plain_sum(host, recipe_of, pair_files, returned, method):
    """On convolutions, samplers, attention, feed-forward and time layers; the text encoders stay the plain sum."""
    seen = []
    result = run(recipe_of(method=method, dtype="fp32"), host, seen.append)
    assert sum(result.learned["error"]) < 0.7 * sum(result.learned["error_plain_sum"])
    assert 0.3 < result.learned["retained"] < 2  # neither faded away nor grown beyond all that was summed
    assert result.history == []
    merges = [info for info in seen if info["phase"] == "merge"]
    assert [info["step"] for info in merges] == list(range(1, merges[-1]["steps"] + 1))
    subject, merged = by_key(pair_files[0]), by_key(host.destination("merged"))
    text = [key for key in merged if not is_unet(key)]
    assert text
    for key in text:
        close(merged[key], subject[key])


@pytest.mark.parametrize("method", ["direct", "ziplora", *SOLVED])
def test_three_parents(host, recipe_of, small_style, third_file, method):
    cast = [
        {"lora": str(file), "role": role, "prompt": f"a photo of {file.stem}"}
        for file, role in ((third_file, "subject"), (third_file, "subject"), (small_style, "style"))
    ]
    result = run(recipe_of(parents=cast, allow_same=True, method=method, dtype="fp32", samples=2), host)
    halves = [host.folder / f"half-{i}.safetensors" for i in range(3)]
    split(host.destination("merged"), halves)
    halves = [by_key(half) for half in halves]
    for key, delta in by_key(host.destination("merged")).items():
        close(delta, sum(half[key] for half in halves if key in half))
    if method in NEEDS_MODEL:
        assert len(result.learned["error"]) == 3
        assert sum(result.learned["error"]) < sum(result.learned["error_plain_sum"])


@pytest.mark.parametrize("method", ["ziplora", *SOLVED])
def test_text_encoders_can_be_solved_for_as_well(host, recipe_of, third_file, tmp_path, layers, method):
    shapes = {kohya_name(part, name): s for (part, name), s in layers.items() if part != "unet" and "q_proj" in name}
    text = write_lora(tmp_path / "text.safetensors", shapes, rank=2, seed=5)
    run(recipe_of(third_file, text, method=method, text_encoders="learn", dtype="fp32", samples=2), host)
    own, merged = by_key(text), by_key(host.destination("merged"))
    assert len(own) > 2
    for key, delta in own.items():
        # of one LoRA alone, and yet not left as it is: it is to be quiet on the other's prompts
        assert float((merged[key] - delta).norm()) > 0.05 * delta.norm(), key


@pytest.mark.parametrize("method", ["ziplora", *SOLVED])
def test_a_stop_while_observing_saves_nothing(host, recipe_of, third_file, small_style, method):
    stopped = Job.merge(recipe_of(third_file, small_style, method=method))
    stopped.run(host, lambda info: info["phase"] in ("warm start", "merge"))
    assert stopped.state == "stopped"
    assert "nothing was saved" in stopped.error
    assert list(host.folder.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_prompts_are_asked_for_where_the_model_is(host, recipe_of, method):
    recipe = recipe_of(method=method)
    fields = recipe.dict()
    fields["parents"][0]["prompt"] = ""
    recipe = type(recipe).parse_obj(fields)
    if method in FREE:
        preflight(recipe, host)
    else:
        with pytest.raises(BadInput, match="no prompt"):
            preflight(recipe, host)


@pytest.mark.parametrize("method", SOLVED)
def test_a_smaller_rank_after_it(host, recipe_of, third_file, small_style, method):
    result = run(recipe_of(third_file, small_style, method=method, dtype="fp32", max_rank=3), host)
    assert max(delta.rank for delta in read(host.destination("merged")).deltas.values()) == 3
    assert 0 < result.saved["rank_loss"]["share"] < 1


def test_the_ridge_of_the_recipe_is_used(host, recipe_of, third_file, small_style):
    norms = []
    for fields in ({"method": "direct"}, {"method": "ssr"}, {"method": "ssr", "ridge": 100.0, "start": 0.5}):
        run(recipe_of(third_file, small_style, dtype="fp32", overwrite=True, samples=2, **fields), host)
        norms.append(sum(float(delta.square().sum()) for delta in by_key(host.destination("merged")).values()) ** 0.5)
    # the start, half of the plain sum
    assert norms[2] == pytest.approx(0.5 * norms[0], rel=0.02)
    assert abs(norms[1] - norms[2]) > 0.02 * norms[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_printed(host, recipe_of, third_file, small_style, method):
    from ziplora_lib.__main__ import summary

    said = summary(run(recipe_of(third_file, small_style, method=method, steps=1, samples=2), host))
    assert ("error against this LoRA alone" in said) == (method in NEEDS_MODEL)
    assert ("mean coefficient" in said) == (method == "ziplora")
