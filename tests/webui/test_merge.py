"""Merges inside a real WebUI, over its API: the file is right, the next generation uses it, and nothing is left behind."""

import hashlib
import json
import time

import numpy as np
import pytest
import torch
from kohya_files import write_lora
from PIL import Image
from safetensors.torch import load_file, save_file

from ziplora_lib.hosts.miniature import build_miniature
from ziplora_lib.lora.reader import read
from ziplora_lib.lora.stack import Stack

SUBJECT, STYLE = "a photo of sks dog", "a house in szn style"
# what the previews are made with
PICTURE = {"steps": 6, "cfg_scale": 5.0, "sampler_name": "DPM++ 2M", "scheduler": "Automatic"}
FILES = {
    "random-subject": dict(seed=1, rank=8, alpha=4.0, only="attn"),
    "random-style": dict(seed=2, rank=4, alpha=8.0),
}


START = 0.5  # both random LoRAs at full strength saturate the pictures, where fp16's rounding shows


def recipe(output: str, **fields) -> dict:
    return {
        "parents": [
            {"lora": "random-subject", "role": "subject", "prompt": SUBJECT},
            {"lora": "random-style", "role": "style", "prompt": STYLE, "strength": 0.8},
        ],
        "output": output,
        **dict(steps=6, start=START, resolution=256, samples=4, pictures=1, sampler_steps=6, balance_points=1),
        **fields,
    }


@pytest.fixture(scope="session")
def loras(webui):
    """The two parents, in the WebUI's folder."""
    pipe = build_miniature()
    for name, fields in FILES.items():
        write_lora(webui.lora_dir / f"{name}.safetensors", pipe, **fields)
    webui.post("/sdapi/v1/refresh-loras")
    return {name: webui.lora_dir / f"{name}.safetensors" for name in FILES}


def merge(webui, body: dict, until=("done", "stopped", "failed"), watch=None) -> dict:
    answer = webui.post("/ziplora/v1/merge", json=body)
    assert answer.status_code == 200, answer.text
    job = answer.json()["job"]
    for _ in range(1200):
        state = webui.get(f"/ziplora/v1/jobs/{job}").json()
        if watch is not None:
            watch(job, state)
        if state["state"] in until:
            return state
        time.sleep(0.1)
    raise AssertionError(f"the job did not end: {state}\n{webui.log[-3000:]}")


# What a job could leave behind in the live process.
TRACES = """
from modules import shared
model = shared.sd_model
import sys
result = {
    "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    "moving": sum(h.__module__ == "modules.lowvram" for m in model.modules() for h in m._forward_pre_hooks.values()),
    "overridden": sum(("forward" in vars(m)) + ("_forward" in vars(m)) for m in model.modules()),
    "trainable": [p.requires_grad for p in model.parameters()],
    "gradients": sum(p.grad is not None for p in model.parameters()),
    "training": [m.training for m in model.modules()],
    "devices": sorted({str(p.device) for p in model.parameters()}),
    "loaded": [(n.name, n.te_multiplier, n.unet_multiplier) for n in sys.modules["networks"].loaded_networks],
    "job": shared.state.job,
}
"""


def test_our_delta_is_what_the_lora_extension_adds(webui, loras):
    """On every layer that the extension matches, and it matches as many as we do."""
    for name, path in loras.items():
        out = webui.data_dir / f"{name}-updown.safetensors"
        count = webui.run(UPDOWN, name=name, out=str(out))
        theirs, ours = load_file(out), read(path).deltas
        assert count == len(ours) == len(theirs)
        for key, delta in ours.items():
            wanted = theirs[key].reshape(delta.shape)
            torch.testing.assert_close(delta.dense(), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


UPDOWN = """
import sys, torch, safetensors.torch
from ziplora_lib.hosts.webui import WebuiHost, network_name
networks = sys.modules["networks"]
net = networks.load_network(data["name"], networks.available_networks[data["name"]])
slots = WebuiHost().slots(list(WebuiHost().open(data["name"]).deltas))
out = {}
for key, slot in slots.items():
    module = net.modules[network_name(key)]
    out[key] = module.calc_updown(torch.zeros(slot.shape))[0].contiguous()
safetensors.torch.save_file(out, data["out"])
result = len(net.modules)
"""


def assert_untouched(webui, traces: dict, merged: dict) -> None:
    """Since `traces` were taken nothing has changed, and a picture without LoRAs is as at the very beginning."""
    assert webui.run(TRACES) == traces
    assert np.array_equal(webui.txt2img(merged["prompt"], seed=0, **PICTURE), merged["before"]["picture"])


@pytest.fixture(scope="session")
def merged(webui, loras) -> dict:
    """One merge over the API, what was there before it and after it."""
    prompt = f"{SUBJECT}, {STYLE}"
    before = {"picture": webui.txt2img(prompt, seed=0, **PICTURE), "traces": webui.run(TRACES)}
    # not rounded: what the warm start makes of four samples has large coefficients, where fp16 shows
    state = merge(webui, recipe("over-api", dtype="fp32"))
    assert state["state"] == "done", state
    after = {"traces": webui.run(TRACES), "picture": webui.txt2img(prompt, seed=0, **PICTURE)}
    return {"prompt": prompt, "before": before, "after": after, "state": state}


def test_a_job_leaves_no_trace(merged):
    assert merged["before"]["traces"] == merged["after"]["traces"]
    assert np.array_equal(merged["before"]["picture"], merged["after"]["picture"])


def test_the_new_lora_is_listed_as_sdxl_with_the_right_hash(webui, merged):
    path = webui.lora_dir / "over-api.safetensors"
    data = path.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    listed = webui.run(
        """
import sys
entry = sys.modules["networks"].available_networks["over-api"]
result = [entry.sd_version.name, entry.hash, entry.alias]
"""
    )
    assert listed == ["SDXL", digest, "over-api"]
    assert "over-api" in [entry["name"] for entry in webui.get("/sdapi/v1/loras").json()]
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sd version"] == "SDXL"
    assert SUBJECT in card["activation text"]
    assert Image.open(path.with_suffix(".png")).size == (256, 256)


def test_the_tag_makes_the_picture_of_the_learned_coefficients(webui, merged):
    """The preview was made with the coefficients attached to the live model; the tag loads them from the file."""
    attached = np.asarray(Image.open(webui.lora_dir / "over-api.png")).astype(int)
    prompted = webui.txt2img(merged["prompt"] + merged["state"]["result"]["tag"], seed=0, **PICTURE).astype(int)
    assert np.abs(attached - prompted).max() <= 2
    assert np.abs(prompted - merged["before"]["picture"]).mean() > 2


def test_direct_equals_both_tags_together(webui, loras, merged):
    state = merge(webui, recipe("plain-sum", method="direct"))
    both = "<lora:random-subject:1><lora:random-style:0.8>"
    ours = webui.txt2img(merged["prompt"] + state["result"]["tag"], seed=3, **PICTURE).astype(int)
    theirs = webui.txt2img(merged["prompt"] + both, seed=3, **PICTURE).astype(int)
    assert np.abs(ours - theirs).max() <= 2


@pytest.fixture(scope="session")
def columns(webui, loras):
    """A merge from the LoRAs themselves: without a warm start, its columns are theirs, scaled."""
    assert merge(webui, recipe("columns", objective="paper"))["state"] == "done"
    return read(webui.lora_dir / "columns.safetensors")


def test_every_column_is_the_parents_scaled(loras, columns):
    """ΔW_m[:,j] = m_c[j] ΔW_c[:,j] + m_s[j] ΔW_s[:,j], solved from the three files; no layer is missing."""
    subject, style = (read(path).deltas for path in loras.values())
    file = columns.deltas
    assert set(file) == set(subject) | set(style)
    for key, delta in file.items():
        parts = [d[key].dense().flatten(1).double() for d in (subject, style) if key in d]
        wanted = delta.dense().flatten(1).double()
        a = torch.stack(parts, dim=-1).permute(1, 0, 2)  # (columns, out, parents)
        m = torch.linalg.lstsq(a, wanted.T[..., None]).solution
        residual = (a @ m - wanted.T[..., None]).norm() / wanted.norm()
        assert residual < 2e-3, key  # fp16 factors, both sides
        if len(parts) == 1 and "_te" in key:  # summed, not learned
            expected = 1.0 if key in subject else 0.8
            torch.testing.assert_close(m, torch.full_like(m, expected), rtol=5e-2, atol=5e-2)


def test_an_overwritten_lora_is_used_at_once(webui, loras, merged):
    webui.txt2img(f"{SUBJECT}<lora:over-api:1>", seed=0, **PICTURE)  # baked in, and cached
    refused = webui.post("/ziplora/v1/merge", json=recipe("over-api", seed=5))
    assert refused.status_code == 422
    assert "over-api.safetensors" in refused.json()["error"]
    # not rounded: random coefficients saturate the picture, where fp16 shows
    state = merge(webui, recipe("over-api", seed=5, lr=0.1, dtype="fp32", overwrite=True))
    assert state["state"] == "done"
    attached = np.asarray(Image.open(webui.lora_dir / "over-api.png")).astype(int)
    prompted = webui.txt2img(f"{merged['prompt']}<lora:over-api:1>", seed=5, **PICTURE).astype(int)
    assert np.abs(attached - prompted).max() <= 2


def test_loras_that_were_loaded_are_loaded_again(webui, loras):
    prompt = f"{SUBJECT}<lora:random-style:0.7>"
    before = webui.txt2img(prompt, seed=4, **PICTURE)
    traces = webui.run(TRACES)
    assert [name for name, *_ in traces["loaded"]] == ["random-style"]
    assert merge(webui, recipe("while-loaded"))["state"] == "done"
    assert webui.run(TRACES) == traces
    assert np.array_equal(webui.txt2img(prompt, seed=4, **PICTURE), before)


def test_stop_keeps_the_best_so_far(webui, loras, merged):
    traces = webui.run(TRACES)

    def stop(job, state):
        if state.get("phase") == "merge" and state["step"] >= 3:
            webui.post(f"/ziplora/v1/jobs/{job}/stop")

    state = merge(webui, recipe("stopped", steps=500), watch=stop)
    assert state["state"] == "stopped"
    assert any("stopped at step" in warning for warning in state["result"]["warnings"])
    assert (webui.lora_dir / "stopped.safetensors").is_file()
    assert_untouched(webui, traces, merged)


def test_the_webuis_own_interrupt_stops_it_before_anything_is_saved(webui, loras, merged):
    traces = webui.run(TRACES)

    def interrupt(job, state):
        if state.get("phase") == "calibrate":
            webui.post("/sdapi/v1/interrupt")

    state = merge(webui, recipe("interrupted", pictures=8), watch=interrupt)
    assert state["state"] == "stopped"
    assert "nothing was saved" in state["error"]
    assert not list(webui.lora_dir.glob("interrupted*"))
    assert_untouched(webui, traces, merged)


def test_a_failed_job_says_why_and_leaves_no_trace(webui, loras, merged):
    traces = webui.run(TRACES)
    webui.run("import ziplora_lib.hosts.webui as w\nw.WebuiHost.kept = w.WebuiHost.predict\n" + BREAK_PREDICT)
    try:
        state = merge(webui, recipe("failed"))
    finally:
        webui.run("import ziplora_lib.hosts.webui as w\nw.WebuiHost.predict = w.WebuiHost.kept")
    assert state["state"] == "failed"
    # what saves memory was tried before
    assert "There is too little memory" in state["error"]
    assert not list(webui.lora_dir.glob("failed*"))
    assert_untouched(webui, traces, merged)


BREAK_PREDICT = """
import torch
def predict(self, x, t, conds):
    if torch.is_grad_enabled():
        raise RuntimeError("CUDA out of memory (injected)")
    return w.WebuiHost.kept(self, x, t, conds)
w.WebuiHost.predict = predict
"""


def test_a_generation_sent_meanwhile_waits_and_is_right(webui, loras, merged):
    answer = webui.post("/ziplora/v1/merge", json=recipe("meanwhile"))
    picture = webui.txt2img(merged["prompt"], seed=0, **PICTURE)
    assert np.array_equal(picture, merged["before"]["picture"])
    for _ in range(600):
        state = webui.get(f"/ziplora/v1/jobs/{answer.json()['job']}").json()
        if state["state"] == "done":
            break
        time.sleep(0.1)
    assert state["state"] == "done"


FROM_THE_LORAS = {
    "objective": "paper",
    "loss_guidance": 3.0,
    "lam": 0.0,
    "overwrite": True,
}  # the default, without its start


@pytest.mark.parametrize(
    "option",
    ["None", "sdp-no-mem - scaled dot product without memory efficient attention", "V1 - original v1", "sub-quadratic"],
)
def test_attention_options_and_checkpointing_learn_the_same(webui, loras, merged, option):
    """The gradient must come through every attention, and checkpointing must change nothing.

    From the LoRAs themselves: the least squares of a warm start, on four samples, magnify rounding.
    """
    options = webui.get("/sdapi/v1/options").json()["cross_attention_optimization"]
    choices = webui.run("from modules import shared_items\nresult = shared_items.cross_attention_optimizations()")
    chosen = next((c for c in choices if c.startswith(option.split(" - ")[0])), None)
    assert chosen, choices
    webui.post("/sdapi/v1/options", json={"cross_attention_optimization": chosen})
    try:
        state = merge(
            webui, recipe("attention", memory="checkpointing" if option == "None" else "fast", **FROM_THE_LORAS)
        )
        assert state["state"] == "done", state
        assert state["result"]["memory"]["mode"] == ("checkpointing" if option == "None" else "fast")
    finally:
        webui.post("/sdapi/v1/options", json={"cross_attention_optimization": options})
    reference = merge(webui, recipe("attention-reference", **FROM_THE_LORAS))
    assert state["result"]["learned"]["error"] == pytest.approx(reference["result"]["learned"]["error"], rel=1e-2)
    merge(webui, recipe("attention-sum", method="direct", overwrite=True))
    ours, theirs, plain = (
        {key: delta.dense() for key, delta in read(webui.lora_dir / f"{name}.safetensors").deltas.items()}
        for name in ("attention", "attention-reference", "attention-sum")
    )
    # of all layers together: Adam moves a column whose gradient is nothing but rounding as far as any other, and how many
    # of these there are depends on the processor (less than .05 of the way on one, .08 on another)
    apart = torch.stack([(ours[key] - theirs[key]).norm() for key in theirs]).norm()
    moved = torch.stack([(theirs[key] - START * plain[key]).norm() for key in theirs]).norm()
    assert apart < 0.1 * moved


BAD_OUTPUTS = ["a/b", "a\\b", "..", "../up", "con", "none", "", " ", "random-style", "x:y", "<b>"]


@pytest.mark.parametrize("output", BAD_OUTPUTS)
def test_bad_output_names_are_refused(webui, loras, output):
    before = sorted(webui.lora_dir.rglob("*"))
    for route in ("merge", "preflight"):
        answer = webui.post(f"/ziplora/v1/{route}", json=recipe(output))
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]
    assert sorted(webui.lora_dir.rglob("*")) == before


def test_bad_recipes_and_files_are_refused_by_name(webui, loras):
    folder = webui.lora_dir
    (folder / "text.safetensors").write_text("this is not a LoRA")
    whole = loras["random-style"].read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    sd15 = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    }
    tensors = {}
    for key, (out, width) in sd15.items():
        tensors |= {f"{key}.lora_up.weight": torch.ones(out, 2), f"{key}.lora_down.weight": torch.ones(2, width)}
    save_file(tensors, folder / "sd15.safetensors")
    broken = load_file(loras["random-style"])
    broken[next(k for k in broken if k.endswith("up.weight"))].fill_(float("nan"))
    save_file(broken, folder / "broken.safetensors")
    webui.post("/sdapi/v1/refresh-loras")
    expected = {
        "text": "text.safetensors",
        "cut": "cut.safetensors",
        "sd15": "SD 1.5",
        "broken": "not finite",
        "random-subject": "same LoRA",
        "nobody": "no LoRA named",
    }
    for name, message in expected.items():
        body = recipe("never")
        body["parents"][1]["lora"] = name
        answer = webui.post("/ziplora/v1/merge", json=body)
        assert answer.status_code == 422, answer.text
        assert message in answer.json()["error"]
        assert answer.json()["error"].count(". ") >= 1  # the remedy
    for fields in ({"stepz": 3}, {"steps": 0}, {"lr": "fast"}, {"parents": []}, {"resolution": 100}):
        answer = webui.post("/ziplora/v1/merge", json=recipe("never") | fields)
        assert answer.status_code == 422, answer.text
        assert next(iter(fields)) in answer.json()["error"]
    body = recipe("never")
    body["parents"][0]["reference"] = ["/etc"]
    assert webui.post("/ziplora/v1/merge", json=body).status_code == 422
    assert not list(folder.glob("never*"))


def test_schema_and_unknown_jobs(webui):
    schema = webui.get("/ziplora/v1/schema").json()
    assert schema["properties"]["steps"]["default"] == 50
    assert webui.get("/ziplora/v1/jobs/none").status_code == 404
    assert webui.post("/ziplora/v1/jobs/none/stop").status_code == 404


ROUTES = [
    ("GET", "loras"),
    ("GET", "schema"),
    ("POST", "preflight"),
    ("POST", "merge"),
    ("GET", "jobs/x"),
    ("POST", "jobs/x/stop"),
]


def test_api_auth_guards_every_route(start_webui):
    with start_webui(flags=["--api-auth", "user:pass,other:word", "--medvram"]) as webui:
        for method, route in ROUTES:
            for auth in (None, ("user", "wrong"), ("nobody", "pass"), ("user", "word")):
                answer = webui.request(method, f"/ziplora/v1/{route}", auth=auth, json={} if method == "POST" else None)
                assert answer.status_code == 401, (route, auth)
            for auth in (("user", "pass"), ("other", "word")):
                answer = webui.request(method, f"/ziplora/v1/{route}", auth=auth, json={} if method == "POST" else None)
                assert answer.status_code != 401, (route, auth)
        # with --medvram parts of the model change places; the whole way once
        pipe = build_miniature()
        for name, fields in FILES.items():
            write_lora(webui.lora_dir / f"{name}.safetensors", pipe, **fields)
        webui.post("/sdapi/v1/refresh-loras")
        before, traces = webui.txt2img(SUBJECT, seed=2), webui.run(TRACES)
        state = merge(webui, recipe("medvram"))
        assert state["state"] == "done", state
        assert webui.run(TRACES) == traces
        assert np.array_equal(webui.txt2img(SUBJECT, seed=2), before)


def test_lowvram_merges_with_its_hooks_off_and_leaves_them_as_they_were(start_webui):
    """Its hooks would swap the weights' data between forward and backward; meanwhile ours fetch each block by itself."""
    with start_webui(flags=["--lowvram"]) as webui:
        pipe = build_miniature()
        for name, fields in FILES.items():
            write_lora(webui.lora_dir / f"{name}.safetensors", pipe, **fields)
        webui.post("/sdapi/v1/refresh-loras")
        before, traces = webui.txt2img(SUBJECT, seed=2), webui.run(TRACES)
        assert traces["moving"] > 10, "the WebUI's own hooks are there"
        state = merge(webui, recipe("low"))
        assert state["state"] == "done", state
        assert state["result"]["memory"] == {"mode": "offload", "at_once": 2, "needed": None, "free": None}
        assert state["result"]["learned"]["error"] != state["result"]["learned"]["error_plain_sum"]
        assert webui.run(TRACES) == traces
        assert np.array_equal(webui.txt2img(SUBJECT, seed=2), before)


def test_rank_split_is_subject_first(columns, loras):
    """`dyn` and later re-baking count on it."""
    file = columns
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    subject, style = (read(path).deltas[key] for path in loras.values())
    assert json.loads(file.metadata["ziplora.ranks"])["*"] == [subject.rank, style.rank]
    stack = Stack(file.deltas[key].up.float(), file.deltas[key].down.float(), (subject.rank, style.rank))
    first = stack.part(0).dense()
    m = (first * subject.dense()).sum(0) / subject.dense().square().sum(0)
    torch.testing.assert_close(first, subject.dense() * m, rtol=1e-2, atol=2e-3 * first.abs().max().item())


@pytest.mark.parametrize("button", ["interrupt", "skip"])
def test_a_preview_that_is_broken_off_is_not_saved_as_one(webui, loras, merged, button):
    """The sampler gives half a picture back when the WebUI's buttons are pressed."""
    whole = merge(webui, recipe("whole", sampler_steps=40, overwrite=True))
    assert whole["state"] == "done"
    pressed = []

    def press(job, state):
        if state.get("phase") == "preview" and not pressed:
            time.sleep(0.3)
            pressed.append(webui.post(f"/sdapi/v1/{button}"))

    state = merge(webui, recipe(f"broken-off-{button}", sampler_steps=40), watch=press)
    assert state["state"] == "done"
    assert (webui.lora_dir / f"broken-off-{button}.safetensors").is_file()
    preview = webui.lora_dir / f"broken-off-{button}.png"
    if preview.exists():  # skipped, and made again; or the press came too late
        assert np.array_equal(np.asarray(Image.open(preview)), np.asarray(Image.open(webui.lora_dir / "whole.png")))
    else:
        assert any("interrupted" in warning for warning in state["result"]["warnings"])


def test_a_stopped_overwrite_keeps_no_stale_preview(webui, loras, merged):
    assert merge(webui, recipe("restyled"))["state"] == "done"

    def stop(job, state):
        if state.get("phase") == "merge":
            webui.post(f"/ziplora/v1/jobs/{job}/stop")

    state = merge(webui, recipe("restyled", steps=500, seed=9, overwrite=True), watch=stop)
    assert state["state"] == "stopped"
    assert not (webui.lora_dir / "restyled.png").exists()


def test_bake_over_the_api(webui, loras, merged):
    body = {"lora": "while-loaded", "output": "baked", "subject": 0.5, "style": 1.5}
    merge(webui, recipe("while-loaded", overwrite=True))
    answer = webui.post("/ziplora/v1/bake", json=body)
    assert answer.status_code == 200, answer.text
    before, after = (read(webui.lora_dir / f"{name}.safetensors") for name in ("while-loaded", "baked"))
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ranks = json.loads(before.metadata["ziplora.ranks"])["*"]
    subject, style = (
        Stack(before.deltas[key].up.float(), before.deltas[key].down.float(), tuple(ranks)).part(i).dense()
        for i in (0, 1)
    )
    wanted = 0.5 * subject + 1.5 * style
    torch.testing.assert_close(after.deltas[key].dense(), wanted, rtol=2e-3, atol=2e-3 * wanted.abs().max().item())
    picture = webui.txt2img(f"{SUBJECT}<lora:baked:1>", seed=1, **PICTURE)
    assert not np.array_equal(picture, webui.txt2img(f"{SUBJECT}<lora:while-loaded:1>", seed=1, **PICTURE))
    for wrong in (
        {**body, "output": "../x"},
        {**body, "lora": "random-style", "output": "y"},
        {**body, "balance": 0},
        {},
    ):
        answer = webui.post("/ziplora/v1/bake", json=wrong)
        assert answer.status_code == 422, wrong
        assert answer.json()["error"]


IN_FULL_PRECISION = """
import hashlib
import numpy as np
import torch
from modules import devices, sd_vae_approx, shared
from ziplora_lib.hosts.webui import WebuiHost

names = ("dtype", "dtype_vae", "dtype_unet", "dtype_inference")
model, host, found = shared.sd_model, WebuiHost(), {n: getattr(devices, n) for n in names}


def state():
    weights = hashlib.sha256()
    for name, value in model.state_dict().items():
        weights.update(value.numpy().tobytes())
    said = [str(m.dtype) for m in (model, model.first_stage_model, model.model.diffusion_model)]
    return [weights.hexdigest(), said, str(next(model.first_stage_model.parameters()).dtype),
            [str(getattr(devices, n)) for n in names], sorted(sd_vae_approx.sd_vae_approx_models)]


try:
    model.half()
    for n in names:
        setattr(devices, n, torch.float16)
    sd_vae_approx.sd_vae_approx_models["x"] = None
    before = state()
    with host.exclusive("precision"), host.session(full_precision=True), host.resting():
        emptied = not sd_vae_approx.sd_vae_approx_models
    with host.exclusive("precision"), host.session(full_precision=True):
        latent = host.sample("a cat", 1, 256, 2, 5.0)
        picture = host.decode(latent)
        again = host.encode_picture(picture)
        with torch.no_grad():
            told = host.predict(latent, torch.tensor([500]), [host.encode("a cat", 256)])
        finite = [bool(torch.isfinite(t).all()) for t in (latent, again, told)]
        kinds = sorted({str(t.dtype) for t in model.state_dict().values() if t.is_floating_point()})
    result = [before, state(), finite, kinds, emptied, bool(np.asarray(picture).std() > 1)]
finally:
    sd_vae_approx.sd_vae_approx_models.clear()
    for n, value in found.items():
        setattr(devices, n, value)
    model.float()
"""


def test_a_model_in_half_precision_works_in_full_and_is_as_it_was(start_webui):
    """On a CPU, whose fp16 makes no pictures by itself: all that the WebUI casts by has to follow."""
    with start_webui() as webui:
        before, after, finite, kinds, emptied, drawn = webui.run(IN_FULL_PRECISION)
    assert before[2] == "torch.float16"
    assert after == before
    assert finite == [True] * 3
    assert kinds == ["torch.float32"]
    assert emptied
    assert drawn
