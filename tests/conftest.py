"""What several tests share. Pure tests (files, keys, maths) need torch, safetensors and pydantic alone, as the WebUI has."""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for loras and dense, whatever import mode pytest runs in

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

SIDE = 64  # pixels: the smallest picture of a recipe, the fastest on the miniature


@pytest.fixture
def host(tmp_path):
    """The headless host with a fresh miniature; what is merged goes into tmp_path."""
    pytest.importorskip("diffusers")
    from ziplora_lib.hosts.diffusers import DiffusersHost

    return DiffusersHost("miniature", tmp_path, "cpu")


@pytest.fixture(scope="session")
def layers():
    """Every Linear and Conv2d of the miniature: {(part, dotted name): weight shape}, by enumeration."""
    pytest.importorskip("diffusers")
    from torch import nn

    from ziplora_lib.hosts.miniature import build_miniature

    pipe = build_miniature()
    return {
        (part, name): tuple(module.weight.shape)
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


@pytest.fixture(scope="session")
def pair_files(layers, tmp_path_factory):
    """A subject and a style with random factors for the miniature, in kohya's format: different layers, ranks, alphas.

    Both adapt the attention and convolutions; the subject also both text encoders and the samplers, the style also the
    feed-forward and time layers.
    """
    from loras import kohya_name, write_lora

    def chosen(*marks, text=False):
        return {
            kohya_name(part, name): shape
            for (part, name), shape in layers.items()
            if (text and part != "unet") or (part == "unet" and any(mark in name for mark in marks))
        }

    folder = tmp_path_factory.mktemp("pair")
    subject, style = (
        chosen("attn", "conv1", "shortcut", "samplers", text=True),
        chosen("attn", "conv1", ".ff.", "time_emb"),
    )
    return (
        write_lora(folder / "subject.safetensors", subject, rank=3, alpha=1.5, seed=1, size=0.3),
        write_lora(folder / "style.safetensors", style, rank=5, alpha=10.0, seed=2, size=0.3),
    )


@pytest.fixture(scope="session")
def third_file(layers, tmp_path_factory):
    """Another subject beside `pair_files`: attention layers alone, another rank."""
    from loras import kohya_name, write_lora

    shapes = {
        kohya_name(part, name): shape for (part, name), shape in layers.items() if part == "unet" and "attn" in name
    }
    return write_lora(tmp_path_factory.mktemp("third") / "third.safetensors", shapes, rank=2, seed=3, size=0.3)


@pytest.fixture
def recipe_of(pair_files):
    """recipe_of(**fields): a small recipe for the pair."""
    from ziplora_lib.recipe import parse

    def make(subject=pair_files[0], style=pair_files[1], **fields):
        return parse({
            "parents": [
                {"lora": str(subject), "role": "subject", "prompt": "a photo of sks cat"},
                {"lora": str(style), "role": "style", "prompt": "a house in szn style"},
            ],
            "output": "merged", "steps": 4, "resolution": SIDE, "pictures": 1, "samples": 4, "sampler_steps": 2,
            "balance_points": 1, "memory": "fast", "at_once": 8,
            **fields,
        })  # fmt: skip

    return make


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """The two sample LoRAs, trained once: (subject, style)."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from ziplora_lib.hosts.samples import write_samples

    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture
def cli(capsys):
    """cli(*arguments) -> (status, stdout, stderr), in this process."""
    pytest.importorskip("diffusers")
    from ziplora_lib.__main__ import main

    def call(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def lycoris_network(monkeypatch):
    """lycoris_network(pipe, algo, **options): a network on UNet and text encoders as kohya's trainer makes it, random."""
    kohya = pytest.importorskip("lycoris.kohya")
    # without the class that holds the time layers, which LyCORIS also names one by one
    blocks = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
    monkeypatch.setattr(kohya.LycorisNetworkKohya, "UNET_TARGET_REPLACE_MODULE", blocks)
    names = kohya.LycorisNetworkKohya.UNET_TARGET_REPLACE_NAME
    monkeypatch.setattr(kohya.LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", names)

    def make(pipe, algo, **options):
        encoders = [pipe.text_encoder, pipe.text_encoder_2]
        network = kohya.LycorisNetworkKohya(encoders, pipe.unet, network_module=algo, **options)
        network.apply_to(encoders, pipe.unet, True, True)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return network

    return make
