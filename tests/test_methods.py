"""The methods that solve or project instead of learning, against the same things written out densely in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from benchmarks.methods import COMPARED, NEEDS_SAMPLES
from benchmarks.methods.average import average
from benchmarks.methods.closed_form import least_squares
from benchmarks.methods.np_lora import np_lora, row_space
from ziplora_lib.errors import MergeFailed, Stopped
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.reader import Lora
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge import NEEDS_MODEL, SAID, statistics
from ziplora_lib.merge.attach import Slot, attach
from ziplora_lib.merge.method import Calibration, Sample, Settings
from ziplora_lib.merge.methods import METHODS
from ziplora_lib.merge.pairing import pair
from ziplora_lib.merge.statistics import input_moments, rank_moments, ridge_solved

CONV, LINEAR, LAST, TEXT = "lora_unet_conv", "lora_unet_linear", "lora_unet_last", "lora_te1_text"
OBSERVING = ["closed-form", "regmean", "ssr"]


class Tiny(nn.Module):
    """(B, 4, 6, 6) -> (B, 3, 4, 3): a convolution with uneven stride and padding, and two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, stride=(1, 2), padding=(0, 1))
        self.linear = nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = nn.functional.silu(self.conv(x)).movedim(1, -1)
        return self.last(nn.functional.silu(self.linear(x))).movedim(-1, 1)


WEIGHTS = {CONV: "conv.weight", LINEAR: "linear.weight", LAST: "last.weight"}


class World:
    """A model, P LoRAs of different ranks, and calibration samples.

    The last layer is the last LoRA's alone, or, of three and more, the last two's.
    """

    def __init__(self, parents=2, samples=6):
        self.model, self.parents = Tiny().requires_grad_(False), parents
        generator = torch.Generator().manual_seed(1)
        self.loras = []
        for i in range(parents):
            deltas = {}
            for key in (CONV, LINEAR) if i < max(1, parents - 2) else (CONV, LINEAR, LAST):
                shape = tuple(self.model.get_parameter(WEIGHTS[key]).shape)
                up = torch.randn(shape[0], 1 + i % 3, generator=generator) * (2.0 if i == 0 else 0.7)
                down = torch.randn(1 + i % 3, *shape[1:], generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
                deltas[key] = LowRankDelta(up, down, 0.6)
            deltas[TEXT] = LowRankDelta(torch.randn(4, 2, generator=generator), torch.randn(2, 3, generator=generator))
            self.loras.append(Lora(str(i), str(i), deltas))
        self.strengths = [1.0 + 0.1 * i for i in range(parents)]
        self.slots = {CONV: Slot(self.model.conv), LINEAR: Slot(self.model.linear), LAST: Slot(self.model.last)}
        self.pairing = pair(self.loras, self.strengths, {key: slot.shape for key, slot in self.slots.items()})
        assert self.pairing.learned == sorted([CONV, LINEAR, LAST])
        self.samples = []
        for k in range(samples):
            for i in range(parents):
                # every LoRA's samples lie somewhere else
                x = (
                    torch.randn(1, 4, 6, 6, generator=generator) * 0.7
                    + torch.randn(1, 4, 1, 1, generator=generator)
                    + i
                )
                target, bare = self.dense(self.alone(i), x.double()).float(), self.dense({}, x.double()).float()
                self.samples.append(Sample(i, x, torch.tensor([k]), "", None, target, bare))

    def delta(self, i, key):
        """ΔW_i with its strength, flat, in float64; zeros where it lacks the layer."""
        shape = self.model.get_parameter(WEIGHTS[key]).flatten(1).shape
        d = self.loras[i].deltas.get(key)
        if d is None:
            return torch.zeros(shape, dtype=torch.float64)
        return self.strengths[i] * d.scale * (d.up.double() @ d.down.double().flatten(1))

    def alone(self, i):
        return {key: self.delta(i, key) for key in WEIGHTS}

    def dense(self, deltas, x):
        """The model with other weights, in float64."""
        state = {name: value.double() for name, value in self.model.state_dict().items()}
        for key, delta in deltas.items():
            state[WEIGHTS[key]] = state[WEIGHTS[key]] + delta.reshape(state[WEIGHTS[key]].shape)
        return functional_call(self.model, state, (x,))

    def tokens(self, i, key):
        """The layer's inputs while LoRA i alone runs on its own samples, in float64: (tokens, columns)."""
        x = torch.cat([s.x for s in self.samples if s.parent == i]).double()
        conv = self.model.conv
        # a kernel with a single one picks a column
        eye = torch.eye(36, dtype=torch.float64).reshape(36, 4, 3, 3)
        columns = nn.functional.conv2d(x, eye, stride=conv.stride, padding=conv.padding).movedim(1, -1).flatten(0, -2)
        inputs = {CONV: columns}
        for key_, module, after in (("conv", conv, LINEAR), ("linear", self.model.linear, LAST)):
            own = {"conv": CONV, "linear": LINEAR}[key_]
            weight = module.weight.double().flatten(1) + self.delta(i, own)
            inputs[after] = nn.functional.silu(inputs[own] @ weight.T + module.bias.double())
        return inputs[key]

    def moments(self, i, key):
        x = self.tokens(i, key)
        return x.T @ x / len(x)

    def calibrated(self, run):
        """run(calibration) with the LoRAs attached."""
        with attach(self.slots, {k: s for k, s in self.pairing.stacks.items() if k != TEXT}) as router:

            def predict(samples, downs):
                router.merged(downs)
                return self.model(torch.cat([s.x for s in samples]))

            @torch.no_grad()
            def observe(samples, visits):
                with router.watching(visits):
                    router.alone(*(s.parent for s in samples))
                    self.model(torch.cat([s.x for s in samples]))

            return run(Calibration(self.samples, self.samples, predict, observe=observe))

    def run(self, method, callback=lambda info: False, **settings):
        settings = Settings(**{"at_once": 3, **settings})
        return self.calibrated(lambda calibration: COMPARED[method](self.pairing, calibration, settings, callback))


@pytest.fixture
def gradients(monkeypatch):
    """What the optimiser is given, step by step."""
    given = []

    class Recording(torch.optim.Adam):
        def step(self, *args, **kwargs):
            given.append(self.param_groups[0]["params"][0].grad.clone())
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "Adam", Recording)
    return given


def merged_delta(merged, key):
    return merged.stacks[key].total().dense().flatten(1).double()


def close(a, b, rtol=1e-4):
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * float(b.abs().max()))


def test_every_method_is_described_and_the_tables_fit():
    assert SAID.keys() == METHODS.keys()
    assert METHODS.keys() > NEEDS_MODEL


# --- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3, 32])
@pytest.mark.parametrize("parents", [2, 3])
def test_moments_are_those_of_the_inputs_of_each_lora_alone(parents, at_once):
    world, settings = World(parents), Settings(at_once=at_once)
    collect = partial(input_moments, world.pairing, settings=settings, callback=lambda info: False)
    moments = world.calibrated(lambda c: dict(collect(calibration=c)))
    assert list(moments) == world.pairing.learned
    for key, found in moments.items():
        assert found.dtype == torch.float32
        for i in range(parents):
            close(found[i], world.moments(i, key))
    collect = partial(rank_moments, world.pairing, settings=settings, callback=lambda info: False)
    for key, found in world.calibrated(lambda c: dict(collect(calibration=c))).items():
        down = world.pairing.stacks[key].down.flatten(1).double()
        for i in range(parents):
            close(found[i], down @ world.moments(i, key) @ down.T)


def test_layers_beyond_the_budget_wait_for_another_pass(monkeypatch):
    world, seen = World(), []

    def collect(calibration):
        return dict(input_moments(world.pairing, calibration, Settings(at_once=4), lambda info: seen.append(info)))

    whole = world.calibrated(collect)
    assert [info["step"] for info in seen] == [1, 2, 3]
    assert {info["steps"] for info in seen} == {3}
    seen.clear()
    # the convolution's moments alone are beyond it, the others fit together
    monkeypatch.setattr(statistics, "BUDGET", 1000)
    parts = world.calibrated(collect)
    assert [info["step"] for info in seen] == [1, 2, 3, 4, 5, 6]
    assert {info["steps"] for info in seen} == {6}
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_autocast_does_not_coarsen_the_moments():
    """A host may run its model under it; the inputs are coarse then, but their moments are summed in fp32."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4).requires_grad_(False), torch.randn(2, 50, 8).to(torch.bfloat16)
    stack = Stack.of([LowRankDelta(torch.randn(4, 2), torch.randn(2, 8)), None])
    seen = []
    with attach({"layer": Slot(layer)}, {"layer": stack}) as router, torch.autocast("cpu", torch.bfloat16):
        router.alone(0, 1)
        with router.watching({"layer": lambda parent, tokens: seen.append(tokens.T @ tokens)}):
            layer(x)
    for gram, tokens in zip(seen, x.double()):
        close(gram, tokens.T @ tokens, rtol=1e-5)


def test_only_loras_alone_are_watched_and_only_meanwhile():
    world, seen = World(), []
    x = torch.cat([s.x for s in world.samples[:3]])
    with attach(world.slots, {k: world.pairing.stacks[k] for k in WEIGHTS}) as router:
        with router.watching({LINEAR: lambda parent, tokens: seen.append((parent, tokens.shape))}):
            router.alone(1, None, 0)
            world.model(x)
            router.bare()
            world.model(x)
        router.alone(0)
        world.model(x)
    assert seen == [(1, (12, 6)), (0, (12, 6))]


@pytest.mark.parametrize("method", OBSERVING)
def test_a_stop_while_observing_keeps_nothing(method):
    with pytest.raises(Stopped):
        World().run(method, lambda info: info["step"] == 2)


@pytest.mark.parametrize("method", OBSERVING)
def test_a_precision_that_overflows_fails_in_words(method):
    world = World()
    world.samples[3] = replace(world.samples[3], x=world.samples[3].x * float("inf"))
    with pytest.raises(MergeFailed, match="precision"):
        world.run(method)


def test_ridge_solved_by_hand():
    h, b, x0 = torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0], [-1.0]])
    # ρ = .5 · 2 = 1: [[4, 1], [1, 2]] x = [6, 1]
    close(ridge_solved(h, b, 0.5, x0), torch.tensor([[11 / 7], [-2 / 7]]))
    assert torch.equal(ridge_solved(torch.zeros(2, 2), torch.zeros(2, 1), 0.5, x0), x0)
    with pytest.raises(MergeFailed, match="ridge"):
        ridge_solved(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), b, 0.1, x0)


# --- methods that observe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.01, 0.3])
@pytest.mark.parametrize("parents", [2, 3])
def test_closed_form_is_the_least_squares_over_all_tokens(parents, ridge):
    world = World(parents)
    merged = world.run("closed-form", ridge=ridge, start=0.4)
    for key in world.pairing.learned:
        deltas = [world.delta(i, key) for i in range(parents)]
        own = [i for i in range(parents) if key in world.loras[i].deltas]
        columns = deltas[0].shape[1]
        rows, wanted, energies = [], [], {}
        for i in own:
            energies[i] = float((world.tokens(i, key) @ deltas[i].T).square().sum(1).mean())
        for i in range(parents):
            x = world.tokens(i, key)
            weight = (energies.get(i, sum(energies.values()) / len(own)) * len(x)) ** -0.5
            # one equation for every token and output: Σ_k Σ_j m_k[j] ΔW_k[:, j] x_j = ΔW_i x
            parts = [torch.einsum("oj,tj->toj", deltas[k], x).flatten(0, 1) for k in own]
            rows.append(weight * torch.cat(parts, dim=1))
            wanted.append(weight * (x @ deltas[i].T).flatten())
        equations, right = torch.cat(rows), torch.cat(wanted)
        n = len(own) * columns
        rho = ridge * float(equations.square().sum()) / n
        equations = torch.cat([equations, rho**0.5 * torch.eye(n)])
        right = torch.cat([right, torch.full((n,), 0.4 * rho**0.5)])
        m = torch.linalg.lstsq(equations, right[:, None]).solution.reshape(len(own), columns)
        close(merged.coefficients[key][own], m, rtol=1e-3)
        close(merged_delta(merged, key), sum(deltas[i] * m[k] for k, i in enumerate(own)), rtol=1e-3)
        absent = [i for i in range(parents) if i not in own]
        assert (merged.coefficients[key][absent] == 0.4).all()


def test_closed_form_with_a_great_ridge_stays_at_its_start():
    merged = World().run("closed-form", ridge=1e6, start=0.7)
    for m in merged.coefficients.values():
        torch.testing.assert_close(m, torch.full_like(m, 0.7), rtol=1e-4, atol=0)


def test_closed_form_of_a_layer_that_is_zero_stays_at_its_start():
    stack = Stack.of(
        [LowRankDelta(torch.zeros(4, 2), torch.ones(2, 3)), LowRankDelta(torch.zeros(4, 1), torch.ones(1, 3))]
    )
    assert (least_squares(stack, torch.eye(3).expand(2, 3, 3), 0.3, 0.5) == 0.5).all()


def test_closed_form_of_a_silent_lora_is_finite_and_keeps_the_other_quiet_on_its_inputs():
    """It is measured by the other's energy: a column that both use goes half way, as if each had the same weight."""
    stack = Stack.of(
        [LowRankDelta(torch.ones(4, 1), torch.ones(1, 3)), LowRankDelta(torch.zeros(4, 1), torch.ones(1, 3))]
    )
    m = least_squares(stack, torch.eye(3).expand(2, 3, 3), 1e-6, 0.0)
    torch.testing.assert_close(m[0], torch.full((3,), 0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("parents", [2, 3])
@pytest.mark.parametrize("ridge", [None, 0.5])
def test_regmean_is_its_dense_formula(parents, ridge):
    world = World(parents)
    merged = world.run("regmean", start=0.4, **({} if ridge is None else {"ridge": ridge}))
    for key in world.pairing.learned:
        deltas, moments = ([f(i, key) for i in range(parents)] for f in (world.delta, world.moments))
        rho = (0.01 if ridge is None else ridge) * sum(moments).diagonal().mean()
        eye = torch.eye(len(moments[0]), dtype=torch.float64)
        numerator = sum(d @ e for d, e in zip(deltas, moments)) + rho * 0.4 * sum(deltas)
        close(merged_delta(merged, key), numerator @ torch.linalg.inv(sum(moments) + rho * eye), rtol=1e-3)


@pytest.mark.parametrize("parents", [2, 3])
@pytest.mark.parametrize("ridge", [None, 0.5])
def test_ssr_is_the_least_squares_in_rank_space(parents, ridge):
    world = World(parents)
    merged = world.run("ssr", start=0.4, **({} if ridge is None else {"ridge": ridge}))
    for key in world.pairing.learned:
        stack = world.pairing.stacks[key]
        rows, wanted, first = [], [], 0
        for i, rank in enumerate(stack.ranks):
            z = world.tokens(i, key) @ stack.down.double().flatten(1).T
            own = torch.zeros_like(z)
            own[:, first : first + rank] = z[:, first : first + rank]
            rows.append(z / len(z) ** 0.5)
            wanted.append(own / len(z) ** 0.5)
            first += rank
        z, own = torch.cat(rows), torch.cat(wanted)
        eye = torch.eye(z.shape[1], dtype=torch.float64)
        rho = (1e-3 if ridge is None else ridge) * z.square().sum() / len(eye)
        z, own = torch.cat([z, rho.sqrt() * eye]), torch.cat([own, rho.sqrt() * 0.4 * eye])
        k = torch.linalg.lstsq(z, own).solution.T
        close(merged_delta(merged, key), stack.up.double() @ k @ stack.down.double().flatten(1), rtol=1e-3)


@pytest.mark.parametrize("method", sorted(NEEDS_SAMPLES))
@pytest.mark.parametrize("parents", [2, 3, 8])
def test_halves_keep_their_up_and_errors_are_those_of_what_is_saved(method, parents):
    world = World(parents)
    merged = world.run(method, steps=6, lr=0.05)
    for key, stack in merged.stacks.items():
        before = world.pairing.stacks[key]
        assert torch.equal(stack.up, before.up)
        assert stack.ranks == before.ranks
        assert stack.down.shape == before.down.shape
        assert torch.equal(stack.down, before.down) == (key == TEXT), key
    summed, given = ([[] for _ in range(parents)] for _ in "ab")
    for s in world.samples:
        for deltas, errors in (
            ({key: merged_delta(merged, key) for key in WEIGHTS}, given),
            ({key: sum(world.delta(i, key) for i in range(parents)) for key in WEIGHTS}, summed),
        ):
            square = (world.dense(deltas, s.x.double()) - s.target.double()).square().sum()
            errors[s.parent].append(float(square / (s.target.double() - s.bare.double()).square().sum()))
    told = merged.summary
    assert told["method"] == method
    assert told["error"] == pytest.approx([sum(e) / len(e) for e in given], rel=1e-3)
    assert told["error_plain_sum"] == pytest.approx([sum(e) / len(e) for e in summed], rel=1e-3)
    assert sum(told["error"]) < 0.8 * sum(told["error_plain_sum"])
    norm = sum(merged_delta(merged, key).square().sum() for key in WEIGHTS)
    plain = sum(sum(world.delta(i, key) for i in range(parents)).square().sum() for key in WEIGHTS)
    assert told["retained"] == pytest.approx(float((norm / plain).sqrt()), rel=1e-4)


@pytest.mark.parametrize("method", sorted(NEEDS_SAMPLES))
def test_the_same_run_twice_is_the_same(method):
    first, second = (World().run(method, steps=3) for _ in "ab")
    assert all(torch.equal(stack.down, second.stacks[key].down) for key, stack in first.stacks.items())


# --- the warm start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parents", [2, 3])
def test_a_warm_start_begins_with_what_ssr_leaves(parents):
    """Steps that hardly move leave SSR-Merge's own merge, whatever the start of the coefficients scales it by."""
    world, seen = World(parents), []
    there = world.run("ssr")
    for start in (1.0, 0.5):
        merged = world.run("ziplora", seen.append, steps=1, lr=1e-9, start=start)
        for key in WEIGHTS:
            close(merged_delta(merged, key), start * merged_delta(there, key))
    assert merged.summary["error_plain_sum"] == pytest.approx(there.summary["error_plain_sum"], rel=1e-4)
    assert merged.summary["retained"] == pytest.approx(0.5 * there.summary["retained"], rel=1e-4)
    assert {info["phase"] for info in seen} == {"warm start", "merge"}


@pytest.mark.parametrize("parents", [2, 3])
def test_from_a_warm_start_it_learns_the_columns_of_what_ssr_leaves(parents):
    world = World(parents)
    there, merged = world.run("ssr"), world.run("ziplora", steps=40)
    assert sum(merged.summary["error"]) < 0.9 * sum(there.summary["error"])
    assert merged.history[0]["errors"] != merged.history[-1]["errors"]
    for key in world.pairing.learned:
        parts = [there.stacks[key].part(i) for i in range(parents)]
        wanted = sum(
            part.dense().flatten(1).double() * merged.coefficients[key][i].double()
            for i, part in enumerate(parts)
            if part is not None
        )
        close(merged_delta(merged, key), wanted)


def test_the_gradient_from_a_warm_start_is_that_of_the_dense_model(gradients):
    world = World()
    there = world.run("ssr")
    world.run("ziplora", steps=1, start=0.6)
    keys = world.pairing.learned
    columns = [there.stacks[key].columns for key in keys]
    m = torch.full((2, sum(columns)), 0.6, dtype=torch.float64, requires_grad=True)
    deltas = {}
    for key, values in zip(keys, m.split(columns, dim=1)):
        parts = [(i, there.stacks[key].part(i)) for i in (0, 1)]
        deltas[key] = sum(p.dense().flatten(1).double() * values[i] for i, p in parts if p is not None)
    loss = 0.0
    for s in world.samples[:2]:  # the first of each
        loss = loss + (world.dense(deltas, s.x.double()) - s.target.double()).square().sum().sqrt()
    (wanted,) = torch.autograd.grad(loss, m)
    close(gradients[0], wanted, rtol=1e-3)


# --- methods without a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parents", [2, 3, 8])
def test_average(parents):
    world = World(parents)
    merged = average(world.pairing, None, Settings(), lambda info: None)
    for key in WEIGHTS:
        close(merged_delta(merged, key), sum(world.delta(i, key) for i in range(parents)) / parents)
    assert torch.equal(merged.stacks[TEXT].down, world.pairing.stacks[TEXT].down), "not learned, so summed"
    assert merged.summary == {"method": "average"}


def projected(world, first=1, **settings):
    pairing = replace(world.pairing, first=first)
    return np_lora(pairing, None, Settings(), lambda info: None, **settings)


@pytest.mark.parametrize("first", [1, 2])
def test_np_lora_is_its_formula(first):
    world = World(3)
    merged = projected(world, first, mu=0.5)
    assert merged.summary == {"method": "np-lora"}
    for key in WEIGHTS:
        stack = world.pairing.stacks[key]
        ours = sum(stack.ranks[:first])
        down = stack.down.double().flatten(1)
        q = torch.linalg.qr(down[ours:].T).Q
        wanted = down[:ours] - 0.5 / 1.5 * down[:ours] @ q @ q.T
        given = merged.stacks[key].down.flatten(1)
        if ours:
            close(given[:ours], wanted)
        assert torch.equal(given[ours:], stack.down.flatten(1)[ours:]), "the styles stay"
        assert torch.equal(merged.stacks[key].up, stack.up)
    assert torch.equal(merged.stacks[TEXT].down, world.pairing.stacks[TEXT].down)


def test_np_lora_without_bound_leaves_nothing_in_the_styles_space_and_0_everything():
    world = World()
    merged = projected(world, mu=1e9)
    for key in (CONV, LINEAR):
        stack = merged.stacks[key]
        down = stack.down.flatten(1)
        ours = stack.ranks[0]
        before = world.pairing.stacks[key].down.flatten(1)
        assert float((before[:ours] @ before[ours:].T).norm()) > 0.1
        assert float((down[:ours] @ down[ours:].T).norm()) < 1e-5
        assert down[:ours].norm() > 0.1
    for key, stack in projected(world, mu=0.0).stacks.items():
        assert torch.equal(stack.down, world.pairing.stacks[key].down)


def test_rows_that_are_zero_or_repeated_span_nothing_of_their_own():
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [6.0, 8.0, 0.0]])
    basis = row_space(rows)
    assert basis.shape == (3, 1)
    close(basis.abs(), torch.tensor([[0.6], [0.8], [0.0]]))
    assert row_space(torch.zeros(2, 3)).shape == (3, 0)
    assert row_space(torch.zeros(0, 3)).shape == (3, 0)


# --- rank masks --------------------------------------------------------------------------------------------------


def test_rank_masks_scale_ranks_and_learn():
    world = World(3)
    merged = world.run("rank-masks", steps=40, lr=0.05)
    start = world.run("rank-masks", steps=1, lr=1e-9).summary
    assert sum(merged.summary["error"]) < 0.8 * sum(start["error"])
    ranks = {key: sum(stack.ranks) for key, stack in world.pairing.stacks.items() if key != TEXT}
    assert {key: len(m) for key, m in merged.coefficients.items()} == ranks
    assert merged.summary["coefficients"] == sum(ranks.values())
    own = [[] for _ in range(3)]
    for key, m in merged.coefficients.items():
        stack = world.pairing.stacks[key]
        close(merged_delta(merged, key), stack.up.double() @ torch.diag(m.double()) @ stack.down.double().flatten(1))
        for i, part in enumerate(m.split(stack.ranks)):
            own[i] += part.tolist()
    assert merged.summary["mean"] == pytest.approx([sum(m) / len(m) for m in own], rel=1e-5)
    assert merged.history[-1]["penalty"] == 0.0


def test_the_gradient_of_rank_masks_is_that_of_the_dense_model(gradients):
    world = World()
    world.run("rank-masks", steps=1, start=0.6, lam=5.0)
    stacks = [world.pairing.stacks[key] for key in world.pairing.learned]
    m = torch.full((sum(sum(s.ranks) for s in stacks),), 0.6, dtype=torch.float64, requires_grad=True)
    parts = dict(zip(world.pairing.learned, m.split([sum(s.ranks) for s in stacks])))
    deltas = {
        key: (stack.up.double() * parts[key]) @ stack.down.double().flatten(1)
        for key, stack in zip(world.pairing.learned, stacks)
    }
    loss = 0.0
    for s in world.samples[:2]:  # the first of each
        loss = loss + (world.dense(deltas, s.x.double()) - s.target.double()).square().sum().sqrt()
    (wanted,) = torch.autograd.grad(loss, m)
    close(gradients[0], wanted, rtol=1e-3)
