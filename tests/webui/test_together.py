"""ZipLoRA beside what else goes on in a WebUI: generations, other jobs, settings, checkpoints, files, other extensions."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import requests
from conftest import ROOT, WEBUI_PYTHON, running_webui
from inside import INSIDE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from soak import checked, mixed, prepared
from test_merge import merge
from test_state import PICTURE, SUBJECT, recipe, write_parents

from ziplora_lib.lora.reader import tensor_sha256

LOADED = {**PICTURE, "prompt": f"{SUBJECT}<lora:state-loaded:0.7>"}


# --- helpers ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(webui, method: str = "progress", **when):
    """The next job waits at that call of the host's, until the block says `go()`, or ends."""
    webui.run(INSIDE + "inside.gates.append(inside.Gate(data['method'], data['when']))", method=method, when=when)

    class Held:
        @staticmethod
        def reached():
            assert webui.run(INSIDE + "result = inside.gates[-1].reached()")

        @staticmethod
        def go():
            webui.run(INSIDE + "result = [gate.open() for gate in inside.gates] and inside.gates.clear()")

    try:
        yield Held
    finally:
        Held.go()


class Meanwhile(threading.Thread):
    """A request in a thread of its own; `got()` waits for its result."""

    def __init__(self, webui, call):
        super().__init__(daemon=True)
        self._webui, self._call, self._result = replace(webui, session=requests.Session()), call, None
        self._webui.session.trust_env = False
        self.start()

    def run(self):
        self._result = self._call(self._webui)

    def got(self):
        self.join(300)
        assert not self.is_alive()
        return self._result


def begin(webui, **fields) -> str:
    answer = webui.post("/ziplora/v1/merge", json=recipe(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()["job"]


def ended(webui, job: str) -> dict:
    for _ in range(3000):
        state = webui.get(f"/ziplora/v1/jobs/{job}").json()
        if state["state"] not in ("queued", "running"):
            return state
        time.sleep(0.05)
    raise AssertionError(f"the job did not end: {state}")


def waiting(webui, count: int) -> None:
    """Until that many tasks wait in the WebUI's queue."""
    for _ in range(600):
        if len(webui.get("/internal/pending-tasks").json()["tasks"]) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("nothing queued up")


def saved(webui, output: str) -> bytes:
    return (webui.lora_dir / f"{output}.safetensors").read_bytes()


def traces(webui) -> dict:
    """Takes a fingerprint there, or says what has changed since the last one."""
    return webui.run(
        INSIDE + "now, before = inside.fingerprint(), vars(inside).get('before')\n"
        "now = {name: value for name, value in now.items() if 'chance' not in name}\n"
        "result = [] if before is None else inside.without_output(inside.changes(before, now), before, now, 'together')\n"
        "inside.before = None if before else now"
    )


@pytest.fixture(scope="module")
def webui(start_webui):
    """One of its own: whatever goes wrong here, the other tests' stays."""
    with start_webui() as running:
        yield running


@pytest.fixture(scope="module")
def alone(webui) -> dict:
    """What is right: pictures and a merged file, made with nothing else going on."""
    write_parents(webui.lora_dir)
    webui.post("/sdapi/v1/refresh-loras")
    # the first change of this setting leaves SDXL's VAE another attention for good, that of ldm
    for option in ("V1 - original v1", "Automatic"):
        webui.post("/sdapi/v1/options", json={"cross_attention_optimization": option})
    state = merge(webui, recipe(output="together"))
    assert state["state"] == "done", state
    body = tensor_sha256(webui.lora_dir / "together.safetensors")
    pictures = {"loaded": webui.txt2img(**LOADED), "picture": webui.txt2img(**PICTURE)}
    webui.run(INSIDE + "inside.first = inside.fingerprint()")
    return {**pictures, "body": body}


def body(webui, output: str) -> str:
    return tensor_sha256(webui.lora_dir / f"{output}.safetensors")


def right(webui, alone) -> None:
    """The WebUI is as it was in the beginning, but for what pictures themselves leave behind."""
    draws_right(webui, alone)
    changed = webui.run(INSIDE + "result = inside.changes(inside.first, inside.fingerprint())")
    # settings have other words for the same once they were saved; a job that could not save keeps what it has learned
    assert [line for line in changed if not line.startswith(("files", "chance", "settings", "scratch"))] == []


def draws_right(webui, alone) -> None:
    assert np.array_equal(webui.txt2img(**LOADED), alone["loaded"])
    assert np.array_equal(webui.txt2img(**PICTURE), alone["picture"])


@pytest.fixture
def untouched(webui, alone):
    """What a test leaves in the WebUI is what it found."""
    webui.txt2img(**PICTURE)
    traces(webui)
    yield
    assert traces(webui) == []
    right(webui, alone)


# --- the queue --------------------------------------------------------------------------------------------


def test_jobs_and_generations_take_turns_in_the_order_in_which_they_came(webui, alone):
    with held(webui, phase="merge") as gate:
        first = begin(webui, output="turn-1", overwrite=True)
        gate.reached()
        picture = Meanwhile(webui, lambda w: w.txt2img(**PICTURE, force_task_id="task(one)"))
        waiting(webui, 1)
        second = begin(webui, output="turn-2", overwrite=True)
        waiting(webui, 2)
        loaded = Meanwhile(webui, lambda w: w.txt2img(**LOADED, force_task_id="task(two)"))
        waiting(webui, 3)
        third = begin(webui, output="turn-3", overwrite=True)
        waiting(webui, 4)
        assert {webui.get(f"/ziplora/v1/jobs/{job}").json()["state"] for job in (second, third)} == {"queued"}
    for job in (first, second, third):
        assert ended(webui, job)["state"] == "done"
    assert np.array_equal(picture.got(), alone["picture"])
    assert np.array_equal(loaded.got(), alone["loaded"])
    assert [body(webui, f"turn-{n}") for n in (1, 2, 3)] == [alone["body"]] * 3
    finished = webui.run("from modules import progress\nresult = progress.finished_tasks[-5:]")
    assert finished == [f"ziplora {first}", "task(one)", f"ziplora {second}", "task(two)", f"ziplora {third}"]


@pytest.mark.parametrize("how", ["our stop", "the WebUI's interrupt", "the WebUI's stop after this picture"])
def test_what_stops_a_job_does_not_hit_the_generation_behind_it(webui, alone, untouched, how):
    with held(webui, phase="calibrate") as gate:
        job = begin(webui, output="together", overwrite=True)
        gate.reached()
        picture = Meanwhile(webui, lambda w: w.txt2img(**LOADED))
        waiting(webui, 1)
        if how == "our stop":
            webui.post(f"/ziplora/v1/jobs/{job}/stop")
        elif how == "the WebUI's interrupt":
            webui.post("/sdapi/v1/interrupt")
        else:
            webui.run("from modules import shared\nshared.state.stop_generating()")
    state = ended(webui, job)
    assert state["state"] == "stopped"
    assert "nothing was saved" in state["error"]
    assert np.array_equal(picture.got(), alone["loaded"])
    webui.txt2img(**PICTURE)


def test_an_interrupted_generation_does_not_stop_the_job_behind_it(webui, alone):
    long = {**PICTURE, "steps": 150}
    picture = Meanwhile(webui, lambda w: w.txt2img(**long))
    for _ in range(600):
        if webui.get("/sdapi/v1/progress").json()["state"]["sampling_step"] > 0:
            break
        time.sleep(0.02)
    job = begin(webui, output="behind", overwrite=True)
    webui.post("/sdapi/v1/interrupt")
    assert ended(webui, job)["state"] == "done"
    assert body(webui, "behind") == alone["body"]
    assert not np.array_equal(picture.got(), alone["picture"])


def test_a_mix_of_everything_from_several_clients(webui, alone):
    """A slice of the soak: `python tests/webui/soak.py` takes hundreds."""
    told = checked(mixed(webui, prepared(webui), 12, clients=3))
    assert told["wrong"] == []
    assert told["done"] >= 12


# --- settings and checkpoints -----------------------------------------------------------------------------


def test_settings_changed_meanwhile_wait_for_the_next_generation(webui, alone):
    found = webui.get("/sdapi/v1/options").json()
    changed = {"hypertile_enable_unet": True, "token_merging_ratio": 0.5, "CLIP_stop_at_last_layers": 1}
    try:
        with held(webui, phase="calibrate") as gate:
            job = begin(webui, output="together", overwrite=True)
            gate.reached()
            webui.post("/sdapi/v1/options", json=changed)
            # these two wait for the job, as they do for a generation
            other = Meanwhile(
                webui, lambda w: w.post("/sdapi/v1/options", json={"cross_attention_optimization": "V1 - original v1"})
            )
            refreshed = Meanwhile(webui, lambda w: w.post("/sdapi/v1/refresh-checkpoints"))
            assert webui.post("/sdapi/v1/refresh-loras").status_code == 200
        state = ended(webui, job)
        assert state["state"] == "done", state
        assert body(webui, "together") == alone["body"]
        assert [thread.got().status_code for thread in (other, refreshed)] == [200, 200]
    finally:
        names = [*changed, "cross_attention_optimization"]
        webui.post("/sdapi/v1/options", json={name: found[name] for name in names})
    right(webui, alone)


CHANGED = "The checkpoint was changed or unloaded while this was running"


@pytest.fixture(scope="module")
def two(tmp_path_factory, sgm_checkpoint):
    """A WebUI with two checkpoints of one kind, and what is right with each."""
    folder = tmp_path_factory.mktemp("two")
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    first.symlink_to(sgm_checkpoint)
    tensors = load_file(sgm_checkpoint)
    save_file({name: t * 1.02 if name.startswith("model.diffusion") else t for name, t in tensors.items()}, second)
    for path in (first, second):
        path.with_suffix(".yaml").symlink_to(sgm_checkpoint.with_suffix(".yaml"))
    with running_webui(tmp_path_factory.mktemp("webui-two") / "data", first) as webui:
        write_parents(webui.lora_dir)
        webui.post("/sdapi/v1/refresh-loras")
        pictures = {}
        for path in (second, first):
            load(webui, path.name)
            pictures[path.name] = webui.txt2img(**LOADED)
        state = merge(webui, recipe(output="together"))
        assert state["state"] == "done", state
        yield webui, pictures, body(webui, "together")


def load(webui, name: str) -> None:
    assert webui.post("/sdapi/v1/options", json={"sd_model_checkpoint": name}).status_code == 200


def test_a_checkpoint_picked_meanwhile_is_loaded_after_the_job(two):
    webui, pictures, merged = two
    with held(webui, phase="merge") as gate:
        job = begin(webui, output="together", overwrite=True)
        gate.reached()
        picked = Meanwhile(webui, lambda w: load(w, "second.safetensors"))
        # these do not wait; on a CPU they move nothing
        for route in ("unload-checkpoint", "reload-checkpoint"):
            assert webui.post(f"/sdapi/v1/{route}").status_code == 200
    assert ended(webui, job)["state"] == "done"
    picked.got()
    assert body(webui, "together") == merged
    assert np.array_equal(webui.txt2img(**LOADED), pictures["second.safetensors"])
    load(webui, "first.safetensors")
    assert np.array_equal(webui.txt2img(**LOADED), pictures["first.safetensors"])


# what another extension may do, which does not wait
SWITCH = """
from modules import sd_models, sd_models_config, shared
info = sd_models.get_closet_checkpoint_match("second")
if data["how"] == "into the same model":  # as the WebUI does where both have one configuration
    shared.sd_model.used_config = sd_models_config.find_checkpoint_config(None, info)
shared.opts.data["sd_checkpoints_limit"] = 2 if data["how"] == "as a second model" else 1
before = id(shared.sd_model)
sd_models.reload_model_weights(info=info)
result = [id(shared.sd_model) == before, len(sd_models.model_data.loaded_sd_models)]
"""
ONE_MODEL = """
from modules import sd_models, shared
shared.opts.data["sd_checkpoints_limit"] = 1
del sd_models.model_data.loaded_sd_models[1:]
"""
HOW = {"into the same model": [True, 1], "in place of the model": [False, 1], "as a second model": [False, 2]}


# on all models that are kept
HOOKS = """
from modules import sd_models
modules = [m for model in sd_models.model_data.loaded_sd_models for m in model.modules()]
result = sum(len(m._forward_hooks) + ("forward" in vars(m)) for m in modules)
"""


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("phase", ["calibrate", "merge"])
def test_a_checkpoint_changed_under_a_job_is_noticed(two, phase, how):
    webui, pictures, _ = two
    files = sorted(webui.lora_dir.iterdir())
    with held(webui, phase=phase) as gate:
        job = begin(webui, output="changed")
        gate.reached()
        assert webui.run(SWITCH, how=how) == HOW[how]
    state = ended(webui, job)
    assert state["state"] == "failed"
    assert CHANGED in state["error"]
    assert sorted(webui.lora_dir.iterdir()) == files
    assert webui.run(HOOKS) == 0
    webui.run("from modules import shared\nshared.opts.data['sd_model_checkpoint'] = 'second.safetensors'")
    assert np.array_equal(webui.txt2img(**LOADED), pictures["second.safetensors"])
    load(webui, "first.safetensors")
    assert np.array_equal(webui.txt2img(**LOADED), pictures["first.safetensors"])
    webui.run(ONE_MODEL)


UNLOAD = """
import torch
from modules import shared
modules = list(shared.sd_model.model.modules())
inside.lost = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
for m, name, p in inside.lost:
    m._parameters[name] = torch.nn.Parameter(p.detach().to("meta"), requires_grad=False)
"""


def test_a_model_unloaded_under_a_job_is_noticed(webui, alone, untouched):
    """As on a GPU, where the WebUI moves it off the device at once."""
    with held(webui, phase="merge") as gate:
        job = begin(webui, output="together", overwrite=True)
        gate.reached()
        webui.run(INSIDE + UNLOAD)
    state = ended(webui, job)
    webui.run(INSIDE + "for m, name, p in inside.lost:\n    m._parameters[name] = p\ninside.lost = None")
    assert state["state"] == "failed"
    assert CHANGED in state["error"]


# --- files ------------------------------------------------------------------------------------------------


def told_of_parents(path) -> list[str]:
    """The hashes of its parents that a merged file tells."""
    with safe_open(str(path), "pt") as file:
        return [parent["sha256"] for parent in json.loads(file.metadata()["ziplora.parents"])]


READ_AND_TRUNCATE = """
import sys
from pathlib import Path
from ziplora_lib.lora.reader import read
path = Path(sys.argv[1])
lora = read(path)
with path.open("r+b") as file:
    file.truncate(100)
print([float(delta.up.float().sum()) for delta in lora.deltas.values()][:1], lora.embeddings and "read")
"""


@pytest.fixture(scope="module")
def read_whole(tmp_path_factory) -> None:
    """A LoRA that was read is in memory whole, in the WebUI's own Python too: what is only mapped ends with a bus error."""
    folder = tmp_path_factory.mktemp("read")
    write_parents(folder)
    command = [str(WEBUI_PYTHON), "-c", READ_AND_TRUNCATE, str(folder / "state-subject.safetensors")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.returncode}: a file that is cut while its LoRA is in use ends the process"


@pytest.mark.parametrize("how", ["truncated", "overwritten in place", "replaced", "deleted"])
@pytest.mark.parametrize("phase", ["calibrate", "merge"])
def test_a_parents_file_that_changes_after_it_was_read_changes_nothing(webui, alone, read_whole, how, phase):
    path = webui.lora_dir / "state-subject.safetensors"
    kept, digest = path.read_bytes(), tensor_sha256(path)
    try:
        with held(webui, phase=phase) as gate:
            job = begin(webui, output="together", overwrite=True)
            gate.reached()
            if how == "truncated":
                with path.open("r+b") as file:
                    file.truncate(100)
            elif how == "overwritten in place":
                with path.open("r+b") as file:
                    file.seek(len(kept) // 4)
                    file.write(bytes(len(kept) // 2))
            else:
                path.unlink()
                if how == "replaced":
                    path.write_bytes((webui.lora_dir / "state-style.safetensors").read_bytes())
        state = ended(webui, job)
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(kept)
    assert state["state"] == "done", state
    assert body(webui, "together") == alone["body"]
    assert told_of_parents(webui.lora_dir / "together.safetensors")[0] == digest
    webui.post("/sdapi/v1/refresh-loras")


def test_a_parent_that_changes_between_two_readings_is_noticed(webui, alone, untouched):
    """What the model has to work out is read a second time, by the Lora extension."""
    path = webui.lora_dir / "state-subject.safetensors"
    kept = path.read_bytes()
    times = path.stat()
    try:
        with held(webui, method="session") as gate:
            job = begin(webui, output="together", overwrite=True)
            gate.reached()
            path.write_bytes(kept[:-4] + bytes((0, 0, 0, 1)))
        state = ended(webui, job)
    finally:
        path.write_bytes(kept)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert state["state"] == "failed"
    assert "state-subject.safetensors: was changed, moved or deleted while it was being read" in state["error"]


def test_a_folder_deleted_during_the_job_is_said(webui, alone, untouched):
    webui.post("/sdapi/v1/options", json={"ziplora_folder": "new ones"})
    try:
        with held(webui, phase="merge") as gate:
            job = begin(webui, output="homeless")
            gate.reached()
            shutil.rmtree(webui.lora_dir / "new ones")
        state = ended(webui, job)
    finally:
        webui.post("/sdapi/v1/options", json={"ziplora_folder": ""})
    assert state["state"] == "failed"
    assert "does not exist" in state["error"]
    assert not (webui.lora_dir / "new ones").exists()


def test_an_overwritten_lora_that_is_in_the_weights_is_used_at_once(webui, alone):
    """Baking does not unload it, as a merge does: the layers would keep the old one under the same name and strength."""
    bake = {"lora": "together", "output": "in-weights", "subject": 2.0, "style": 0.0}
    assert webui.post("/ziplora/v1/bake", json=bake).status_code == 200
    prompt = {**PICTURE, "prompt": f"{SUBJECT}<lora:in-weights:1>"}
    first = webui.txt2img(**prompt)
    assert np.array_equal(webui.txt2img(**prompt), first)
    again = {**bake, "subject": 0.0, "style": 2.0, "overwrite": True}
    assert webui.post("/ziplora/v1/bake", json=again).status_code == 200
    second = webui.txt2img(**prompt)
    assert webui.post("/ziplora/v1/bake", json={**again, "output": "in-weights-2"}).status_code == 200
    wanted = webui.txt2img(**{**PICTURE, "prompt": f"{SUBJECT}<lora:in-weights-2:1>"})
    assert not np.array_equal(second, first)
    assert np.array_equal(second, wanted)


LISTING = """
import threading
from ziplora_lib.hosts.webui import WebuiHost
host, wrong, running = inside.host_of_tab(), [], [True]


def refresh():
    while running:
        host.refresh()


def look():
    try:
        for _ in range(100):
            host.listing(), host.loras()
    except Exception as error:
        wrong.append(repr(error))


refreshing = threading.Thread(target=refresh)
looking = [threading.Thread(target=look) for _ in range(3)]
for thread in (refreshing, *looking):
    thread.start()
for thread in looking:
    thread.join()
running.clear()
refreshing.join()
result = wrong
"""


def test_the_list_can_be_looked_at_while_it_is_refreshed(webui, alone):
    assert webui.run(INSIDE + LISTING) == []


# --- other extensions -------------------------------------------------------------------------------------

UNET = "from modules import shared\nunet, undo = shared.sd_model.model.diffusion_model, []\ninside.undo = undo\n"
# what generations that broke off leave behind, and what some extensions leave behind for good
HUNG_ON = {
    "the UNet's forward (ControlNet)": """
kept = unet.forward
unet.forward = lambda *args, **kw: kept(*args, **kw) * 1.5
undo.append(lambda: vars(unet).pop("forward"))
""",
    "attention (NegPiP)": """
for name, module in unet.named_modules():
    if name.endswith("attn2"):
        module.forward = lambda x, *args, kept=module.forward, **kw: kept(x, *args, **kw) * 0.5
        undo.append(lambda module=module: vars(module).pop("forward"))
""",
    "a hook before the UNet": """
undo.append(unet.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:])).remove)
""",
    "a hook on a text encoder": """
encoder = shared.sd_model.conditioner.embedders[0].wrapped.transformer.text_model.encoder.layers[0]
undo.append(encoder.register_forward_hook(lambda module, args, out: (out[0] * 2, *out[1:])).remove)
""",
    "the UNet's cat (FreeU)": """
from modules import sd_hijack_unet as h
kept = h.th.cat
h.th.cat = lambda tensors, *args, **kw: kept([t * 1.2 for t in tensors], *args, **kw)
undo.append(lambda: vars(h.th).pop("cat"))
""",
    "the sampler's callbacks": """
from modules import script_callbacks as c
def denoiser(params): params.x = params.x * 1.5
def denoised(params): params.x.mul_(0.5)
c.on_cfg_denoiser(denoiser)
c.on_cfg_denoised(denoised)
undo.append(lambda: c.remove_callbacks_for_function(denoiser))
undo.append(lambda: c.remove_callbacks_for_function(denoised))
""",
    "tiling": """
from modules import sd_hijack as h
h.model_hijack.apply_circular(True)
undo.append(lambda: h.model_hijack.apply_circular(False))
""",
    "Hypertile": """
import hypertile
model = shared.sd_model.model
hypertile.hypertile_hook_model(model, 64, 64, enable=True, tile_size_max=32, swap_size=2, is_sdxl=True)
found = [m for m in model.modules() if hasattr(m, "__webui_hypertile_params")]
def off():
    delattr(model, "__webui_hypertile_layers")
    for m in found:
        delattr(m, "__webui_hypertile_params")
        vars(m).pop("forward")
undo.append(off)
""",
}


# prompts are not encoded again while they stay the same
ENCODE_AGAIN = """
from modules import processing
processing.StableDiffusionProcessing.cached_c = [None, None]
processing.StableDiffusionProcessing.cached_uc = [None, None]
"""


@pytest.mark.parametrize("what", HUNG_ON)
def test_what_another_extension_has_left_on_the_model_is_not_learned_and_stays(webui, alone, what):
    webui.run(INSIDE + UNET + HUNG_ON[what] + ENCODE_AGAIN)
    try:
        touched = None if what in ("tiling", "the sampler's callbacks") else webui.txt2img(**PICTURE)
        traces(webui)
        state = merge(webui, recipe(output="together", overwrite=True))
        assert state["state"] == "done", state
        assert traces(webui) == []
        if touched is not None:
            assert np.array_equal(webui.txt2img(**PICTURE), touched)
    finally:
        webui.run(INSIDE + "for f in inside.undo:\n    f()" + ENCODE_AGAIN)
    assert body(webui, "together") == alone["body"]
    right(webui, alone)


TOMESD = """
import tomesd
from modules import shared
tomesd.apply_patch(shared.sd_model, ratio=0.5, use_rand=False)
"""


def test_another_extensions_token_merging_is_refused_by_name(webui, alone):
    webui.run(TOMESD)
    try:
        answer = webui.post("/ziplora/v1/merge", json=recipe(output="together", overwrite=True))
    finally:
        webui.run("import tomesd\nfrom modules import shared\ntomesd.remove_patch(shared.sd_model)")
    assert answer.status_code == 422
    assert "token merging" in answer.json()["error"]
    right(webui, alone)


@pytest.mark.parametrize("setting", [{"token_merging_ratio": 0.5}, {"hypertile_enable_unet": True}])
def test_a_generation_with_a_setting_on_leaves_the_next_merge_as_it_is(webui, alone, setting):
    found = webui.get("/sdapi/v1/options").json()
    try:
        webui.post("/sdapi/v1/options", json=setting)
        touched = webui.txt2img(**PICTURE)
        if "hypertile_enable_unet" in setting:  # on, it is refused
            assert webui.post("/ziplora/v1/merge", json=recipe(output="together", overwrite=True)).status_code == 422
            webui.post("/sdapi/v1/options", json={name: found[name] for name in setting})
        state = merge(webui, recipe(output="together", overwrite=True))
        assert state["state"] == "done", state
        assert body(webui, "together") == alone["body"]
        webui.post("/sdapi/v1/options", json=setting)
        assert np.array_equal(webui.txt2img(**PICTURE), touched)
    finally:
        webui.post("/sdapi/v1/options", json={name: found[name] for name in setting})
    draws_right(webui, alone)  # Hypertile's own wrappers stay on the model
