"""Whatever ends a job, and at whatever line: the live WebUI is as it was before, in every part that a job touches."""

import numpy as np
import pytest
import torch
from inside import INSIDE, KINDS
from kohya_files import write_lora
from safetensors.torch import load_file, save_file

from ziplora_lib.hosts.miniature import TEXT_2_WIDTH, TEXT_WIDTH, build_miniature

SUBJECT, STYLE = "a photo of sks dog", "a house in szn style"
OUTPUT = "state-merged"
PICTURE = {"prompt": SUBJECT, "seed": 5, "steps": 2, "width": 64, "height": 64}
WITH_LORA = {**PICTURE, "prompt": f"{SUBJECT}<lora:state-loaded:0.7>"}
EMBEDDING = "zzbundled"


def recipe(**fields) -> dict:
    """A merge as small as one can be that still goes through every phase."""
    return {
        "parents": [
            {"lora": "state-subject", "role": "subject", "prompt": SUBJECT},
            {"lora": "state-style", "role": "style", "prompt": STYLE},
        ],
        "output": OUTPUT,
        **dict(steps=2, resolution=64, samples=2, pictures=1, sampler_steps=1, balance_points=1, loss_guidance=2.0),
        **fields,
    }


def write_parents(folder) -> None:
    """A subject that brings an embedding, and a layer that is worked out on the model; a style; and one to be in a prompt."""
    pipe = build_miniature()
    write_lora(folder / "state-subject.safetensors", pipe, seed=1, rank=2, alpha=2.0, only="attn1_to_q")
    write_lora(folder / "state-style.safetensors", pipe, seed=2, rank=2, alpha=2.0, only="to_q")
    write_lora(folder / "state-loaded.safetensors", pipe, seed=3, rank=2, alpha=2.0, only="self_attn")
    path = folder / "state-subject.safetensors"
    tensors = load_file(path)
    layer = sorted(name.partition(".")[0] for name in tensors)[0]
    up, down = tensors.pop(f"{layer}.lora_up.weight"), tensors.pop(f"{layer}.lora_down.weight")
    tensors.pop(f"{layer}.alpha")
    tensors[f"{layer}.diff"] = up.float() @ down.float()
    for part, width in (("clip_l", TEXT_WIDTH), ("clip_g", TEXT_2_WIDTH)):
        tensors[f"bundle_emb.{EMBEDDING}.{part}"] = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})


@pytest.fixture(scope="module")
def parents(webui):
    write_parents(webui.lora_dir)
    webui.post("/sdapi/v1/refresh-loras")


@pytest.fixture(scope="module")
def usual(webui, parents) -> dict:
    """The merge without a failure: its phases, every line that it passes and how often, and its file."""
    told = attempt(webui)
    assert told["state"] == "done", told
    again = attempt(webui)
    assert again["file"] == told["file"]
    return again


RUN = """
result = inside.run(data["recipe"], data["at"], data["kind"], data["again"])
result["file"] = inside.forget(data["recipe"]["output"])
"""


def attempt(webui, at=None, kind: str = "Boom", again: bool = False, **fields) -> dict:
    """One merge with a failure in it, what has changed since before it, and the files that it saved, which are deleted."""
    return webui.run(INSIDE + RUN, recipe=recipe(**fields), at=at, kind=kind, again=again)


def spread(passed: dict[str, int], count: int) -> list[tuple[str, int]]:
    """Places all over the job: (line, which time); of lines that are passed often, also a later time."""
    places = [(line, times) for line, many in passed.items() for times in sorted({1, many // 2 + 1})]
    return places[:: max(1, len(places) // count)][:count]


def check(told: dict, usual: dict) -> None:
    """Recovered: nothing has changed, and there is the whole file or none."""
    assert told["sprung"], told
    assert told["changes"] == [], told
    files = {name: crc for name, crc in told["file"].items() if not name.endswith(".png")}
    saved = f"{OUTPUT}.safetensors"
    if saved in files and "begun again" not in str(told["warnings"]):  # more sparingly, which rounds otherwise
        assert files[saved] == usual["file"][saved], told
    else:
        assert not files or saved in files, told


def test_a_job_leaves_nothing_behind(webui, usual):
    assert usual["state"] == "done", usual
    assert usual["changes"] == []
    assert {"preflight", "open", "calibrate", "merge", "save", "preview"} <= set(usual["phases"])
    for file in ("webui.py", "webui_state.py", "job.py", "attach.py", "writer.py"):
        assert sum(file in line for line in usual["passed"]) > 10, file


@pytest.mark.parametrize("number", range(25))
def test_a_failure_at_any_line_leaves_nothing_behind(webui, usual, number):
    """A slice; `python tests/webui/soak.py state` takes every line."""
    kind = list(KINDS)[number % len(KINDS)]
    if number % 5 == 0:  # with a LoRA in the weights
        webui.txt2img(**WITH_LORA)
    check(attempt(webui, spread(usual["passed"], 25)[number], kind), usual)


def test_the_pictures_are_the_same_after_failures(webui, usual):
    alone, with_lora = webui.txt2img(**PICTURE), webui.txt2img(**WITH_LORA)
    for number, place in enumerate(spread(usual["passed"], 6)):
        check(attempt(webui, place, list(KINDS)[-number - 1]), usual)
        assert np.array_equal(webui.txt2img(**WITH_LORA), with_lora)
        assert np.array_equal(webui.txt2img(**PICTURE), alone)


ENTERING = """
from contextlib import ExitStack
from ziplora_lib.hosts import webui_state as state
from modules import shared
host, model = inside.host_of_tab(), shared.sd_model
every = {name: (model,) for name in ("bare", "by_itself", "usual", "frozen", "full_precision")}
every |= {"plain_attention": (), "off_device": (model, [model.first_stage_model]), "unhooked": (model.model,)}
before = inside.fingerprint()
result = {}
for name, given in every.items():
    with inside.Trap() as passed:
        with getattr(state, name)(*given):
            pass
    lines = list(passed.passed)
    wrong = []
    for line in lines:
        inside.bake_in()
        try:
            with inside.Trap((line, 1)), getattr(state, name)(*given):
                wrong.append("not raised at " + line)
        except inside.Boom:
            pass
    result[name] = [len(lines), wrong + inside.changes(before, inside.fingerprint())[:5]]
"""


def test_what_fails_half_way_into_a_change_is_put_back(webui, parents):
    webui.txt2img(**WITH_LORA)
    for name, (lines, wrong) in webui.run(INSIDE + ENTERING).items():
        assert lines >= 2, name
        assert wrong == [], name


RESTORING = """
from ziplora_lib.hosts import webui_state as state
from modules import shared
import sys
host, networks = inside.host_of_tab(), sys.modules["networks"]
before = inside.fingerprint()
kept, left = networks.load_networks, []
def load_networks(names, *rest):
    if left and left.pop():
        raise inside.Boom("in the restoring")
    return kept(names, *rest)
networks.load_networks = load_networks
try:
    with host.exclusive("restoring"), host.session():
        left.append(True)
except inside.Boom as error:
    result = [str(error)]
finally:
    networks.load_networks = kept
result.append(inside.changes(before, inside.fingerprint()))
"""


def test_what_cannot_be_put_back_keeps_nothing_else_from_it(webui, parents):
    webui.txt2img(**PICTURE)
    assert webui.run(INSIDE + RESTORING) == ["in the restoring", []]


# each leaves something behind in the midst of a job, as a careless change of ours would
LEAKS = {
    "a hook": "model.model.diffusion_model.register_forward_hook(lambda *_: None)",
    "a method": "model.model.diffusion_model.forward = model.model.diffusion_model.forward",
    "a flag": "next(model.parameters()).requires_grad_(not next(model.parameters()).requires_grad)",
    "a mode": "model.model.diffusion_model.train()",
    "a weight": "next(model.model.parameters()).data.view(-1)[0] += 1e-3",
    "a class": "import sgm.modules.attention as a; a.CrossAttention.forward = lambda *_: None",
    "a random number": "torch.rand(1)",
    "an attention": "from modules import sd_hijack; sd_hijack.model_hijack.optimization_method = 'x'",
    "a device": "from modules import devices; devices.unet_needs_upcast = not devices.unet_needs_upcast",
    "a LoRA": "import sys; sys.modules['networks'].load_networks(['state-loaded'], [1.0], [1.0], [None])",
    "an embedding": "from modules import sd_hijack as h; h.model_hijack.embedding_db.word_embeddings['x'] = None",
    "a setting": "shared.opts.data['CLIP_stop_at_last_layers'] = 2",
    "an interrupt": "shared.state.interrupted = True",
    "a task": "from modules import progress; progress.pending_tasks['x'] = 1",
    "a file": "open(shared.cmd_opts.lora_dir + '/x.part', 'w').close()",
    "a callback": "from modules import script_callbacks as c; c.callback_map['callbacks_cfg_denoised'].append(1)",
}
PLANT = """
import torch
from modules import shared
model = shared.sd_model
before = inside.fingerprint()
exec(data["leak"])
result = inside.changes(before, inside.fingerprint())
"""


def test_the_check_sees_what_it_should(start_webui):
    """Each leak is noticed, in a WebUI of its own: most cannot be mended."""
    with start_webui() as webui:
        write_parents(webui.lora_dir)
        webui.post("/sdapi/v1/refresh-loras")
        assert webui.run(INSIDE + PLANT, leak="") == []
        for name, leak in LEAKS.items():
            assert webui.run(INSIDE + PLANT, leak=leak), name
