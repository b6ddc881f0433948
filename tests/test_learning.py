"""A whole job on the miniature: it learns, keeps the best when stopped, and tells what it did."""

import json
import math

import numpy as np
import pytest
import torch
from loras import write_lora
from PIL import Image

from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.job import preflight, run
from ziplora_lib.jobs import Job
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.blocks import blocks_of


def saved(host):
    return host.destination("merged").read_bytes()


def test_the_learned_error_is_lower_than_at_the_start_and_than_the_plain_sums(host, recipe_of):
    result = run(recipe_of(steps=20, lr=0.02, samples=8), host)
    told = result.learned
    assert result.history[0]["step"] == 1
    assert told["best_step"] > 0
    first = next(h["held_out"] for h in result.history if "held_out" in h)
    assert sum(told["error"]) < sum(first)
    assert sum(told["error"]) < sum(told["error_plain_sum"])
    assert not [w for w in result.warnings if "collapsed" in w or "nothing was learned" in w]
    for entry in result.history:
        assert {"loss", "errors", "penalty", "mean_m", "retained", "data_gradient"} <= entry.keys()
        assert all(np.isfinite(v).all() for k, v in entry.items() if k != "phase")


def test_memory_savers_change_no_coefficient(host, recipe_of):
    """Checkpointing recomputes and small batches sum in another order: equal up to fp32's rounding.

    Of the whole, and more loosely of each layer: Adam moves a column whose gradient is nothing but rounding as far as any
    other, and how many of these a layer has depends on the processor.
    """
    base = {"steps": 3, "batch": 2, "dtype": "fp32"}
    run(recipe_of(**base), host)
    wanted = read(host.destination("merged")).deltas
    for fields in ({"memory": "checkpointing"}, {"memory": "offload"}, {"at_once": 1}, {"at_once": 3}):
        run(recipe_of(**base, overwrite=True, **fields), host)
        given = read(host.destination("merged")).deltas
        assert given.keys() == wanted.keys()
        apart = {key: float((delta.dense() - wanted[key].dense()).norm()) for key, delta in given.items()}
        norms = {key: wanted[key].norm() for key in given}
        assert math.hypot(*apart.values()) <= 1e-3 * math.hypot(*norms.values()), fields
        for key in given:
            assert apart[key] <= 2e-2 * norms[key], (fields, key)


def test_checkpointing_really_is_on_while_merging_and_only_then(host, recipe_of):
    seen = []

    def look(info):
        if info["phase"] == "merge":
            seen.append(any("forward" in vars(block) for block in blocks_of(host.pipe.unet)))

    run(recipe_of(steps=1, memory="checkpointing"), host, look)
    run(recipe_of(steps=1, memory="fast", overwrite=True), host, look)
    assert seen == [True, False]
    assert not any("forward" in vars(block) for block in blocks_of(host.pipe.unet))


def test_a_stop_in_the_merge_keeps_the_best_and_says_so(host, recipe_of):
    job = Job.merge(recipe_of(steps=50, lr=0.02))
    job.run(host, lambda info: info["phase"] == "merge" and info["step"] == 7)
    assert job.state == "stopped"
    assert job.result.stopped
    assert len(job.result.history) == 7
    assert any("stopped at step 7 of 50" in warning for warning in job.result.warnings)
    lora = read(host.destination("merged"))
    assert json.loads(lora.metadata["ziplora.coefficients"])["best_step"] == job.result.learned["best_step"] > 0
    assert job.result.pictures == []


def test_a_stop_from_another_thread_is_heard(host, recipe_of):
    job = Job.merge(recipe_of(steps=50))
    job.run(host, lambda info: job.stop() if info.get("phase") == "merge" and info["step"] == 2 else None)
    assert job.state == "stopped"
    assert len(job.result.history) == 2


def test_a_stop_in_the_calibration_saves_nothing(host, recipe_of):
    with pytest.raises(Stopped):
        run(recipe_of(), host, lambda info: info["phase"] == "calibrate")
    assert list(host.folder.iterdir()) == []
    job = Job.merge(recipe_of())
    job.stop()
    job.run(host)
    assert job.state == "stopped"
    assert "nothing was saved" in job.error


def test_what_was_not_learned_is_told(host, recipe_of, pair_files):
    result = run(recipe_of(), host)
    subject, style = (read(file).deltas.keys() for file in pair_files)
    text = " | ".join(result.warnings)
    unet = {key for key in subject | style if key.startswith("lora_unet_")}
    assert f"{len((subject - style) & unet)} UNet layers are in subject alone" in text
    assert f"{len((style - subject) & unet)} UNet layers are in style alone" in text
    assert f"{len((subject | style) - unet)} text encoder layers are summed" in text
    assert result.preflight["learned_layers"] == len(unet) > 200
    assert result.preflight["shared_layers"] == len(subject & style & unet) > 20
    assert result.learned["coefficients"] == result.preflight["learned_coefficients"]


def test_a_collapsed_run_is_told(host, recipe_of, tmp_path, layers):
    # of the same layers both: one that a LoRA has alone is in nobody's way, and would be left
    shapes = {
        f"lora_unet_{n.replace('.', '_')}": s for (part, n), s in layers.items() if part == "unet" and "attn" in n
    }
    a, b = (write_lora(tmp_path / f"{name}.safetensors", shapes, seed=i) for i, name in enumerate("ab"))
    result = run(recipe_of(a, b, objective="paper-literal", lam=100.0, lr=0.1, steps=30), host)
    assert result.history[-1]["retained"] < 0.2
    assert any("collapsed" in warning for warning in result.warnings), (result.learned, result.history[-1])


def test_the_result_is_plain_data_and_says_where_and_how(host, recipe_of):
    phases = []
    job = Job.merge(recipe_of(balance_points=3))
    job.run(host, lambda info: phases.append(info["phase"]))
    assert list(dict.fromkeys(phases)) == ["preflight", "calibrate", "warm start", "merge", "save", "preview"]
    told = json.loads(json.dumps(job.public()))
    assert told["state"] == "done"
    assert told["result"]["tag"] == "<lora:merged:1>"
    assert told["result"]["file"] == str(host.destination("merged"))
    assert told["result"]["losses"]["step"] == 4
    assert told["result"]["seconds"].keys() == {"preflight", "open", "calibrate", "merge", "save", "preview"}
    assert [b for b, _ in job.result.pictures] == [-1.0, 0.0, 1.0]
    assert sorted(f.name for f in host.folder.iterdir()) == ["merged.json", "merged.png", "merged.safetensors"]
    preview = np.asarray(Image.open(host.folder / "merged.png"))
    assert np.array_equal(preview, np.asarray(job.result.pictures[1][1])), "the preview is the middle of the strip"
    assert not np.array_equal(np.asarray(job.result.pictures[0][1]), np.asarray(job.result.pictures[2][1]))


def test_the_preview_is_the_picture_of_the_saved_file(host, recipe_of):
    """What is shown is what was saved: the same seed and prompt with the file attached."""
    from ziplora_lib.merge.attach import attach
    from ziplora_lib.merge.pairing import pair

    recipe = recipe_of(dtype="fp32")
    shown = np.asarray(run(recipe, host).pictures[0][1]).astype(int)
    lora = read(host.destination("merged"))
    slots = host.slots(list(lora.deltas))

    def picture():
        latent = host.sample(recipe.picture_prompt, recipe.seed, 64, recipe.sampler_steps, recipe.guidance)
        return np.asarray(host.decode(latent)).astype(int)

    bare = picture()
    with attach(slots, pair([lora], [1.0], {key: slot.shape for key, slot in slots.items()}).stacks) as router:
        router.merged()
        again = picture()
    assert np.abs(again - shown).max() <= 1, "one step of 255: sums in another order"
    assert np.abs(bare - shown).max() > 10


def test_progress_counts_up_to_its_total(host, recipe_of):
    seen = {}

    def watch(info):
        seen.setdefault(info["phase"], []).append((info["step"], info["steps"]))

    run(recipe_of(pictures=2), host, watch)
    for phase in ("calibrate", "merge"):
        steps = [step for step, _ in seen[phase]]
        assert steps == list(range(1, len(steps) + 1))
        assert seen[phase][-1][0] == seen[phase][-1][1], phase


@pytest.mark.parametrize("reference", ["file", "folder"])
def test_reference_pictures_are_used_instead_of_made_ones(host, recipe_of, tmp_path_factory, reference):
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (90, 70), (200, 30, 30)).save(folder / "a.png")
    Image.new("RGB", (70, 90), (30, 30, 200)).save(folder / "b.jpg")
    (folder / "notes.txt").write_text("not a picture")
    fields = recipe_of().dict()
    fields["parents"][1]["reference"] = [str(folder / "a.png") if reference == "file" else str(folder)]
    whats = []
    run(type(recipe_of()).parse_obj(fields), host, lambda info: whats.append(info.get("what")))
    assert whats.count("encoding style pictures") == (1 if reference == "file" else 2)
    assert whats.count("making subject pictures") == 1
    assert whats.count("making style pictures") == 0


def refused(host, recipe, word):
    before = sorted(f.name for f in host.folder.iterdir())
    for attempt in (preflight, run):
        with pytest.raises(BadInput) as caught:
            attempt(recipe, host)
        assert word in str(caught.value), str(caught.value)
        assert caught.value.remedy
    assert sorted(f.name for f in host.folder.iterdir()) == before
    return caught.value


def with_parent(recipe, i, **fields):
    changed = recipe.dict()
    changed["parents"][i].update(fields)
    return type(recipe).parse_obj(changed)


def test_the_preflight_refuses_what_cannot_work(host, recipe_of, tmp_path, pair_files):
    refused(host, recipe_of(output="a/b"), "a/b")
    refused(host, recipe_of(subject=tmp_path / "nowhere.safetensors"), "no such file")
    assert refused(host, recipe_of(style=pair_files[0]), "same LoRA").file == "subject.safetensors"
    assert refused(host, with_parent(recipe_of(), 1, prompt="  "), "style has no prompt").file == "style.safetensors"
    refused(host, with_parent(recipe_of(), 0, reference=[str(tmp_path / "no.png")]), "no.png")
    refused(host, with_parent(recipe_of(), 0, reference=[str(tmp_path)]), "no pictures")
    sd1 = write_lora(
        tmp_path / "sd1.safetensors", {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (64, 768)}
    )
    error = refused(host, recipe_of(subject=sd1), "SD 1.5")
    assert (error.file, bool(error.key)) == ("sd1.safetensors", True)
    flux = write_lora(tmp_path / "flux.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv": (64, 64)})
    assert refused(host, recipe_of(style=flux), "not Stable Diffusion").file == "flux.safetensors"
    query = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    wide = write_lora(tmp_path / "wide.safetensors", {query: (640, 640)})
    assert refused(host, recipe_of(style=wide), "shape").key == query


def test_a_method_that_needs_no_model_needs_no_prompt(host, recipe_of):
    recipe = with_parent(with_parent(recipe_of(method="direct"), 0, prompt=""), 1, prompt="")
    assert run(recipe, host).learned == {"method": "direct"}


def test_the_same_lora_twice_can_be_asked_for(host, recipe_of, pair_files):
    run(recipe_of(style=pair_files[0], allow_same=True, method="direct", dtype="fp32"), host)
    once, twice = read(pair_files[0]).deltas, read(host.destination("merged")).deltas
    for key, delta in once.items():
        torch.testing.assert_close(
            twice[key].dense(), 2 * delta.dense().reshape(twice[key].shape), rtol=1e-5, atol=1e-6
        )


def test_a_parent_is_never_overwritten(host, recipe_of, pair_files, tmp_path):
    own = tmp_path / "merged.safetensors"
    own.write_bytes(pair_files[0].read_bytes())
    refused(host, recipe_of(subject=own, overwrite=True), "one of the LoRAs that go in")
    assert own.read_bytes() == pair_files[0].read_bytes()
    refused(host, recipe_of(), "already there")


def test_a_pair_without_a_common_layer_is_learned_and_told(host, recipe_of, tmp_path, layers):
    names = ["lora_unet_" + name.replace(".", "_") for part, name in layers if part == "unet" and "attn1.to_q" in name]
    shapes = {f"lora_unet_{n.replace('.', '_')}": shape for (part, n), shape in layers.items() if part == "unet"}
    a = write_lora(tmp_path / "a.safetensors", {names[0]: shapes[names[0]]}, seed=1)
    b = write_lora(tmp_path / "b.safetensors", {names[1]: shapes[names[1]]}, seed=2)
    result = run(recipe_of(subject=a, style=b), host)
    assert any("share no UNet layer" in warning for warning in result.warnings)
    assert result.learned["method"] == "ziplora"
    assert result.learned["coefficients"] == sum(shapes[name][1] for name in names[:2])
    assert result.history[-1]["penalty"] == 0


def test_a_pair_of_text_encoder_layers_alone_is_summed(host, recipe_of, tmp_path):
    """Nothing that is learned by default: the plain sum, in words."""
    shapes = {f"lora_te1_text_model_encoder_layers_0_self_attn_{n}_proj": (32, 32) for n in ("q", "v", "out")}
    a, b = (write_lora(tmp_path / f"{name}.safetensors", shapes, rank=2, seed=i) for i, name in enumerate("ab"))
    result = run(recipe_of(subject=a, style=b, dtype="fp32"), host)
    assert result.learned == {"method": "direct"}
    assert any("3 text encoder layers are summed, not learned" in warning for warning in result.warnings)
    for key, delta in read(host.destination("merged")).deltas.items():
        wanted = read(a).deltas[key].dense() + read(b).deltas[key].dense()
        torch.testing.assert_close(delta.dense(), wanted, rtol=1e-5, atol=1e-6)
