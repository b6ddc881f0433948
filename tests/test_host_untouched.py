"""Invariant 3: after a job, however it ended, the same seed gives the same picture, and nothing of the model has changed."""

import random

import numpy as np
import pytest
import torch

from ziplora_lib import job
from ziplora_lib.drawing import draw, over_strengths
from ziplora_lib.drawing import recipe_of as drawing_recipe
from ziplora_lib.jobs import Job

ROOTS = ("unet", "text_encoder", "text_encoder_2", "vae")


def picture(host):
    return np.asarray(host.decode(host.sample("a photo of a red cat", 7, 64, 3, 5.0)))


def global_random_state():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def everything(host):
    """All that a job could leave behind: weights by value, the rest by identity."""
    found = {}
    for part in ROOTS:
        root = getattr(host.pipe, part)
        for name, module in root.named_modules():
            here = (part, name)
            found[here, "training"] = module.training
            found[here, "class"] = type(module)
            found[here, "hooks"] = [
                list(table.values()) for field, table in vars(module).items() if field.endswith("hooks")
            ]
            found[here, "forward"] = vars(module).get("forward")
            found[here, "checkpointing"] = getattr(module, "gradient_checkpointing", None)
        for name, parameter in root.named_parameters():
            found[part, name, "flags"] = (parameter.requires_grad, parameter.dtype, parameter.device, parameter.grad)
            found[part, name, "value"] = parameter.detach().clone().numpy().tobytes()
    found["random"] = global_random_state()
    return found


def changes(before, after):
    assert before.keys() == after.keys()
    return [key for key in before if before[key] != after[key]]


class Boom(RuntimeError):
    pass


def stop_in(phase, step=1):
    return lambda info: info["phase"] == phase and info.get("step", 0) >= step


def raise_in(phase, step=1):
    def callback(info):
        if info["phase"] == phase and info.get("step", 0) >= step:
            raise Boom(phase)

    return callback


ENDINGS = {
    "finished": (lambda info: None, "done"),
    "stopped in the calibration": (stop_in("calibrate"), "stopped"),
    "stopped late in the calibration": (stop_in("calibrate", 5), "stopped"),
    "stopped in the merge": (stop_in("merge", 2), "stopped"),
    "failed in the calibration": (raise_in("calibrate", 3), "failed"),
    "failed in the merge": (raise_in("merge", 2), "failed"),
    "failed while saving": (raise_in("save", 0), "failed"),
    "failed in the preview": (raise_in("preview", 0), "done"),
}


@pytest.mark.parametrize(
    ("ending", "state"),
    [*((ending, "as loaded") for ending in ENDINGS), ("finished", "odd"), ("failed in the merge", "odd")],
)
def test_the_model_is_as_it_was(host, recipe_of, ending, state):
    if state == "odd":  # what a user's other tools may have left, and must find again
        host.pipe.unet.train()
        host.pipe.unet.mid_block.eval()
        host.pipe.text_encoder.requires_grad_(False)
        host.pipe.unet.enable_gradient_checkpointing()
        host.pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    before_picture, before = picture(host), everything(host)  # transformers hangs hooks of its own on the first picture
    callback, wanted = ENDINGS[ending]
    run = Job.merge(recipe_of(memory="offload" if state == "as loaded" else "checkpointing", balance_points=3))
    run.run(host, callback)
    assert run.state == wanted, run.error
    assert changes(before, everything(host)) == []
    assert np.array_equal(picture(host), before_picture)


@pytest.mark.parametrize("nth", [1, 3, 8])
def test_an_error_inside_the_model_is_survived(host, recipe_of, monkeypatch, nth):
    before_picture, before = picture(host), everything(host)
    calls, predict = [], host.predict

    def failing(*args):
        calls.append(1)
        if len(calls) == nth:
            raise Boom("a broken model")
        return predict(*args)

    monkeypatch.setattr(host, "predict", failing)
    run = Job.merge(recipe_of())
    run.run(host)
    assert run.state == "failed"
    assert "a broken model" in run.error
    assert len(calls) == nth
    assert changes(before, everything(host)) == []
    assert np.array_equal(picture(host), before_picture)
    assert not host.destination("merged").exists()


def test_a_keyboard_interrupt_passes_through_and_leaves_no_trace(host, recipe_of):
    before_picture, before = picture(host), everything(host)

    def interrupt(info):
        if info["phase"] == "merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(recipe_of(), host, interrupt)
    assert changes(before, everything(host)) == []
    assert np.array_equal(picture(host), before_picture)
    assert not list(host.folder.iterdir())


def test_the_check_sees_what_it_should(host):
    """A hook, a flag, a mode, a weight and a random number: each is noticed."""
    before = everything(host)

    def changed():
        return changes(before, everything(host))

    assert changed() == []
    handle = host.pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    assert changed()
    handle.remove()
    host.pipe.vae.train()
    assert changed()
    host.pipe.vae.eval()
    host.pipe.unet.conv_in.weight.requires_grad_(not host.pipe.unet.conv_in.weight.requires_grad)
    assert changed()
    host.pipe.unet.conv_in.weight.requires_grad_(not host.pipe.unet.conv_in.weight.requires_grad)
    host.pipe.unet.enable_gradient_checkpointing()
    assert changed()
    host.pipe.unet.disable_gradient_checkpointing()
    assert changed() == []
    state = torch.get_rng_state()
    torch.rand(1)
    assert changed()
    torch.set_rng_state(state)
    with torch.no_grad():
        host.pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert changed()


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_a_sheet_of_a_merged_lora_leaves_no_trace(host, recipe_of, ending):
    job.run(recipe_of(method="direct"), host)
    merged = host.peek("merged")
    plan = over_strengths(merged, drawing_recipe(merged), [1], [0.5, 1.5], [1.0])
    before_picture, before = picture(host), everything(host)
    callback = {"finished": lambda _: None, "stopped": stop_in("draw", 1), "failed": raise_in("draw", 1)}[ending]
    if ending == "failed":
        with pytest.raises(Boom):
            draw(host, "merged", plan, callback)
    else:
        assert draw(host, "merged", plan, callback).stopped == (ending == "stopped")
    assert changes(before, everything(host)) == []
    assert np.array_equal(picture(host), before_picture)
