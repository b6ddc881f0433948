"""ZipLoRA on a tiny model: its loss and gradient are those of Eq. 2 and Eq. 3 written out densely in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ziplora_lib.errors import MergeFailed
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.reader import Lora
from ziplora_lib.merge.attach import Slot, attach
from ziplora_lib.merge.method import Calibration, Sample, Settings
from ziplora_lib.merge.objective import OBJECTIVES
from ziplora_lib.merge.pairing import pair
from ziplora_lib.merge.ziplora import by_layer, learned_columns, ziplora

CONV, LINEAR, ALONE = "lora_unet_conv", "lora_unet_linear", "lora_unet_last"


class Tiny(nn.Module):
    """(B, 4, h, w) -> (B, 4, h, w) in the place of the UNet: two layers of both LoRAs, and one of the style alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.linear = nn.Linear(6, 5)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        x = nn.functional.silu(self.conv(x)).movedim(1, -1)
        return self.last(nn.functional.silu(self.linear(x))).movedim(-1, 1)


WEIGHTS = {CONV: "conv.weight", LINEAR: "linear.weight", ALONE: "last.weight"}


@pytest.fixture(autouse=True)
def cold():
    """From the LoRAs themselves; the warm start is in test_methods.py."""
    with pytest.MonkeyPatch.context() as patch:  # its own, as some tests undo theirs
        patch.setitem(OBJECTIVES, "guided", replace(OBJECTIVES["guided"], warm_start=False))
        yield


class World:
    """Model, LoRAs, pairing and calibration samples; and the same things dense, in float64."""

    def __init__(self, samples=4, alone=(ALONE,)):
        self.model = Tiny().requires_grad_(False)
        generator = torch.Generator().manual_seed(1)

        def lora(name, rank, size, *keys):
            deltas = {}
            for key in keys:
                shape = tuple(self.model.get_parameter(WEIGHTS[key]).shape)
                deltas[key] = LowRankDelta(
                    torch.randn(shape[0], rank, generator=generator) * size,
                    torch.randn(rank, *shape[1:], generator=generator) / torch.Size(shape[1:]).numel() ** 0.5,
                    0.6,
                )
            return Lora(name, name, deltas)

        self.loras = [lora("subject", 2, 2.0, CONV, LINEAR), lora("style", 3, 0.7, CONV, LINEAR, *alone)]
        self.strengths = [0.9, 1.2]
        slots = {CONV: Slot(self.model.conv), LINEAR: Slot(self.model.linear), ALONE: Slot(self.model.last)}
        self.slots = slots
        self.pairing = pair(self.loras, self.strengths, {key: slot.shape for key, slot in slots.items()})
        self.samples = []
        for k in range(samples):
            for parent in (0, 1):
                x = torch.randn(1, 4, 3, 3, generator=generator)
                target = self.dense([float(parent == 0), float(parent == 1)], x.double()).float()
                bare = self.dense([0.0, 0.0], x.double()).float()
                self.samples.append(Sample(parent, x, torch.tensor([k]), "", None, target, bare))

    def dense(self, m, x):
        """The model with W + Σ strength · m ⊗ ΔW for its weights: m by LoRA a number or {key: (columns,)}; float64."""
        state = {name: value.double() for name, value in self.model.state_dict().items()}
        for mi, lora, strength in zip(m, self.loras, self.strengths):
            for key, d in lora.deltas.items():
                delta = strength * d.scale * (d.up.double() @ d.down.double().flatten(1))
                columns = mi[key] if isinstance(mi, dict) else mi
                weight = state[WEIGHTS[key]]
                state[WEIGHTS[key]] = weight + (delta * columns).reshape(weight.shape)
        return functional_call(self.model, state, (x,))

    def deltas(self, key):
        """ΔW of both, nothing where a LoRA has no such layer."""
        return [
            w * d.scale * (d.up.double() @ d.down.double().flatten(1)) if d is not None else torch.zeros(1, 1).double()
            for lora, w in zip(self.loras, self.strengths)
            for d in [lora.deltas.get(key)]
        ]

    def own(self, i, coefficients):
        """LoRA i's coefficients of the layers that it has, in one row."""
        return torch.cat([m[i] for key, m in coefficients.items() if key in self.loras[i].deltas])

    def loss(self, m, samples, objective, lam):
        """Eq. 3 in the form of each objective, written out; m: {key: (2, columns)} in float64."""
        data = 0.0
        for parent in (0, 1):
            mine = [s for s in samples if s.parent == parent]
            for s in mine:
                prediction = self.dense([{k: v[i] for k, v in m.items()} for i in (0, 1)], s.x.double())
                data = data + (prediction - s.target.double()).square().sum().sqrt() / len(mine)
        if objective == "guided":
            inner = {key: (self.deltas(key)[0] * self.deltas(key)[1]).sum(0).abs() for key in m}
            penalty = sum((m[k][0] * m[k][1]).abs() @ inner[k] for k in m) / sum(v.sum() for v in inner.values())
        elif objective == "paper":
            penalty = sum(torch.nn.functional.cosine_similarity(*m[key], dim=0).abs() for key in (CONV, LINEAR))
        else:
            penalty = sum((m[key][0] * m[key][1]).abs().sum() for key in (CONV, LINEAR))
        return data, penalty, data + lam * penalty

    def run(self, monkeypatch=None, stop_at=None, **settings):
        """ZipLoRA on it: (result, the gradients that its optimiser was given)."""
        gradients = []
        if monkeypatch:

            class Recording(torch.optim.Adam):
                def step(self, *args, **kwargs):
                    gradients.append(self.param_groups[0]["params"][0].grad.clone())
                    return super().step(*args, **kwargs)

            monkeypatch.setattr(torch.optim, "Adam", Recording)
        objective = OBJECTIVES[settings.setdefault("objective", "guided")]
        settings.setdefault("lam", objective.lam)
        settings.setdefault("start", objective.start)
        with attach(self.slots, self.pairing.stacks) as router:

            def predict(samples, downs):
                router.merged(downs)
                return self.model(torch.cat([s.x for s in samples]))

            calibration = Calibration(self.samples, self.samples, predict)
            merged = ziplora(self.pairing, calibration, Settings(**settings), lambda info: info["step"] == stop_at)
        return merged, gradients


def split(world, m):
    columns = learned_columns(world.pairing)
    return by_layer(m, world.pairing, columns)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lam", [0.0, 0.7])
@pytest.mark.parametrize("start", [0.5, 1.0, -0.3])
def test_loss_and_gradient_are_equation_3_in_float64(monkeypatch, objective, lam, start):
    world = World()
    merged, gradients = world.run(monkeypatch, objective=objective, lam=lam, start=start, steps=1, batch=2)
    used = [s for s in world.samples if int(s.t) in (0, 1)]  # the first two of each
    count = learned_columns(world.pairing).grams.shape[-1]
    m = torch.full((2, count), start, dtype=torch.float64, requires_grad=True)
    data, penalty, loss = world.loss(split(world, m), used, objective, lam)
    (wanted,) = torch.autograd.grad(loss, m)
    # the library works in fp32: 2^-24 a rounding, a few hundred of them
    torch.testing.assert_close(gradients[0].double(), wanted, rtol=2e-4, atol=2e-5 * float(wanted.abs().max()))
    first = merged.history[0]
    assert sum(first["errors"]) == pytest.approx(float(data), rel=1e-5)
    assert first["penalty"] == pytest.approx(float(penalty), rel=1e-5)
    assert first["loss"] == pytest.approx(float(loss), rel=1e-5)
    (data_gradient,) = torch.autograd.grad(world.loss(split(world, m), used, objective, lam)[0], m)
    assert first["data_gradient"] == pytest.approx(float(data_gradient.abs().mean()), rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_against_finite_differences(monkeypatch, objective):
    world = World()
    _, gradients = world.run(monkeypatch, objective=objective, lam=0.5, start=0.8, steps=1)
    used = [s for s in world.samples if int(s.t) == 0]
    m = torch.full(gradients[0].shape, 0.8, dtype=torch.float64)
    step = 1e-5
    # the paper's cosine is at its top where all are equal: its kink |cos| is not there, so a central difference is exact
    # 36 columns of the convolution, 5 of the layer that the style has alone, 6 of the linear layer
    for i, j in [(0, 0), (0, 17), (0, 35), (0, 38), (0, 41), (0, 46), (1, 5), (1, 35), (1, 37), (1, 40), (1, 42)]:
        change = torch.zeros_like(m)
        change[i, j] = step
        up, down = (float(world.loss(split(world, m + s * change), used, objective, 0.5)[2]) for s in (1, -1))
        assert float(gradients[0][i, j]) == pytest.approx(
            (up - down) / (2 * step), rel=1e-3, abs=1e-4 * float(gradients[0].abs().max())
        )


def test_a_layer_that_one_lora_has_alone_is_learned_as_well():
    world = World()
    assert world.pairing.learned == sorted([CONV, LINEAR, ALONE])
    merged, _ = world.run(steps=2, lr=0.1)
    assert merged.stacks[ALONE].ranks == (0, 3)
    m = merged.coefficients[ALONE]
    assert (m[1] != 1.0).all()
    assert (m[0] == 1.0).all(), "the other one has nothing to move there"
    assert merged.summary["coefficients"] == 2 * (36 + 6) + 5
    wanted = world.deltas(ALONE)[1] * m[1].double()
    torch.testing.assert_close(merged.stacks[ALONE].total().dense().double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_lora_without_any_learned_layer_is_no_collapse():
    """One that has text encoder layers alone, say: its mean coefficient is none, not zero."""
    world = World()
    world.loras[0] = Lora("text", "text", {"lora_te1_layer": world.loras[0].deltas[LINEAR]})
    world.pairing = pair(world.loras, world.strengths, {key: slot.shape for key, slot in world.slots.items()})
    assert world.pairing.learned == sorted([CONV, LINEAR, ALONE])
    merged, _ = world.run(steps=20, lr=0.02)
    assert not [said for said in merged.warnings if "collapsed" in said]
    assert merged.summary["mean"][0] == 0.0


@pytest.mark.parametrize("at_once", [2, 3, 6, 32])
def test_micro_batches_give_the_same_gradient(monkeypatch, at_once):
    world = World()
    _, one = world.run(monkeypatch, steps=3, batch=3, at_once=1)
    monkeypatch.undo()
    _, many = world.run(monkeypatch, steps=3, batch=3, at_once=at_once)
    assert len(one) == len(many) == 3
    for a, b in zip(one, many):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_is_the_mean_over_its_samples(monkeypatch):
    world = World(samples=4)
    _, batch = world.run(monkeypatch, steps=1, batch=4, lam=0.0)
    gradients = []
    for k in range(4):
        monkeypatch.undo()
        alone = World(samples=4)
        alone.samples = [s for s in alone.samples if int(s.t) == k]
        gradients.append(alone.run(monkeypatch, steps=1, batch=1, lam=0.0)[1][0])
    torch.testing.assert_close(batch[0], sum(gradients) / 4, rtol=1e-4, atol=1e-6)


def test_the_merged_stacks_are_equation_2_of_the_coefficients():
    world = World()
    merged, _ = world.run(steps=10)
    for key, m in merged.coefficients.items():
        assert m.shape == (2, merged.stacks[key].columns)
        assert not m.requires_grad
        wanted = sum(d * mi.double() for d, mi in zip(world.deltas(key), m))
        given = merged.stacks[key].total()
        torch.testing.assert_close(given.dense().flatten(1).double(), wanted, rtol=1e-5, atol=1e-6)
    moved = torch.cat(list(merged.coefficients.values()), dim=1)
    assert float((moved - 1.0).abs().max()) > 0.02


def held_out(world, coefficients):
    """Mean relative error of each LoRA's samples, dense in float64."""
    m = [{k: v[i].double() for k, v in coefficients.items()} for i in (0, 1)]
    errors = [[], []]
    for s in world.samples:
        error = (world.dense(m, s.x.double()) - s.target.double()).square().sum()
        errors[s.parent].append(float(error / (s.target.double() - s.bare.double()).square().sum()))
    return [sum(e) / len(e) for e in errors]


def test_what_it_says_of_its_error_is_so_and_it_learns():
    world = World()
    merged, _ = world.run(steps=60, lr=0.02)
    ones = {key: torch.ones_like(m) for key, m in merged.coefficients.items()}
    assert merged.summary["error"] == pytest.approx(held_out(world, merged.coefficients), rel=1e-3)
    assert merged.summary["error_plain_sum"] == pytest.approx(held_out(world, ones), rel=1e-3)
    assert sum(merged.summary["error"]) < 0.7 * sum(merged.summary["error_plain_sum"])
    own = [world.own(i, merged.coefficients) for i in (0, 1)]
    assert merged.summary["mean"] == pytest.approx([float(m.mean()) for m in own], rel=1e-5)
    assert merged.summary["coefficients"] == sum(m.numel() for m in own)
    assert not merged.stopped
    assert [h["step"] for h in merged.history] == list(range(1, 61))


def test_the_best_on_the_held_out_samples_is_kept_not_the_last():
    """At a learning rate far too high the last coefficients are worse than earlier ones."""
    world = World()
    merged, _ = world.run(steps=40, lr=0.8)
    seen = [sum(h["held_out"]) for h in merged.history if "held_out" in h]
    best = sum(merged.summary["error"])
    assert best <= min(seen)
    assert best < seen[-1]
    assert best == pytest.approx(sum(held_out(world, merged.coefficients)), rel=1e-3)
    assert 0 < merged.summary["best_step"] < 40


def test_a_stop_keeps_the_best_so_far():
    world = World()
    merged, _ = world.run(steps=100, lr=0.02, stop_at=23)
    assert merged.stopped
    assert len(merged.history) == 23
    assert merged.summary["best_step"] == 23
    start = {key: torch.ones_like(m) for key, m in merged.coefficients.items()}
    assert sum(merged.summary["error"]) == pytest.approx(sum(held_out(world, merged.coefficients)), rel=1e-3)
    assert sum(merged.summary["error"]) < sum(held_out(world, start))


def test_a_stop_at_the_last_step_is_a_finished_run():
    merged, _ = World().run(steps=5, stop_at=5)
    assert not merged.stopped


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_run_twice_is_the_same(objective):
    first, second = (World().run(steps=5, objective=objective)[0] for _ in range(2))
    for key in first.coefficients:
        assert torch.equal(first.coefficients[key], second.coefficients[key])
    assert first.history == second.history


def test_a_collapsed_run_says_so():
    # a layer of one LoRA alone is not penalised, and would be left
    merged, _ = World(alone=()).run(objective="paper-literal", lam=100.0, steps=300, lr=0.02, start=1.0)
    assert merged.summary["retained"] < 0.15
    assert any("collapsed: only" in warning for warning in merged.warnings), merged.warnings


def test_a_run_that_collapsed_after_its_best_step_says_so_too():
    """What was kept is sound, but the run was not."""
    merged, _ = World(alone=()).run(objective="paper-literal", lam=100.0, steps=150, lr=0.01)
    assert merged.history[-1]["retained"] < 0.15 < merged.summary["retained"]
    assert any("collapsed after step" in warning for warning in merged.warnings), merged.warnings


def test_a_run_that_learned_has_no_warnings():
    merged, _ = World().run(steps=60, lr=0.02)
    assert merged.warnings == []


def test_a_run_that_never_got_better_than_its_start_says_so():
    merged, _ = World().run(steps=20, lr=1.0, start=0.3)
    assert merged.summary["best_step"] == 0
    assert all((m == 0.3).all() for m in merged.coefficients.values())
    assert any("nothing was learned" in warning for warning in merged.warnings)


def test_swapped_weights_that_hide_the_coefficients_fail_in_words():
    """A model whose output does not depend on the coefficients, as with weights swapped in and out."""
    world = World()
    forward = Tiny().requires_grad_(False)
    world.model.forward = lambda x: forward(x) + 0 * world.model.linear(torch.zeros(1, 6)).sum()
    with pytest.raises(MergeFailed, match="No gradient"):
        world.run(steps=2)


def test_a_precision_that_overflows_fails_in_words():
    world = World()
    forward = world.model.forward
    world.model.forward = lambda x: forward(x) * float("inf")
    with pytest.raises(MergeFailed, match="precision"):
        world.run(steps=2)


def test_small_gradients_of_half_precision_models_do_not_vanish(monkeypatch):
    """The loss is scaled for the backward: without it fp16 rounds gradients below 6e-8 to nothing."""
    world = World()
    exact = world.run(monkeypatch, steps=1, lam=0.0)[1][0]
    monkeypatch.undo()
    forward = world.model.forward

    class Shrink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # as a half-precision model's last operation
            return (gradient * 1e-7).half().float() / 1e-7

    world.model.forward = lambda x: Shrink.apply(forward(x))
    given = world.run(monkeypatch, steps=1, lam=0.0)[1][0]
    torch.testing.assert_close(given, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


def test_an_overflowing_scale_is_lowered(monkeypatch):
    world = World()
    exact = world.run(monkeypatch, steps=2, lam=0.0)[1]
    monkeypatch.undo()
    forward = world.model.forward

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.half().float()  # above 65504: infinite

    world.model.forward = lambda x: Half.apply(forward(x))
    given = world.run(monkeypatch, steps=2, lam=0.0)[1]
    for a, b in zip(given, exact):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.005 * float(b.abs().max()))
