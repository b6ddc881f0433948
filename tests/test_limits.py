"""Invariant 2 on model outputs: m = 1 is the plain sum, (1, 0) the subject alone, (0, 1) the style alone."""

import copy
from functools import partial

import pytest
import torch
from loras import dense_deltas

from ziplora_lib.job import run
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import read
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import attach
from ziplora_lib.merge.pairing import pair

PROMPT = "a photo of sks cat in szn style"


def output(host):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return host.predict(x, torch.tensor([150, 900]), [host.encode(PROMPT, 64), host.encode("", 64)])


@pytest.fixture
def dense_output(pair_files):
    """dense_output(host, w_c, w_s): with W + w_c ΔW_c + w_s ΔW_s for weights, ΔW from the files, text encoders too."""
    deltas = [{layer_key(name): delta for name, delta in dense_deltas(file).items()} for file in pair_files]

    def make(host, *weights):
        changed = copy.deepcopy(host)
        for key, slot in changed.slots([*deltas[0], *deltas[1]]).items():
            for weight, delta in zip(weights, deltas):
                if key in delta:
                    slot.module.weight.data += (weight * delta[key]).reshape(slot.shape).float()
        return output(changed)

    return make


@pytest.fixture
def attached(host, pair_files):
    """Both LoRAs on the host: (router, pairing)."""
    loras = [read(file) for file in pair_files]
    slots = host.slots([key for lora in loras for key in lora.deltas])
    pairing = pair(loras, [1.0, 1.0], {key: slot.shape for key, slot in slots.items()})
    assert slots.keys() == pairing.stacks.keys()
    with attach(slots, pairing.stacks) as router:
        yield router, pairing


def close(a, b):
    # fp32 through some hundred layers, in another order of sums
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4 * float(b.abs().max()))


def constant(pairing, m_c, m_s):
    """Coefficients on every layer, not only the learned ones: Eq. 2's limits hold everywhere."""
    return {
        key: partial(Stack.folded_down, m=torch.tensor([[m_c], [m_s]]).expand(2, stack.columns))
        for key, stack in pairing.stacks.items()
    }


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.6, 1.4), (0.0, 0.0)])
def test_coefficients_and_strengths_have_the_right_limits(host, pair_files, dense_output, weights):
    wanted = dense_output(host, *weights)
    loras = [read(file) for file in pair_files]
    slots = host.slots([key for lora in loras for key in lora.deltas])
    pairing = pair(loras, [1.0, 1.0], {key: slot.shape for key, slot in slots.items()})
    bare = output(host)
    with attach(slots, pairing.stacks) as router:
        router.merged(constant(pairing, *weights))
        by_coefficients = output(host)
        router.merged(weights=list(weights))
        by_strength = output(host)
    close(by_coefficients, wanted)
    close(by_strength, wanted)
    assert (float((wanted - bare).abs().max()) > 0.05) == (weights != (0.0, 0.0))


def test_each_alone_is_what_routing_gives(host, attached, dense_output):
    router, _ = attached
    plain = type(host)("miniature", host.folder, "cpu")
    router.alone(0)
    subject = output(host)
    router.alone(1)
    style = output(host)
    router.bare()
    bare = output(host)
    close(subject, dense_output(plain, 1, 0))
    close(style, dense_output(plain, 0, 1))
    assert torch.equal(bare, output(plain))
    assert float((subject - style).abs().max()) > 0.05


@pytest.mark.parametrize("recipe", [{"method": "direct"}, {"objective": "paper", "lr": 1e-7, "steps": 1}], ids=str)
def test_a_saved_plain_sum_is_the_plain_sum(host, recipe_of, dense_output, recipe):
    wanted = dense_output(host, 1, 1)
    run(recipe_of(dtype="fp32", **recipe), host)
    lora = read(host.destination("merged"))
    slots = host.slots(list(lora.deltas))
    with attach(slots, pair([lora], [1.0], {key: slot.shape for key, slot in slots.items()}).stacks) as router:
        router.merged()
        close(output(host), wanted)
