"""Calibration samples: the targets are each LoRA's own predictions, and everything random comes from the seed."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ziplora_lib.errors import BadInput
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.objective import OBJECTIVES, relative_error

pytest.importorskip("diffusers")


@pytest.fixture
def calibrated(host, pair_files, recipe_of):
    """calibrated(**fields) -> (train, held_out, router, host)."""
    from ziplora_lib.calibration import calibrate
    from ziplora_lib.merge.attach import attach
    from ziplora_lib.merge.pairing import pair

    loras = [read(file) for file in pair_files]
    slots = host.slots([key for lora in loras for key in lora.deltas])
    pairing = pair(loras, [1.0, 1.0], {key: slot.shape for key, slot in slots.items()})
    with attach(slots, pairing.stacks) as router:

        def make(callback=lambda info: None, **fields):
            train, held_out = calibrate(host, router, recipe_of(**fields), callback)
            return train, held_out, router, host

        yield make


def test_as_many_samples_as_asked_for_from_either_lora(calibrated):
    train, held_out, *_ = calibrated(samples=6, steps=6)
    assert [s.parent for s in train] == [0, 1] * 6
    assert [s.parent for s in held_out] == [0, 1] * 4
    assert len(calibrated(samples=64)[1]) == 2 * 8
    assert all(s.bare.shape == (1, 4, 8, 8) for s in held_out)
    assert all(s.bare is None for s in train), "the default's loss does not ask for it"
    for s in train + held_out:
        assert s.x.shape == s.target.shape == (1, 4, 8, 8)
        assert s.x.dtype == s.target.dtype == torch.float32
        assert s.x.device.type == s.target.device.type == "cpu"
        assert not s.target.requires_grad


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_three_loras_are_predicted_no_more_than_two_at_a_time(host, pair_files, third_file, recipe_of, guidance):
    """So the teacher's pass takes the memory of two LoRAs, however many there are; and each gets its own targets."""
    from ziplora_lib.calibration import calibrate
    from ziplora_lib.merge.attach import attach
    from ziplora_lib.merge.pairing import pair

    files, roles = [pair_files[0], third_file, pair_files[1]], ["subject", "subject", "style"]
    parents = [{"lora": str(f), "role": r, "prompt": f.stem} for f, r in zip(files, roles)]
    recipe = recipe_of(parents=parents, loss_guidance=guidance, samples=4, steps=4)
    loras, seen, predict, said = [read(file) for file in files], [], host.predict, []
    host.predict = lambda x, t, conds: seen.append(len(x)) or predict(x, t, conds)
    slots = host.slots([key for lora in loras for key in lora.deltas])
    with attach(slots, pair(loras, [1.0] * 3, {key: slot.shape for key, slot in slots.items()}).stacks) as router:
        train, held_out = calibrate(host, router, recipe, lambda info: said.append(info["what"]))
        assert max(seen) == (6 if guidance > 1 else 4), "of two LoRAs: alone, bare, and the bare empty prompt"
        assert [s.parent for s in train + held_out] == [0, 1, 2] * 8
        assert {"making subject third pictures", "making subject subject pictures", "making style pictures"} <= set(
            said
        )
        for s in train[:3] + held_out[:3]:
            with torch.no_grad():
                router.bare()
                empty = predict(s.x, s.t, [host.encode("", 64, negative=True)])
                router.alone(s.parent)
                told = predict(s.x, s.t, [host.encode(files[s.parent].stem, 64)])
            torch.testing.assert_close(s.target, empty + guidance * (told - empty), rtol=1e-3, atol=1e-3)


def test_under_guidance_each_lora_is_guided_against_the_bare_models_empty_prompt(host, pair_files, recipe_of):
    from ziplora_lib.calibration import calibrated
    from ziplora_lib.merge.attach import attach
    from ziplora_lib.merge.pairing import pair

    loras = [read(file) for file in pair_files]
    slots = host.slots([key for lora in loras for key in lora.deltas])
    stacks = pair(loras, [1.0, 1.0], {key: slot.shape for key, slot in slots.items()}).stacks
    with attach(slots, stacks) as router, torch.no_grad():
        recipe = recipe_of(samples=8, steps=8, empty_share=0.25, loss_guidance=2.5)
        samples = calibrated(host, router, recipe, lambda info: None)

        def read_by(choose, text, s):
            choose()
            return host.predict(s.x, s.t, [host.encode(text, 64, negative=not text)])

        every = [*samples.train, *samples.held_out]
        for s, merged in zip(every, samples.predict(every, {})):
            empty = read_by(router.bare, "", s)
            told, bare = read_by(lambda of=s.parent: router.alone(of), s.text, s), read_by(router.bare, s.text, s)
            if s.text:
                told, bare = (empty + 2.5 * (x - empty) for x in (told, bare))
            torch.testing.assert_close(s.target, told, rtol=1e-3, atol=1e-3)
            if s.bare is not None:
                torch.testing.assert_close(s.bare, bare, rtol=1e-3, atol=1e-3)
            own, of_empty = (read_by(router.merged, text, s) for text in (s.text, ""))
            wanted = of_empty + 2.5 * (own - of_empty) if s.text else own
            torch.testing.assert_close(merged[None], wanted, rtol=1e-3, atol=1e-3)
        assert [s.text for s in samples.train].count("") == 4
        assert all((s.empty is None) == (s.text == "") for s in samples.train)


def test_targets_are_the_predictions_of_each_lora_alone(calibrated):
    train, held_out, router, host = calibrated(samples=4, steps=4, empty_share=0.5, loss_guidance=1.0)
    prompts = ["a photo of sks cat", "a house in szn style"]
    kinds = set()
    for s in train[:6] + held_out[:2]:
        fits = []
        for text in (prompts[s.parent], ""):
            router.alone(s.parent)
            with torch.no_grad():
                target = host.predict(s.x, s.t, [host.encode(text, 64, negative=not text)])
                router.bare()
                bare = host.predict(s.x, s.t, [host.encode(text, 64, negative=not text)])
                router.merged()
                merged_reads = host.encode(text, 64, negative=not text)
            fits.append(
                torch.allclose(target, s.target, atol=1e-4)
                and (s.bare is None or torch.allclose(bare, s.bare, atol=1e-4))
                and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(merged_reads, s.cond))
            )
        assert sum(fits) == 1, "of its own prompt or of the empty one"
        kinds.add(fits.index(True))
    assert kinds == {0, 1}


@pytest.mark.parametrize(
    ("fields", "taught"),
    [({"steps": 3}, 3), ({"steps": 2, "batch": 3}, 6), ({"steps": 99}, 8), ({"method": "ssr"}, 0)],
)
def test_only_what_a_step_looks_at_is_predicted(calibrated, fields, taught):
    """All else of the samples stays as it is: the inputs of all of them count for the warm start."""
    train, held_out, *_ = calibrated(samples=8, **fields)
    assert [s.target is not None for s in train] == [True] * 2 * taught + [False] * 2 * (8 - taught)
    assert all(s.target is not None for s in held_out)
    for s, other in zip(train, calibrated(samples=8, steps=99)[0]):
        assert torch.equal(s.x, other.x)
        assert (s.text, s.t) == (other.text, other.t)
        if s.target is not None:
            torch.testing.assert_close(s.target, other.target)


def test_a_loss_that_asks_for_the_bare_model_gets_it(calibrated, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "paper", replace(OBJECTIVES["paper"], error=relative_error))
    assert all(s.bare is not None for s in calibrated(samples=4, steps=9, objective="paper")[0])


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 2), (0.5, 4)])
def test_the_share_of_the_empty_prompt(calibrated, share, count):
    train, held_out, router, host = calibrated(samples=8, empty_share=share)
    router.merged()
    empty = host.encode("", 64, negative=True)[0]
    for parent in (0, 1):
        assert sum(torch.equal(s.cond[0], empty) for s in train if s.parent == parent) == count
    assert not any(torch.equal(s.cond[0], empty) for s in held_out)


def test_levels_are_spread_over_the_whole_range(calibrated):
    train, *_ = calibrated(samples=20)
    for parent in (0, 1):
        levels = sorted(int(s.t) for s in train if s.parent == parent)
        assert [level // 50 for level in levels] == list(range(20)), "one in each twentieth"


def test_the_same_seed_gives_the_same_samples_and_another_others(calibrated):
    first, second, other = (calibrated(samples=4, seed=seed)[:2] for seed in (3, 3, 4))
    for a, b, c in zip(first[0] + first[1], second[0] + second[1], other[0] + other[1]):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.target, b.target)
        assert not torch.equal(a.x, c.x)
    drawn = [s.x for s in first[0] + first[1]]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), "held-out noise is fresh"


def test_noise_is_added_as_in_training(host):
    from diffusers import DDPMScheduler

    noiser = DDPMScheduler.from_config(host.pipe.scheduler.config)
    latent, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(host.add_noise(latent, noise, t), noiser.add_noise(latent, noise, t))
    host.sample("a cat", 0, 64, 2, 5.0)
    torch.testing.assert_close(host.add_noise(latent, noise, t), noiser.add_noise(latent, noise, t))


def test_reference_pictures_are_the_middle_square_upright(tmp_path):
    from ziplora_lib.calibration import references

    wide = np.zeros((60, 100, 3), np.uint8)
    wide[:, :20], wide[:, 80:], wide[:, 20:80] = (255, 0, 0), (255, 0, 0), (0, 255, 0)
    Image.fromarray(wide).save(tmp_path / "b.png")
    tall = Image.fromarray(
        np.concatenate([np.full((40, 40, 3), 255, np.uint8), np.zeros((40, 40, 3), np.uint8)], axis=1)
    )
    exif = tall.getexif()
    exif[0x0112] = 6  # turn right to see it
    tall.save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (50, 50), (0, 0, 255, 255)).save(tmp_path / "c.PNG")
    (tmp_path / "notes.txt").write_text("x")
    turned, square, blue = references([str(tmp_path)], 64)
    assert turned.size == square.size == blue.size == (64, 64)
    assert {p.mode for p in (turned, square, blue)} == {"RGB"}
    assert np.asarray(square)[:, :, 0].max() < 60, "the red edges are cut off"
    brightness = np.asarray(turned.convert("L")).astype(int)
    assert abs(brightness[:10].mean() - brightness[-10:].mean()) > 100, "light and dark are above each other"
    assert len(references([str(tmp_path / "a.jpg"), str(tmp_path)], 64)) == 4
    assert references([], 64) == []


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\x00" * 50])
def test_what_is_no_picture_is_refused(tmp_path, content):
    from ziplora_lib.calibration import references

    (tmp_path / "x.png").write_bytes(content)
    for given in (tmp_path, tmp_path / "x.png"):
        with pytest.raises(BadInput, match=r"x\.png") as caught:
            references([str(given)], 64)
        assert caught.value.remedy


def test_every_damaged_picture_is_refused_or_read(tmp_path):
    from ziplora_lib.calibration import references

    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    for kind in ("png", "jpg", "webp", "bmp"):
        path = tmp_path / f"x.{kind}"
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        chance = np.random.default_rng(1)
        for k in range(60):
            content = bytearray(whole)
            if k % 2:
                content = content[: chance.integers(0, len(whole))]
            else:
                for _ in range(4):
                    content[chance.integers(0, min(len(whole), 300))] = chance.integers(0, 255)
            path.write_bytes(content)
            with contextlib.suppress(BadInput):
                references([str(path)], 64)
        path.unlink()
