"""The saved file in somebody else's hands: diffusers and peft give the ΔW that the coefficients say, layer by layer."""

import pytest
import torch
from loras import dense_deltas

from ziplora_lib import job
from ziplora_lib.job import run
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.methods import METHODS

PARTS = ("unet", "text_encoder", "text_encoder_2")
# half a unit in the last place, relative, and half the smallest number
ROUNDING = {"fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134), "fp32": (2.0**-24, 2.0**-150)}


@pytest.fixture
def learned(monkeypatch):
    """The coefficients of the runs that follow, as the method returned them: {layer key: (2, columns)}."""
    kept = {}

    def recording(*args):
        merged = METHODS_ZIPLORA(*args)
        kept.update(merged.coefficients)
        return merged

    METHODS_ZIPLORA = METHODS["ziplora"]  # noqa: N806
    monkeypatch.setitem(job.METHODS, "ziplora", recording)
    return kept


def expected(pair_files, strengths, coefficients):
    """Eq. 2 in float64 from the parents' own tensors: {layer key: ΔW_m}."""
    total = {}
    for i, (file, strength) in enumerate(zip(pair_files, strengths)):
        for name, delta in dense_deltas(file).items():
            key = layer_key(name)
            delta = strength * delta
            if key in coefficients:
                delta = delta * coefficients[key][i].double().reshape(delta.shape[1:])
            total[key] = total.get(key, 0) + delta
    return total


def peft_deltas(pipe, path):
    """ΔW of every layer as diffusers loads the file and peft applies it."""
    pytest.importorskip("peft")
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="merged")
    return {
        layer_key(f"{part}.{name}"): module.get_delta_weight("merged").detach()
        for part in PARTS
        for name, module in getattr(pipe, part).named_modules()
        if hasattr(module, "get_delta_weight") and "merged" in module.lora_A
    }


def rounding_bound(path, dtype):
    """By layer: how far ΔW may be off when each factor was rounded once to dtype, and products are summed in fp32."""
    unit, least = ROUNDING[dtype]
    bounds = {}
    for key, delta in read(path).deltas.items():
        # alpha / rank, one more product in fp32 on either side, is no rounding to dtype
        up, down = delta.up.double().abs() * delta.scale, delta.down.double().abs().flatten(1)
        slack = 2 * unit + unit**2 + (delta.rank + 8) * 2.0**-24
        absolute = least * (up.sum(1, keepdim=True) + delta.scale * (down.sum(0, keepdim=True) + delta.rank * least))
        bounds[key] = (slack * 1.01 * (up @ down) + absolute).reshape(delta.shape)
    return bounds


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("method", ["ziplora", "direct"])
def test_diffusers_loads_the_delta_that_the_coefficients_say(host, pair_files, recipe_of, learned, dtype, method):
    recipe = recipe_of(dtype=dtype, method=method, objective="paper")
    recipe.parents[0].strength, recipe.parents[1].strength = 0.8, 1.3
    path = host.destination(recipe.output)
    result = run(recipe, host)
    assert result.file == str(path)
    wanted = expected(pair_files, (0.8, 1.3), learned)
    assert (len(learned) > 20) == (method == "ziplora")
    given, bounds = peft_deltas(host.pipe, path), rounding_bound(path, dtype)
    assert given.keys() == wanted.keys() == bounds.keys()
    for key, delta in wanted.items():
        error = (given[key].double().reshape(delta.shape) - delta).abs()
        assert (error <= bounds[key].reshape(delta.shape)).all(), (key, float(error.max()), float(delta.abs().max()))
        assert float(error.max()) < (0.02 if dtype == "bf16" else 0.003) * float(delta.abs().max())


def test_diffusers_predicts_what_the_merge_predicts(host, recipe_of):
    """The same prediction from peft's layers on the saved file as from ours attached."""
    from ziplora_lib.merge.attach import attach
    from ziplora_lib.merge.pairing import pair

    recipe = recipe_of(dtype="fp32")
    path = host.destination(recipe.output)
    run(recipe, host)
    lora = read(path)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 800])

    def predict():
        with torch.no_grad():
            return host.predict(x, t, [host.encode("a photo of sks cat", 64), host.encode("", 64)])

    slots = host.slots(list(lora.deltas))
    bare = predict()
    with attach(slots, pair([lora], [1.0], {k: s.shape for k, s in slots.items()}).stacks) as router:
        router.merged()
        ours = predict()
    peft_deltas(host.pipe, path)
    theirs = predict()
    assert float((ours - bare).abs().max()) > 0.01
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
