"""The miniature's world: what is held out stays out, and the autoencoder's shortcut is the autoencoder."""

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.miniature.base import captioned_pictures
from ziplora_lib.hosts import world
from ziplora_lib.hosts.autoencoder import InnerLevels, laid_by_hand
from ziplora_lib.hosts.miniature import WEIGHTS, build_miniature, untrained_miniature, vocabulary


@pytest.fixture(scope="module")
def pipe():
    return build_miniature()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_part_of_what_is_held_out_is_known_in_other_combinations():
    assert not set(world.NEW_SUBJECTS) & set(world.KNOWN_SUBJECTS)
    assert not set(world.NEW_STYLES) & set(world.KNOWN_STYLES)
    assert set(world.NAMED_STYLES.values()) <= set(world.KNOWN_STYLES)
    for new, known in ((world.NEW_SUBJECTS, world.KNOWN_SUBJECTS), (world.NEW_STYLES, world.KNOWN_STYLES)):
        for part in vars(new[0]):
            assert {vars(thing)[part] for thing in new} <= {vars(thing)[part] for thing in known}


def test_the_base_is_never_shown_what_is_held_out(monkeypatch):
    shown = []
    real = world.draw

    def watched(subjects, styles, generator, **options):
        shown.extend(zip(subjects, styles))
        return real(subjects, styles, generator, **options)

    monkeypatch.setattr(world, "draw", watched)
    _, captions = captioned_pictures(600, generator())
    assert len(shown) == 600
    assert not {subject for subject, _ in shown} & set(world.NEW_SUBJECTS)
    assert not {style for _, style in shown} & set(world.NEW_STYLES)
    words = set(" ".join(captions).split())
    assert not words & {"sks", "szn"}, "the words that LoRAs teach are new to the base"


def test_every_word_of_the_captions_is_one_token():
    tokens = vocabulary()[0]
    words = {"a", "photo", "of", "with", "in", "style", "sks", "szn", *world.BODIES, *world.TOPS, *world.NAMED_STYLES}
    words |= {word for style in world.STYLES for word in style.words.split()}
    assert [word for word in sorted(words) if word + "</w>" not in tokens] == []


def test_drawings_follow_from_their_seed_and_differ_in_each_of_the_six_things():
    subject, style = world.Subject(1, 1), world.Style(1, 1, 1, 1)
    picture = world.draw([subject], [style], generator())
    assert picture.shape == (1, 3, 64, 64)
    assert picture.min() >= -1
    assert picture.max() <= 1
    assert torch.equal(picture, world.draw([subject], [style], generator()))
    others = [(world.Subject(2, 1), style), (world.Subject(1, 2), style)]
    others += [(subject, world.Style(*[2 if part == k else 1 for part in range(4)])) for k in range(4)]
    for other in others:
        changed = (world.draw([other[0]], [other[1]], generator()) - picture).abs().amax(1)
        assert (changed > 0.1).float().mean() > 0.01


def test_the_inner_levels_are_the_autoencoder(pipe):
    """What is trained at 32 dots is what decodes and encodes at 64 pixels."""
    inner = InnerLevels(pipe.vae).eval()
    pictures = world.draw(world.NEW_SUBJECTS[:4], world.NEW_STYLES[:4], generator())
    with torch.no_grad():
        moments = pipe.vae.encode(pictures).latent_dist
        latents = moments.mode()
        alone = inner.encode(pictures[..., ::2, ::2])
        whole = pipe.vae.decode(latents).sample
        dots = inner.decode(pipe.vae.post_quant_conv(latents))
    standardised = pipe.vae.quant_conv(torch.cat([alone, torch.zeros_like(alone)], dim=1))[:, :4]
    assert torch.allclose(latents, standardised, atol=1e-3)
    assert torch.allclose(whole, dots.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=2e-3)
    assert moments.std.max() < 1e-5, "a certain encoder: its samples are its mean"


def test_the_autoencoder_is_sharp(pipe):
    pictures = world.draw(world.NEW_SUBJECTS, world.NEW_STYLES[:12], generator())
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(pictures).latent_dist.mode()).sample
    psnr = -10 * torch.log10((decoded - pictures).square().mean() / 4)
    assert psnr > 24


def test_what_ships_is_small_and_all_that_was_trained(pipe):
    assert WEIGHTS.stat().st_size <= 12 * 10**6
    fresh = untrained_miniature()
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        trained = getattr(pipe, part).state_dict()
        for key, value in getattr(fresh, part).state_dict().items():
            if part == "vae" and laid_by_hand(key):
                assert torch.equal(value, trained[key]), key
    # and no matrix of the UNet is as it was
    before = {key: value for key, value in fresh.unet.state_dict().items() if value.ndim > 1}
    assert all(not torch.equal(value.half().float(), pipe.unet.state_dict()[key]) for key, value in before.items())
