"""Every kind of LoRA in a real WebUI: what it does alone is what it does through a merge.

The files are LyCORIS' own, with random values that are gentle enough for a picture. Each is added to a LoRA that is zero;
then `<lora:A:1>` and the sum must give the same picture.
"""

import numpy as np
import pytest
import torch
from kohya_files import write_lora
from PIL import Image
from safetensors.torch import save_file
from test_merge import PICTURE, merge

from ziplora_lib.hosts.miniature import TEXT_2_WIDTH, TEXT_WIDTH, build_miniature
from ziplora_lib.lora.bake import stacks
from ziplora_lib.lora.reader import read

pytest.importorskip("lycoris")

PROMPT = "a photo of a dog"
EMBEDDING = "zorblax"

# name: (kind that the reader tells, LyCORIS' algorithm, its options, the size of the random values)
FILES = {
    "lora": ("LoRA", "locon", dict(linear_dim=4, linear_alpha=2, conv_dim=None), 0.1),
    "locon": ("LoCon", "locon", dict(linear_dim=4, linear_alpha=2, conv_dim=4, conv_alpha=2), 0.1),
    "tucker": ("LoCon", "locon", dict(linear_dim=4, conv_dim=4, use_tucker=True), 0.15),
    "loha": ("LoHa", "loha", dict(linear_dim=3, linear_alpha=2, conv_dim=2), 0.3),
    "loha-tucker": ("LoHa", "loha", dict(linear_dim=3, conv_dim=2, use_tucker=True), 0.4),
    "lokr": ("LoKr", "lokr", dict(linear_dim=2, linear_alpha=1, conv_dim=2, factor=4), 0.3),
    "lokr-both": ("LoKr", "lokr", dict(linear_dim=2, conv_dim=2, factor=4, decompose_both=True), 0.33),
    "lokr-full": ("LoKr", "lokr", dict(linear_dim=100000, conv_dim=100000, factor=4), 0.15),
    "glora": ("GLoRA", "glora", dict(linear_dim=4, linear_alpha=2, conv_dim=None), 0.08),
    "ia3": ("(IA)³", "ia3", dict(), 0.1),
    "oft": ("OFT", "diag-oft", dict(linear_dim=4, linear_alpha=0, conv_dim=None), 0.1),
    "boft": ("BOFT", "boft", dict(linear_dim=4, linear_alpha=0, conv_dim=None), 0.05),
    "full": ("full", "full", dict(), 0.1),
    "norm": ("norm", "locon", dict(linear_dim=4, conv_dim=None, train_norm=True), 0.1),
    "embedding": ("LoRA", "locon", dict(linear_dim=4, conv_dim=None), 0.05),
    "dora": ("DoRA of LoRA", "locon", dict(linear_dim=4, conv_dim=None, weight_decompose=True, wd_on_out=False), 0.05),
    "dora-loha": (
        "DoRA of LoHa",
        "loha",
        dict(linear_dim=3, conv_dim=None, weight_decompose=True, wd_on_out=False),
        0.3,
    ),
}
# LyCORIS has given the four matrices each other's names since; the WebUI knows the older ones only
_SWAPPED = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
RENAMED = {"glora": _SWAPPED}
# the WebUI leaves the first upsampler out when a LoRA is prompted with, and the merge does not
LEFT_OUT = ("upsamplers",)


def fill(network, size: float) -> None:
    """Random values of a size that changes a picture and does not spoil it."""
    generator = torch.Generator().manual_seed(0)

    def noise(p: torch.Tensor) -> torch.Tensor:
        return torch.randn(p.shape, generator=generator)

    with torch.no_grad():
        for module in network.loras:
            if type(module).__name__ == "FullModule":  # its parameters are the changed weights themselves
                module.weight.copy_(module._org_weight[0] * (1 + size * noise(module.weight)))
                if module.bias is not None:
                    module.bias.copy_(module.org_bias[0] + 0.02 * noise(module.bias))
                continue
            for name, p in module.named_parameters():
                if name == "dora_scale":
                    weight = module.org_module[0].weight
                    own = weight.square().sum([d for d in range(weight.ndim) if d != 1], keepdim=True).sqrt()
                    p.copy_(own * (1 + 0.05 * noise(p)))
                else:
                    p.copy_(noise(p) * size)


def write_kind(path, network_of, name: str) -> None:
    """One of FILES, for the whole miniature, spelled as kohya's trainer spells it."""
    _, algo, options, size = FILES[name]
    network = network_of(build_miniature(), algo, **options)
    fill(network, size)
    tensors = {}
    for key, value in network.state_dict().items():
        if any(part in key for part in LEFT_OUT):
            continue
        layer, _, part = key.partition(".")
        for encoder in ("lora_te1_", "lora_te2_"):
            # the trainer's older transformers wrap the encoder once more
            layer = layer.replace(f"{encoder}encoder", f"{encoder}text_model_encoder")
        tensors[f"{layer}.{RENAMED.get(name, {}).get(part, part)}"] = value.detach().clone().contiguous()
    if name == "embedding":
        generator = torch.Generator().manual_seed(1)
        for part, width in (("clip_l", TEXT_WIDTH), ("clip_g", TEXT_2_WIDTH)):
            tensors[f"bundle_emb.{EMBEDDING}.{part}"] = torch.randn(2, width, generator=generator)
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})


@pytest.fixture(scope="session")
def zero(webui):
    """A LoRA that changes nothing."""
    path = webui.lora_dir / "zero.safetensors"
    write_lora(path, build_miniature(), seed=3, rank=2, alpha=2.0, only="attn1_to_q", strength=0.0)
    return path.stem


@pytest.mark.parametrize("name", FILES)
def test_alone_and_added_to_nothing_give_the_same_picture(webui, zero, lycoris_network, name):
    path = webui.lora_dir / f"kind-{name}.safetensors"
    write_kind(path, lycoris_network, name)
    assert FILES[name][0] in read(path).kinds
    webui.post("/sdapi/v1/refresh-loras")
    body = {
        "parents": [{"lora": path.stem, "role": "subject"}, {"lora": zero, "role": "style"}],
        **dict(output=f"sum-{name}", method="direct", dtype="fp32", dense_rank=0),
        **dict(resolution=256, balance_points=1, sampler_steps=1, overwrite=True),
    }
    state = merge(webui, body)
    assert state["state"] == "done", state.get("error")
    prompt = f"{PROMPT} {EMBEDDING}" if name == "embedding" else PROMPT
    alone, summed = (webui.txt2img(f"{prompt} <lora:{n}:1>", seed=5, **PICTURE) for n in (path.stem, f"sum-{name}"))
    without = webui.txt2img(prompt, seed=5, **PICTURE)
    change = np.abs(alone.astype(int) - without)
    assert change.max() > 20, f"{name} changes next to nothing"
    assert ((alone > 5) & (alone < 250)).mean() > 0.2, f"{name} spoils the picture"
    assert np.abs(alone.astype(int) - summed).max() <= 2


@pytest.fixture(scope="session")
def three(webui) -> list[dict]:
    """Three parents of three kinds."""
    return [
        {"lora": "kind-loha", "role": "subject", "prompt": "a photo of sks dog"},
        {"lora": "kind-dora", "role": "subject", "prompt": "a photo of zwx cat", "strength": 0.8},
        {"lora": "kind-locon", "role": "style", "prompt": "a house in szn style"},
    ]


@pytest.mark.parametrize("text_encoders", ["sum", "learn"])
def test_three_kinds_in_one_file(webui, three, lycoris_network, text_encoders):
    """Zipped, with the prompts read by the coefficients too or not: the tag gives the picture of what was learned."""
    for parent in three:
        path = webui.lora_dir / f"{parent['lora']}.safetensors"
        if not path.exists():
            write_kind(path, lycoris_network, parent["lora"].removeprefix("kind-"))
    webui.post("/sdapi/v1/refresh-loras")
    before = webui.txt2img(PROMPT, seed=5, **PICTURE)
    name = f"three-{text_encoders}"
    body = {
        "start": 0.5,
        "parents": three,
        **dict(output=name, steps=4, samples=4, pictures=1, text_encoders=text_encoders, dtype="fp32", overwrite=True),
        **dict(resolution=256, balance_points=1, sampler_steps=PICTURE["steps"], guidance=PICTURE["cfg_scale"]),
    }
    state = merge(webui, body)
    assert state["state"] == "done", state.get("error")
    prompt = ", ".join(parent["prompt"] for parent in three)
    preview = np.asarray(Image.open(webui.lora_dir / f"{name}.png").convert("RGB")).astype(int)
    assert np.abs(preview - webui.txt2img(f"{prompt} <lora:{name}:1>", seed=0, **PICTURE)).max() <= 2
    assert np.abs(preview - webui.txt2img(prompt, seed=0, **PICTURE)).max() > 20
    assert np.array_equal(webui.txt2img(PROMPT, seed=5, **PICTURE), before)
    merged, shares = stacks(read(webui.lora_dir / f"{name}.safetensors")), []
    for i in (0, 2):  # the DoRA's own norms are not in its file
        own = read(webui.lora_dir / f"{three[i]['lora']}.safetensors").deltas
        shares += [merged[key].part(i).norm() / delta.norm() for key, delta in own.items() if "_te" in key]
    assert shares
    if text_encoders == "sum":
        assert shares == pytest.approx([1.0] * len(shares), abs=1e-4)
    else:  # none is as it was, nor as the start of one half would leave it
        assert all(abs(share - left) > 1e-3 for share in shares for left in (1.0, 0.5))


def test_a_bundled_embedding_is_known_while_the_pictures_are_made(webui, zero, lycoris_network):
    """Also when the last generation had that LoRA in its prompt, and with it the embedding."""
    path = webui.lora_dir / "kind-embedding.safetensors"
    write_kind(path, lycoris_network, "embedding")
    webui.post("/sdapi/v1/refresh-loras")
    prompt = f"{PROMPT} {EMBEDDING}"
    without = webui.txt2img(prompt, seed=0, **PICTURE)
    alone = webui.txt2img(f"{prompt} <lora:kind-embedding:1>", seed=0, **PICTURE)
    body = {
        "parents": [{"lora": path.stem, "role": "subject", "prompt": prompt}, {"lora": zero, "role": "style"}],
        **dict(
            output="with-embedding", method="direct", dtype="fp32", overwrite=True, resolution=256, balance_points=1
        ),
        **dict(sampler_steps=PICTURE["steps"], guidance=PICTURE["cfg_scale"]),
    }
    state = merge(webui, body)
    assert state["state"] == "done", state.get("error")
    preview = np.asarray(Image.open(webui.lora_dir / "with-embedding.png").convert("RGB")).astype(int)
    assert np.abs(preview - alone).max() <= 2
    assert np.array_equal(webui.txt2img(prompt, seed=0, **PICTURE), without)


HALF = """
import sys, torch
from ziplora_lib.hosts import webui as host
from ziplora_lib.merge.attach import Slot
networks = sys.modules["networks"]
lora = host.WebuiHost().open(data["name"])
known = host.WebuiHost()._network(lora).modules
result = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    deltas = []
    for key, slot in host.WebuiHost().slots(list(lora.dense)).items():
        if slot.head is None and slot.module.weight.ndim == 2:
            layer = torch.nn.Linear(*reversed(slot.module.weight.shape), bias=False)
            layer.weight = torch.nn.Parameter(slot.module.weight.detach().to(dtype))
            deltas.append(host._updown(known[host.network_name(key)], Slot(layer)))
        if len(deltas) == 3:
            break
    result[str(dtype)] = [None if d is None else d.norm().item() for d in deltas]
"""


@pytest.mark.parametrize("name", ["oft", "boft", "dora", "glora", "ia3"])
def test_weights_in_half_precision_are_worked_out_too(webui, lycoris_network, name):
    path = webui.lora_dir / f"kind-{name}.safetensors"
    if not path.exists():
        write_kind(path, lycoris_network, name)
        webui.post("/sdapi/v1/refresh-loras")
    norms = webui.run(HALF, name=path.stem)
    full = norms.pop("torch.float32")
    assert len(full) == 3
    for dtype, half in norms.items():
        assert half == pytest.approx(full, rel=0.05), dtype


def test_what_the_webui_cannot_load_is_refused_with_its_reason(webui, zero):
    layer = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.lora_up.weight": torch.ones(64, 2), f"{layer}.lora_down.weight": torch.ones(2, 64)}
    tensors["lora_unet_middle_block_1_norm.w_norm"] = torch.ones(64)  # without b_norm
    save_file(tensors, webui.lora_dir / "odd.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    webui.post("/sdapi/v1/refresh-loras")
    parents = [{"lora": "odd", "role": "subject", "prompt": "a"}, {"lora": zero, "role": "style", "prompt": "b"}]
    answer = webui.post("/ziplora/v1/preflight", json={"parents": parents, "output": "x", "resolution": 256})
    assert answer.status_code == 422
    assert "odd.safetensors" in answer.json()["error"]
    assert "the WebUI itself cannot load it" in answer.json()["error"]


def test_a_kind_that_the_webui_cannot_apply_is_refused_before_any_work(webui, zero, lycoris_network):
    """GLoRA with the names that LyCORIS gives its matrices today: a prompt with it changes nothing either."""
    old = RENAMED.pop("glora")
    try:
        write_kind(webui.lora_dir / "new-glora.safetensors", lycoris_network, "glora")
    finally:
        RENAMED["glora"] = old
    webui.post("/sdapi/v1/refresh-loras")
    without = webui.txt2img(PROMPT, seed=5, **PICTURE)
    assert np.array_equal(webui.txt2img(f"{PROMPT} <lora:new-glora:1>", seed=5, **PICTURE), without)
    parents = [{"lora": "new-glora", "role": "subject", "prompt": "a"}, {"lora": zero, "role": "style", "prompt": "b"}]
    answer = webui.post("/ziplora/v1/preflight", json={"parents": parents, "output": "x", "resolution": 256})
    assert answer.status_code == 422
    assert "none of its layers (GLoRA) can be applied" in answer.json()["error"]


@pytest.mark.parametrize("webui", [["--medvram"]], indirect=True)
def test_with_medvram_what_needs_the_model_is_worked_out_and_encoders_are_not_learned(webui, zero, lycoris_network):
    for name in ("dora", "oft"):
        write_kind(webui.lora_dir / f"kind-{name}.safetensors", lycoris_network, name)
    webui.post("/sdapi/v1/refresh-loras")
    parents = [
        {"lora": "kind-dora", "role": "subject", "prompt": "a photo of sks dog"},
        {"lora": "kind-oft", "role": "style", "prompt": "a house in szn style"},
    ]
    body = {
        "parents": parents,
        **dict(output="moved", steps=2, samples=4, pictures=1, dtype="fp32", dense_rank=0, overwrite=True),
        **dict(resolution=256, balance_points=1, sampler_steps=PICTURE["steps"], guidance=PICTURE["cfg_scale"]),
    }
    answer = webui.post("/ziplora/v1/preflight", json={**body, "text_encoders": "learn"})
    assert answer.status_code == 422
    assert "--medvram" in answer.json()["error"]
    state = merge(webui, body)
    assert state["state"] == "done", state.get("error")
    assert not any("cannot be applied" in warning for warning in state["result"]["warnings"])
    prompt = ", ".join(parent["prompt"] for parent in parents)
    preview = np.asarray(Image.open(webui.lora_dir / "moved.png").convert("RGB")).astype(int)
    assert np.abs(preview - webui.txt2img(f"{prompt} <lora:moved:1>", seed=0, **PICTURE)).max() <= 2
    assert np.abs(preview - webui.txt2img(prompt, seed=0, **PICTURE)).max() > 20
