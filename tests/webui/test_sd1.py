"""SD 1.5 and SD 2.x inside a real WebUI: the miniature there is the one we embed, and a merge goes the whole way."""

import contextlib
import hashlib
import json

import numpy as np
import pytest
import torch
from kohya_files import write_lora
from ldm_miniature import NAME, SD2_NAME, build_sd2
from PIL import Image
from safetensors.torch import load_file, save_file
from test_host import CHECK_WEIGHTS, noisy_vae
from test_merge import PICTURE as PICTURE_256
from test_merge import TRACES, UPDOWN, merge
from test_merge import recipe as recipe_256

from ziplora_lib.hosts.miniature import build_miniature, build_miniature_sd1
from ziplora_lib.lora.reader import read

PROMPT = "a photo of sks dog, a house in szn style"
SIDE = 128  # SD 1.5 has attention at full size too: pictures of 256 pixels take it several times as long as SDXL
PICTURE = {**PICTURE_256, "width": SIDE, "height": SIDE}


def recipe(output: str, **fields) -> dict:
    return recipe_256(output, **{"resolution": SIDE, **fields})


# --- the miniature ----------------------------------------------------------------------------------


def test_every_weight_of_the_checkpoint_is_used(webui_sd1):
    assert webui_sd1.run(CHECK_WEIGHTS.replace('"conditioner."', '"cond_stage_model."')) == []


def test_prompt_and_seed_matter(webui_sd1):
    first = webui_sd1.txt2img(PROMPT, seed=7, **PICTURE).astype(float)
    other_prompt = webui_sd1.txt2img("a painting of a blue car", seed=7, **PICTURE).astype(float)
    other_seed = webui_sd1.txt2img(PROMPT, seed=8, **PICTURE).astype(float)
    assert first.std() > 10
    assert np.abs(first - other_prompt).mean() > 1
    assert np.abs(first - other_seed).mean() > 10


FORWARD = """
import copy
import safetensors.torch, torch
from modules import shared, devices
model = shared.sd_model
given = safetensors.torch.load_file(data["given"])
out = {}
with torch.no_grad(), devices.without_autocast():
    out["unet"] = model.apply_model(given["x"], given["t"], {"c_crossattn": [given["context"]]})
    out["text"] = model.get_learned_conditioning([data["prompt"]])
    vae = copy.deepcopy(model.first_stage_model)
    noisy = safetensors.torch.load_file(data["noisy_vae"])
    vae.load_state_dict({k.removeprefix("first_stage_model."): v for k, v in noisy.items()}, strict=True)
    out["decoded"], out["encoded"] = vae.decode(given["z"]), vae.quant_conv(vae.encoder(given["picture"]))
safetensors.torch.save_file({k: v.float().contiguous() for k, v in out.items()}, data["wanted"])
"""


def test_the_converted_miniature_computes_the_same(webui_sd1, tmp_path):
    from sgm_miniature import convert_vae

    mini, seeded = build_miniature_sd1(), torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=seeded)

    given = {
        "x": normal(2, 4, 16, 24),
        "t": torch.tensor([17.0, 801.0]),
        "context": normal(2, 77, 768),
        "z": normal(1, 4, 16, 24),
        "picture": torch.rand(1, 3, 128, 160, generator=seeded) * 2 - 1,
    }
    save_file(given, tmp_path / "given.safetensors")
    vae = noisy_vae(mini.vae, seeded)
    save_file({k: v.detach().contiguous() for k, v in convert_vae(vae).items()}, tmp_path / "noisy.safetensors")
    files = {key: str(tmp_path / f"{name}.safetensors") for key, name in
             {"given": "given", "noisy_vae": "noisy", "wanted": "out"}.items()}  # fmt: skip
    webui_sd1.run(FORWARD, prompt=PROMPT, **files)
    ids = mini.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = {
            "unet": mini.unet(given["x"], given["t"], given["context"]).sample,
            "text": mini.text_encoder(ids).last_hidden_state,
            "decoded": vae.decode(given["z"]).sample,
            "encoded": vae.encode(given["picture"]).latent_dist.parameters,
        }
    theirs = load_file(tmp_path / "out.safetensors")
    for part in ours:
        assert ours[part].shape == theirs[part].shape, part
        difference, scale = (ours[part] - theirs[part]).abs().max().item(), ours[part].abs().max().item()
        assert difference < 1e-5 * max(1.0, scale), part


# --- merges -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(webui_sd1):
    """Two parents as kohya's SD 1.5 trainer names them, and one for SDXL, in the WebUI's folder."""
    pipe = build_miniature_sd1()
    write_lora(webui_sd1.lora_dir / "random-subject.safetensors", pipe, seed=1, rank=8, alpha=4.0, only="attn")
    write_lora(webui_sd1.lora_dir / "random-style.safetensors", pipe, seed=2, rank=4, alpha=8.0)
    write_lora(webui_sd1.lora_dir / "for-sdxl.safetensors", build_miniature(), seed=3, rank=4, alpha=4.0, only="attn")
    webui_sd1.post("/sdapi/v1/refresh-loras")
    return {name: webui_sd1.lora_dir / f"{name}.safetensors" for name in ("random-subject", "random-style")}


@contextlib.contextmanager
def loaded(webui, checkpoint: str = NAME, **options):
    """Another checkpoint of the folder, or other settings, for as long as the block lasts."""
    before = webui.get("/sdapi/v1/options").json()
    options["sd_model_checkpoint"] = f"{checkpoint}.safetensors"
    assert webui.post("/sdapi/v1/options", json=options).status_code == 200
    try:
        yield
    finally:
        webui.post("/sdapi/v1/options", json={name: before[name] for name in options})


def test_our_delta_is_what_the_lora_extension_adds(webui_sd1, loras):
    for name, path in loras.items():
        out = webui_sd1.data_dir / f"{name}-updown.safetensors"
        count = webui_sd1.run(UPDOWN, name=name, out=str(out))
        theirs, ours = load_file(out), read(path).deltas
        assert count == len(ours) == len(theirs)
        for key, delta in ours.items():
            wanted = theirs[key].reshape(delta.shape)
            torch.testing.assert_close(delta.dense(), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


@pytest.fixture(scope="module")
def merged(webui_sd1, loras) -> dict:
    """One merge over the API, and pictures and traces of before it and after it."""

    def look():
        return {"picture": webui_sd1.txt2img(PROMPT, seed=0, **PICTURE), "traces": webui_sd1.run(TRACES)}

    before = look()
    state = merge(webui_sd1, recipe("over-api"))
    assert state["state"] == "done", state
    return {"before": before, "state": state, "after": look()}


def test_a_job_leaves_no_trace(merged):
    assert merged["before"]["traces"] == merged["after"]["traces"]
    assert np.array_equal(merged["before"]["picture"], merged["after"]["picture"])


def test_the_merge_learned_something(merged):
    learned = merged["state"]["result"]["learned"]
    assert sum(learned["error"]) < sum(learned["error_plain_sum"])


def test_the_new_lora_is_listed_as_sd1_with_the_right_hash(webui_sd1, merged):
    path = webui_sd1.lora_dir / "over-api.safetensors"
    data = path.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    listed = webui_sd1.run(
        """
import sys
entry = sys.modules["networks"].available_networks["over-api"]
result = [entry.sd_version.name, entry.hash, entry.alias]
"""
    )
    assert listed == ["SD1", digest, "over-api"]
    assert json.loads(path.with_suffix(".json").read_text())["sd version"] == "SD1"
    metadata = read(path).metadata
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert merged["state"]["result"]["preflight"]["model"]["base"] == "sd1"


def test_the_tag_makes_the_picture_of_the_learned_coefficients(webui_sd1, merged):
    attached = np.asarray(Image.open(webui_sd1.lora_dir / "over-api.png")).astype(int)
    tag = merged["state"]["result"]["tag"]
    prompted = webui_sd1.txt2img(PROMPT + tag, seed=0, **PICTURE).astype(int)
    assert np.abs(attached - prompted).max() <= 2
    assert np.abs(prompted - merged["before"]["picture"]).mean() > 2


def test_direct_equals_both_tags_together(webui_sd1, loras, merged):
    state = merge(webui_sd1, recipe("plain-sum", method="direct"))
    both = "<lora:random-subject:1><lora:random-style:0.8>"
    ours = webui_sd1.txt2img(PROMPT + state["result"]["tag"], seed=3, **PICTURE).astype(int)
    theirs = webui_sd1.txt2img(PROMPT + both, seed=3, **PICTURE).astype(int)
    assert np.abs(ours - theirs).max() <= 2


def test_prompts_of_different_length(webui_sd1, loras):
    """The miniature spells words that it does not know, so a few of those fill a second chunk of 75 tokens."""
    body = recipe("long", overwrite=True)
    body["parents"][0]["prompt"] = "extraordinarily multidimensional kaleidoscopic phantasmagoria " * 2
    assert merge(webui_sd1, body)["state"] == "done"


def test_a_lora_for_another_base_is_refused_on_either(webui_sd1, loras):
    body = recipe("never")
    body["parents"][1]["lora"] = "for-sdxl"
    answer = webui_sd1.post("/ziplora/v1/merge", json=body)
    assert answer.status_code == 422
    assert "for-sdxl.safetensors" in answer.json()["error"]
    assert "SDXL" in answer.json()["error"]
    assert "trained on SD 1.5" in answer.json()["error"]
    with loaded(webui_sd1, "ziplora-miniature"):
        answer = webui_sd1.post("/ziplora/v1/merge", json=recipe("never"))
        assert answer.status_code == 422
        assert "is a LoRA for SD 1.5, but ziplora-miniature is SDXL" in answer.json()["error"]
    assert not list(webui_sd1.lora_dir.glob("never*"))


def test_a_resolution_that_doubles_pictures_is_pointed_out(webui_sd1, loras):
    for resolution, warned in ((768, False), (1024, True)):
        answer = webui_sd1.post("/ziplora/v1/preflight", json=recipe("not-there-yet", resolution=resolution))
        assert answer.status_code == 200, answer.text
        assert any("doubles" in warning for warning in answer.json()["warnings"]) == warned


@pytest.mark.parametrize(
    ("checkpoint", "schedule", "prediction"),
    [(NAME, "Zero Terminal SNR", "epsilon"), ("ziplora-miniature-v", "Default", "v"),
     ("ziplora-miniature-v", "Zero Terminal SNR", "v")],
)  # fmt: skip
def test_other_predictions_and_schedules(webui_sd1, loras, checkpoint, schedule, prediction):
    with loaded(webui_sd1, checkpoint, sd_noise_schedule=schedule):
        before, traces = webui_sd1.txt2img(PROMPT, seed=0, **PICTURE), webui_sd1.run(TRACES)
        state = merge(webui_sd1, recipe("other-model", overwrite=True))
        assert state["state"] == "done", state
        assert webui_sd1.run(TRACES) == traces
        assert np.array_equal(webui_sd1.txt2img(PROMPT, seed=0, **PICTURE), before)
        prompted = webui_sd1.txt2img(PROMPT + state["result"]["tag"], seed=0, **PICTURE).astype(int)
    assert state["result"]["preflight"]["model"]["prediction"] == prediction
    assert read(webui_sd1.lora_dir / "other-model.safetensors").metadata["modelspec.prediction_type"] == prediction
    attached = np.asarray(Image.open(webui_sd1.lora_dir / "other-model.png")).astype(int)
    assert np.abs(attached - prompted).max() <= 2
    assert np.abs(prompted - before).mean() > 1


def test_sd2_goes_the_whole_way(webui_sd1):
    """Another text encoder, whose attention is one module with four projections."""
    folder, pipe = webui_sd1.lora_dir, build_sd2()
    write_lora(folder / "sd2-subject.safetensors", pipe, seed=1, rank=8, alpha=4.0, only="attn")
    write_lora(folder / "sd2-style.safetensors", pipe, seed=2, rank=4, alpha=8.0)
    body = recipe("sd2-merged")
    for parent, name in zip(body["parents"], ("sd2-subject", "sd2-style")):
        parent["lora"] = name
    with loaded(webui_sd1, SD2_NAME):
        unused = webui_sd1.run(CHECK_WEIGHTS.replace('"conditioner."', '"cond_stage_model."'))
        assert [
            name for name in unused if not name.startswith("only in the model: cond_stage_model.model.attn_mask")
        ] == []
        before, traces = webui_sd1.txt2img(PROMPT, seed=0, **PICTURE), webui_sd1.run(TRACES)
        state = merge(webui_sd1, body)
        assert state["state"] == "done", state
        assert webui_sd1.run(TRACES) == traces
        assert np.array_equal(webui_sd1.txt2img(PROMPT, seed=0, **PICTURE), before)
        prompted = webui_sd1.txt2img(PROMPT + state["result"]["tag"], seed=0, **PICTURE).astype(int)
        both = webui_sd1.txt2img(PROMPT + "<lora:sd2-subject:1><lora:sd2-style:0.8>", seed=0, **PICTURE).astype(int)
        body |= {"output": "sd2-plain-sum", "method": "direct"}
        tag = merge(webui_sd1, body)["result"]["tag"]
        plain = webui_sd1.txt2img(PROMPT + tag, seed=0, **PICTURE).astype(int)
        entry = "import sys\nresult = sys.modules['networks'].available_networks['sd2-merged'].sd_version.name"
        assert webui_sd1.run(entry) == "SD2"
    details = state["result"]["preflight"]
    assert details["model"]["base"] == "sd2"
    assert all(parent["matched"] == parent["layers"] for parent in details["parents"])
    attached = np.asarray(Image.open(folder / "sd2-merged.png")).astype(int)
    assert np.abs(attached - prompted).max() <= 2
    assert np.abs(plain - both).max() <= 2
    assert np.abs(prompted - before).mean() > 1
    assert np.abs(prompted - both).mean() > 1


def test_a_hypernetwork_of_the_last_generation_stays_out_of_a_job(webui_sd1, loras):
    webui_sd1.run("from modules import shared\nshared.loaded_hypernetworks.append('fails where it is used')")
    try:
        state = merge(webui_sd1, recipe("without-hypernetwork"))
        left = webui_sd1.run("from modules import shared\nresult = shared.loaded_hypernetworks")
    finally:
        webui_sd1.run("from modules import shared\nshared.loaded_hypernetworks.clear()")
    assert state["state"] == "done", state
    assert left == ["fails where it is used"]


REFUSED = {
    "an inpainting model": 'model.model.conditioning_key = "hybrid"',
    "needs more than a prompt": 'model.model.conditioning_key = "crossattn-adm"',
    "neither SD 1.5, SD 2.x nor SDXL": "model.is_sd1 = False",
}


@pytest.mark.parametrize("words", REFUSED)
def test_other_kinds_of_models_are_refused(webui_sd1, loras, words):
    """What tells them from a plain model, set on the plain model."""
    webui_sd1.run(f"from modules import shared\nmodel = shared.sd_model\n{REFUSED[words]}")
    try:
        answer = webui_sd1.post("/ziplora/v1/preflight", json=recipe("never"))
    finally:
        webui_sd1.run("from modules import shared\nshared.sd_model.model.conditioning_key = 'crossattn'\n"
                      "shared.sd_model.is_sd1 = True")  # fmt: skip
    assert answer.status_code == 422
    assert words in answer.json()["error"]
    assert "Pick an SD 1.5, SD 2.x or SDXL checkpoint" in answer.json()["error"]
