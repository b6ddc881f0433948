"""The WebUI itself, with the miniature: is it a host worth testing in, and is the miniature in it the one we embed?"""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sgm_miniature import convert_vae

PROMPT = "a photo of a red cat"


def test_same_seed_same_picture(webui):
    assert np.array_equal(webui.txt2img(PROMPT, seed=7), webui.txt2img(PROMPT, seed=7))


def test_prompt_and_seed_matter(webui):
    first = webui.txt2img(PROMPT, seed=7).astype(float)
    other_prompt = webui.txt2img("a painting of a blue house", seed=7).astype(float)
    other_seed = webui.txt2img(PROMPT, seed=8).astype(float)
    assert first.shape == (256, 256, 3)
    assert first.std() > 10
    assert np.abs(first - other_prompt).mean() > 1
    assert np.abs(first - other_seed).mean() > 10


def test_every_weight_of_the_checkpoint_is_used(webui):
    # the WebUI loads with strict=False and says nothing about names that match nothing
    assert webui.run(CHECK_WEIGHTS) == []


CHECK_WEIGHTS = """
import safetensors.torch
from modules import shared
on_disk = safetensors.torch.load_file(shared.sd_model.sd_model_checkpoint)
live = {}
for name, value in shared.sd_model.state_dict().items():
    # where the WebUI has wrapped a module to hook it
    live[name.replace(".wrapped.", ".")] = value
result = sorted(k for k in on_disk if k not in live or not bool((live[k].cpu() == on_disk[k]).all()))
wanted = ("model.diffusion_model.", "first_stage_model.", "conditioner.")
unset = [k for k in live if k.startswith(wanted) and k not in on_disk and not k.endswith("position_ids")]
result += ["only in the model: " + k for k in unset]
"""

FORWARD = """
import copy
import safetensors.torch, torch
from modules import shared, devices, prompt_parser, sd_models
model = shared.sd_model
given = safetensors.torch.load_file(data["given"])
out = {}
with torch.no_grad(), devices.without_autocast():
    cond = {"crossattn": given["context"], "vector": given["vector"]}
    out["unet"] = model.model(given["x"], given["t"], cond)
    vae = model.first_stage_model
    out["decoded"], out["encoded"] = vae.decode(given["z"]), vae.quant_conv(vae.encoder(given["picture"]))
    vae = copy.deepcopy(vae)
    noisy = safetensors.torch.load_file(data["noisy_vae"])
    vae.load_state_dict({k.removeprefix("first_stage_model."): v for k, v in noisy.items()}, strict=True)
    out["decoded, noisy weights"] = vae.decode(given["z"])
    out["encoded, noisy weights"] = vae.quant_conv(vae.encoder(given["picture"]))
    te1, te2 = model.conditioner.embedders[:2]
    out["te1"] = te1([data["prompt"]])
    table = te2.wrapped.model.token_embedding.wrapped.weight
    rows = len(given["table"])
    kept = table.data[:rows].clone()
    table.data[:rows] = given["table"]
    states = te2.wrapped.encode_with_transformer(given["ids"])
    out["te2"], out["pooled"] = states["penultimate"], states["pooled"]
    table.data[:rows] = kept
    size = prompt_parser.SdConditioning([data["prompt"]], width=320, height=256)
    out["sizes"] = model.get_learned_conditioning(size)["vector"][:, given["pooled_width"].item():]
safetensors.torch.save_file({k: v.float().contiguous() for k, v in out.items()}, data["wanted"])
"""


def noisy_vae(vae, seeded):
    """A VAE with a value everywhere: most weights of the miniature's are zero, and zeros hide a wrong name."""
    vae = copy.deepcopy(vae)
    silent = vae.encoder.down_blocks[0].resnets[0].conv2.weight  # sgm's encoder needs these two as they are
    entry = vae.encoder.conv_in
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter is silent or parameter is entry.weight or parameter is entry.bias:
                continue
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=seeded), alpha=scale)
    return vae


@pytest.fixture(scope="module")
def both_sides(webui, tmp_path_factory):
    """What the embedded miniature and the one in the WebUI make of the same input, by name."""
    from ziplora_lib.hosts.miniature import build_miniature

    mini = build_miniature()
    folder = tmp_path_factory.mktemp("forward")
    seeded = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=seeded)

    sizes = torch.tensor([[256.0, 320.0, 0.0, 0.0, 256.0, 320.0]])
    unet, width = mini.unet, mini.text_encoder_2.config.projection_dim
    sinusoids = unet.add_time_proj(sizes.flatten()).reshape(1, -1)
    pooled = normal(2, width)
    ids = mini.tokenizer_2(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    given = {
        "x": normal(2, 4, 16, 24),
        "t": torch.tensor([17.0, 801.0]),
        "context": normal(2, 77, unet.config.cross_attention_dim),
        "vector": torch.cat([pooled, sinusoids.expand(2, -1)], dim=1),
        "z": normal(1, 4, 16, 24) / mini.vae.config.scaling_factor,
        "picture": torch.rand(1, 3, 128, 160, generator=seeded) * 2 - 1,
        "ids": ids,
        "table": mini.text_encoder_2.text_model.embeddings.token_embedding.weight.detach(),
        "pooled_width": torch.tensor(width),
    }
    save_file({k: v.contiguous() for k, v in given.items()}, folder / "given.safetensors")
    noisy = noisy_vae(mini.vae, seeded)
    save_file({k: v.contiguous() for k, v in convert_vae(noisy).items()}, folder / "noisy.safetensors")
    files = {
        "given": f"{folder}/given.safetensors",
        "noisy_vae": f"{folder}/noisy.safetensors",
        "wanted": f"{folder}/out.safetensors",
    }
    webui.run(FORWARD, prompt=PROMPT, **files)
    ids_1 = mini.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    added = {"text_embeds": pooled, "time_ids": sizes.expand(2, -1)}
    with torch.no_grad():
        state_2 = mini.text_encoder_2(ids, output_hidden_states=True)
        ours = {
            "unet": unet(given["x"], given["t"], given["context"], added_cond_kwargs=added).sample,
            "decoded": mini.vae.decode(given["z"]).sample,
            "encoded": mini.vae.encode(given["picture"]).latent_dist.parameters,
            "decoded, noisy weights": noisy.decode(given["z"]).sample,
            "encoded, noisy weights": noisy.encode(given["picture"]).latent_dist.parameters,
            "te1": mini.text_encoder(ids_1, output_hidden_states=True).hidden_states[-2],
            "te2": state_2.hidden_states[-2],
            "pooled": state_2.text_embeds,
            "sizes": sinusoids,
        }
    return ours, load_file(folder / "out.safetensors")


PARTS = [
    "unet",
    "decoded",
    "encoded",
    "decoded, noisy weights",
    "encoded, noisy weights",
    "te1",
    "te2",
    "pooled",
    "sizes",
]


@pytest.mark.parametrize("part", PARTS)
def test_the_converted_miniature_computes_the_same(both_sides, part):
    ours, theirs = both_sides[0][part], both_sides[1][part]
    assert ours.shape == theirs.shape
    difference, scale = (ours - theirs).abs().max().item(), ours.abs().max().item()
    print(f"{part}: max abs difference {difference:.2e}, largest value {scale:.3g}")
    # latents are up to 1/0.13 and the log variance is -30: compare to each part's own size
    assert difference < 1e-5 * max(1.0, scale)


def test_flags_and_credentials(start_webui):
    with start_webui(flags=["--api-auth", "user:pass"]) as guarded:
        assert guarded.get("/sdapi/v1/options").status_code == 200
        assert guarded.get("/sdapi/v1/options", auth=None).status_code == 401


def test_the_page_opens(page):
    page.wait_for_selector("#txt2img_generate", state="visible")
    assert page.problems == []
