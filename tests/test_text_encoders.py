"""text_encoders="learn": the prompts are read with the coefficients as they are, which get gradients through the encoders."""

import pytest
import torch
from loras import dense_deltas, write_lora

from ziplora_lib import job
from ziplora_lib.job import run
from ziplora_lib.lora.keys import is_unet, layer_key
from ziplora_lib.lora.reader import read
from ziplora_lib.merge.attach import attach
from ziplora_lib.merge.pairing import pair


@pytest.fixture(scope="module")
def text_pair(layers, tmp_path_factory):
    """Two LoRAs on both text encoders and a little of the UNet, strong enough in the encoders to be in each other's way."""
    names = {layer_key(f"{part}.{name}"): shape for (part, name), shape in layers.items()}
    chosen = {
        key: shape
        for key, shape in names.items()
        if ("_te" in key and "text_projection" not in key) or "input_blocks_4_1_transformer_blocks_0_attn2" in key
    }
    folder = tmp_path_factory.mktemp("text")
    return [
        write_lora(folder / f"{name}.safetensors", chosen, rank=3, seed=seed, size=1.0)
        for seed, name in enumerate(("subject", "style"))
    ]


@pytest.fixture
def learned(monkeypatch):
    """The coefficients of the run that follows, as the method returned them."""
    kept, method = {}, job.METHODS["ziplora"]

    def recording(*args):
        merged = method(*args)
        kept.update(merged.coefficients)
        return merged

    monkeypatch.setitem(job.METHODS, "ziplora", recording)
    return kept


def deltas(path):
    return {layer_key(name): delta for name, delta in dense_deltas(path).items()}


def combined(pair_files, coefficients):
    """Σ m_i ⊗ ΔW_i in float64, 1 where there are none."""
    total = {}
    for i, file in enumerate(pair_files):
        for key, delta in deltas(file).items():
            m = coefficients[key][i].double() if key in coefficients else 1.0
            total[key] = total.get(key, 0) + delta * m
    return total


def test_they_are_learned_and_saved(host, recipe_of, text_pair, learned):
    result = run(recipe_of(*text_pair, text_encoders="learn", steps=3, lr=0.05, dtype="fp32", objective="paper"), host)
    text = {key: m for key, m in learned.items() if not is_unet(key)}
    assert len(text) == result.preflight["text_layers"] > 20
    assert any(key.startswith("lora_te1_") for key in text)
    assert any(key.startswith("lora_te2_") for key in text)
    # of the last layer of an encoder whose penultimate state is read, only the pooled text knows
    moved = {key: float((m - 0.5).abs().max()) for key, m in text.items()}
    still = {key for key, most in moved.items() if most == 0}
    assert still <= {key for key in text if key.startswith("lora_te1_text_model_encoder_layers_2_")}
    assert len(moved) - len(still) > 20
    given = deltas(host.destination("merged"))
    for key, wanted in combined(text_pair, learned).items():
        torch.testing.assert_close(given[key], wanted, rtol=1e-4, atol=1e-6)
    assert not [said for said in result.warnings if "summed" in said]
    assert result.learned["coefficients"] == result.preflight["learned_coefficients"]
    encoders = [host.pipe.text_encoder, host.pipe.text_encoder_2]
    assert all(parameter.grad is None for encoder in encoders for parameter in encoder.parameters())


def test_without_it_they_are_summed(host, recipe_of, text_pair, learned):
    result = run(recipe_of(*text_pair, steps=3, lr=0.05, dtype="fp32", objective="paper"), host)
    assert learned
    assert all(map(is_unet, learned))
    given = deltas(host.destination("merged"))
    for key, wanted in combined(text_pair, learned).items():
        torch.testing.assert_close(given[key], wanted, rtol=1e-4, atol=1e-6)
    assert any(f"{result.preflight['text_layers']} text encoder layers are summed" in said for said in result.warnings)


def test_learning_them_lowers_the_error(host, recipe_of, text_pair):
    """The loss falls, and the held-out errors end below those of the same run that sums them."""
    fields = dict(steps=25, lr=0.03, samples=8, batch=2, empty_share=0.0)
    both = run(recipe_of(*text_pair, text_encoders="learn", **fields), host)
    losses = [entry["loss"] for entry in both.history]
    assert both.learned["best_step"] > 0
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    summed = run(recipe_of(*text_pair, overwrite=True, **fields), host)
    assert sum(both.learned["error"]) < sum(summed.learned["error"])


def test_a_prompt_is_read_with_the_coefficients_and_differentiably(host, text_pair):
    """The gradient through encode is the one of finite differences."""
    loras = [read(file) for file in text_pair]
    slots = host.slots(loras[0].layers)
    pairing = pair(loras, [1.0, 1.0], {key: slot.shape for key, slot in slots.items()}, learn_text=True)
    key = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    assert key in pairing.learned
    m = torch.full((2, pairing.stacks[key].columns), 0.6, requires_grad=True)
    with attach(slots, pairing.stacks) as router:

        def measure(values, gradients=False):
            router.merged({key: lambda stack: stack.folded_down(values)})
            states, pooled, _ = host.encode("a photo of sks cat", 64, gradients=gradients)
            return states.square().mean() + pooled.square().mean()

        plain = measure(m)
        assert not plain.requires_grad
        measure(m, gradients=True).backward()
        assert m.grad.abs().max() > 0
        direction = m.grad / m.grad.norm()
        step = 0.05
        up, down = (float(measure(m.detach() + sign * step * direction)) for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(float(m.grad.norm()), rel=0.02)


def test_a_stop_keeps_what_was_learned_of_them(host, recipe_of, text_pair, learned):
    result = run(
        recipe_of(*text_pair, text_encoders="learn", steps=50, lr=0.05, dtype="fp32", objective="paper"),
        host,
        lambda info: info["phase"] == "merge" and info["step"] == 2,
    )
    assert result.stopped
    given = deltas(host.destination("merged"))
    for key, wanted in combined(text_pair, learned).items():
        torch.testing.assert_close(given[key], wanted, rtol=1e-4, atol=1e-6)
