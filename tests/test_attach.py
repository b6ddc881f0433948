"""Deltas on live modules: the same outputs as dense ΔW added to the weights, a route per sample, and no trace after."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.stack import Stack
from ziplora_lib.merge.attach import HEADS, Slot, attach

torch.manual_seed(0)


def stack_for(shape, ranks=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Stack.of([
        LowRankDelta(torch.randn(shape[0], r, generator=generator), torch.randn(r, *shape[1:], generator=generator), 0.4)
        if r
        else None
        for r in ranks
    ])  # fmt: skip


def dense_of(stack, strengths, m=None):
    """Σ strength · m ⊗ ΔW, dense, in float64."""
    total = torch.zeros(stack.shape, dtype=torch.float64)
    for i, strength in enumerate(strengths):
        if (part := stack.part(i)) is not None:
            delta = (part.up.double() @ part.down.double().flatten(1)).reshape(stack.shape)
            total += strength * delta * (1 if m is None else m[i].reshape(stack.shape[1:]).double())
    return total


def conv(**options):
    return nn.Conv2d(3, 4, options.pop("kernel_size", 3), **options)


# (module, input) in float64
CASES = {
    "linear": lambda: (nn.Linear(6, 5), torch.randn(4, 7, 6)),
    "linear, flat input": lambda: (nn.Linear(6, 5), torch.randn(4, 6)),
    "linear, picture-like input": lambda: (nn.Linear(6, 5), torch.randn(4, 2, 7, 6)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), torch.randn(4, 7, 6)),
    "conv 1x1": lambda: (conv(kernel_size=1), torch.randn(4, 3, 8, 8)),
    "conv 3x3": lambda: (conv(padding=1), torch.randn(4, 3, 8, 8)),
    "conv, stride and no padding": lambda: (conv(stride=2), torch.randn(4, 3, 9, 8)),
    "conv, circular": lambda: (conv(padding=1, padding_mode="circular"), torch.randn(4, 3, 8, 8)),
    "conv, circular with stride": lambda: (conv(stride=2, padding=(1, 2), padding_mode="circular"), torch.randn(4, 3, 8, 8)),
    "conv, dilation": lambda: (conv(dilation=2, padding=2), torch.randn(4, 3, 8, 8)),
    "conv, uneven kernel": lambda: (conv(kernel_size=(1, 3), padding=(0, 1)), torch.randn(4, 3, 8, 8)),
}  # fmt: skip


def case(name):
    torch.manual_seed(1)
    module, x = CASES[name]()
    return module.double().requires_grad_(False), x.double()


def with_dense(module, delta):
    changed = copy.deepcopy(module)
    changed.weight.data += delta
    return changed


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [(3, 2), (0, 2), (3, 0)], ids=str)
def test_every_way_to_route_equals_dense_weights(name, ranks):
    module, x = case(name)
    stack = stack_for(tuple(module.weight.shape), ranks)
    m, plain = torch.randn(2, stack.columns, dtype=torch.float64), copy.deepcopy(module)
    with attach({"layer": Slot(module)}, {"layer": stack}) as router:
        assert torch.equal(module(x), with_dense(plain, 0)(x)), "nothing is routed yet"
        router.merged()
        equal(module(x), with_dense(plain, dense_of(stack, (1, 1)))(x))
        router.merged(weights=[0.7, 1.15])
        equal(module(x), with_dense(plain, dense_of(stack, torch.tensor([0.7, 1.15]).double()))(x))
        router.merged({"layer": lambda stack: stack.folded_down(m)})
        equal(module(x), with_dense(plain, dense_of(stack, (1, 1), m))(x))
        for i, strengths in enumerate([(1, 0), (0, 1)]):
            router.alone(i)
            equal(module(x), with_dense(plain, dense_of(stack, strengths))(x))
        router.bare()
        assert torch.equal(module(x), with_dense(plain, 0)(x))


@pytest.mark.parametrize("name", CASES)
def test_a_route_per_sample_equals_separate_passes(name):
    module, x = case(name)
    stack, plain = stack_for(tuple(module.weight.shape)), copy.deepcopy(module)
    with attach({"layer": Slot(module)}, {"layer": stack}) as router:
        router.alone(0, None, 1, 0)
        together = module(x)
        separate = []
        for k, who in enumerate([0, None, 1, 0]):
            router.alone(who) if who is not None else router.bare()
            separate.append(module(x[k : k + 1]))
    equal(together, torch.cat(separate))
    for k, strengths in enumerate([(1, 0), (0, 0), (0, 1), (1, 0)]):
        equal(together[k : k + 1], with_dense(plain, dense_of(stack, strengths))(x[k : k + 1]))


@pytest.mark.parametrize("name", CASES)
def test_columns_are_what_the_weight_meets(name):
    module, x = case(name)
    slot = Slot(module)
    without_bias = copy.deepcopy(module)
    without_bias.bias = None
    wanted = without_bias(x)
    wanted = wanted.movedim(1, -1) if isinstance(module, nn.Conv2d) else wanted
    columns = slot.columns(x)
    assert columns.dtype == torch.float32
    given = columns.double() @ slot.weight.flatten(1).T
    torch.testing.assert_close(given, wanted.flatten(0, -2), rtol=1e-5, atol=1e-5)


def attention_case(batch_first, bias=True):
    torch.manual_seed(2)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias).double().eval().requires_grad_(False)
    for parameter in attention.parameters():
        parameter.data.normal_()
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    return attention, x if batch_first else x.transpose(0, 1)


def dense_attention(attention, deltas):
    changed = copy.deepcopy(attention)
    for head, delta in deltas.items():
        if head == "out":
            changed.out_proj.weight.data += delta
        else:
            start = 8 * HEADS.index(head)
            changed.in_proj_weight.data[start : start + 8] += delta
    return changed


MASKS = {
    "none": None,
    "float": torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1),
    "soft": torch.linspace(-2, 2, 25, dtype=torch.float64).reshape(5, 5),
    "bool": torch.ones(5, 5, dtype=torch.bool).triu(1),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [HEADS, ("v",), ("q", "out")], ids="".join)
def test_attention_equals_dense_weights(batch_first, bias, mask, heads):
    attention, x = attention_case(batch_first, bias)
    stacks = {head: stack_for((8, 8), seed=i) for i, head in enumerate(heads)}
    slots = {head: Slot(attention, head) for head in heads}
    assert all(slot.shape == (8, 8) for slot in slots.values())
    m, plain = {head: torch.randn(2, 8, dtype=torch.float64) for head in heads}, copy.deepcopy(attention)

    def wanted(strengths, m=None, x=x):
        deltas = {head: dense_of(stack, strengths, m and m[head]) for head, stack in stacks.items()}
        return dense_attention(plain, deltas)(x, x, x, need_weights=False, attn_mask=MASKS[mask])[0]

    def given(x=x):
        output, weights = attention(x, x, x, need_weights=False, attn_mask=MASKS[mask])
        assert weights is None
        return output

    with attach(slots, stacks) as router:
        equal(given(), wanted((0, 0)))
        router.merged()
        equal(given(), wanted((1, 1)))
        router.merged({head: partial(Stack.folded_down, m=values) for head, values in m.items()})
        equal(given(), wanted((1, 1), m))
        router.alone(1, 0, None, 1)
        output = given() if batch_first else given().transpose(0, 1)
        for k, strengths in enumerate([(0, 1), (1, 0), (0, 0), (0, 1)]):
            one = x[k : k + 1] if batch_first else x[:, k : k + 1]
            single = wanted(strengths, x=one)
            equal(output[k : k + 1], single if batch_first else single.transpose(0, 1))


def test_causal_attention():
    attention, x = attention_case(True)
    stack = stack_for((8, 8))
    wanted = dense_attention(attention, {"k": dense_of(stack, (1, 1))})
    with attach({"k": Slot(attention, "k")}, {"k": stack}) as router:
        router.merged()
        given = attention(x, x, x, need_weights=False, attn_mask=MASKS["bool"], is_causal=True)[0]
    equal(given, wanted(x, x, x, need_weights=False, attn_mask=MASKS["bool"], is_causal=True)[0])


def test_attention_that_asks_for_more_is_refused_not_guessed():
    attention, x = attention_case(True)
    with attach({"k": Slot(attention, "k")}, {"k": stack_for((8, 8))}):
        with pytest.raises(NotImplementedError):
            attention(x, x, x)
        padding = torch.zeros(4, 5, dtype=torch.bool)
        with pytest.raises(NotImplementedError):
            attention(x, x, x, key_padding_mask=padding, need_weights=False)


class Whole(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.linear(x)

    def slots(self):
        heads = {f"attention_{head}": Slot(self.attention, head) for head in HEADS}
        return {"conv": Slot(self.conv), "linear": Slot(self.linear), **heads}


def whole():
    model = Whole().eval()
    stacks = {key: stack_for(slot.shape, seed=i) for i, (key, slot) in enumerate(model.slots().items())}
    return model, stacks, torch.randn(2, 3, 4, 4)


def traces(model):
    """All that a module keeps: its own attributes by identity, tables by content."""
    found = {}
    for name, module in model.named_modules():
        for field, value in vars(module).items():
            found[name, field] = dict(value) if isinstance(value, dict) else id(value)
    return found


@pytest.mark.parametrize("ending", ["normal", "error inside", "error in a forward", "interrupt"])
def test_no_trace_is_left(ending):
    model, stacks, x = whole()
    own = []
    model.linear.register_forward_hook(lambda *_: own.append(1))
    before, output, state = traces(model), model(x), {k: v.clone() for k, v in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    try:
        with attach(model.slots(), stacks) as router:
            router.merged()
            assert not torch.allclose(model(x), output)
            if ending == "error inside":
                raise RuntimeError
            if ending == "error in a forward":
                model(x[:, :2])
            if ending == "interrupt":
                raise KeyboardInterrupt
    except (RuntimeError, KeyboardInterrupt):
        assert ending != "normal"
    else:
        assert ending == "normal"
    assert traces(model) == before
    assert [name for name, _ in model.named_modules()] == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(model(x), output)
    assert own


def test_a_failure_while_attaching_leaves_no_trace():
    model, stacks, _ = whole()
    before = traces(model)
    slots = {**model.slots(), "broken": Slot("no module")}
    with pytest.raises(AttributeError), attach(slots, {**stacks, "broken": stack_for((2, 2))}):
        pass
    assert traces(model) == before


def test_somebody_elses_forward_is_put_back():
    """Other extensions, too, hang a forward of their own on a module."""
    model, stacks, x = whole()
    original, calls = model.attention.forward, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.attention.forward = theirs
    with attach(model.slots(), stacks):
        model(x)
    assert model.attention.forward is theirs
    calls.clear()
    model(x)
    assert calls


def test_layers_without_a_slot_are_left_out_and_attaching_again_is_independent():
    model, stacks, x = whole()
    slots = model.slots()
    only = {"linear": slots["linear"]}
    with attach(only, stacks) as router:
        router.merged()
        first = model(x)
    changed = copy.deepcopy(model)
    changed.linear.weight.data += dense_of(stacks["linear"], (1, 1)).float()
    torch.testing.assert_close(first, changed(x), rtol=1e-4, atol=1e-4)
    with attach(only, stacks) as router:
        router.merged()
        assert torch.equal(model(x), first)


def test_weights_never_change_while_attached():
    model, stacks, x = whole()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with attach(model.slots(), stacks) as router:
        router.merged()
        model(x)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, other than views of the tensors given."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.numel, self.operation = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            new = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known
            if new and tensor.numel() > self.numel:
                self.numel, self.operation = tensor.numel(), func
        return result


def test_a_dense_delta_is_never_formed():
    width, rank, batch = 4096, 4, 2
    layer = nn.Linear(width, width, bias=False).requires_grad_(False)
    parents = [LowRankDelta(torch.randn(width, rank), torch.randn(rank, width), 0.5) for _ in "cs"]
    x = torch.randn(batch, 3, width, requires_grad=True)
    with Largest(layer.weight) as seen:
        stack = Stack.of(parents)
        m = torch.full((2, width), 0.5, requires_grad=True)
        with attach({"layer": Slot(layer)}, {"layer": stack}) as router:
            router.merged({"layer": lambda stack: stack.folded_down(m)})
            layer(x).square().sum().backward()
            router.alone(0, 1)
            layer(x)
        stack.column_grams()
        stack.merged(m)
        parents[0].norm()
        parents[0].column_cosine(parents[1])
    assert m.grad.abs().sum() > 0
    assert x.grad is not None
    assert seen.numel >= batch * 3 * width, "the check saw the layer's own outputs"
    assert seen.numel <= 2 * rank * width, f"{seen.operation} made {seen.numel} values"
    with Largest(layer.weight) as seen:
        parents[0].dense()
    assert seen.numel == width * width, "the check sees a dense ΔW"


def test_half_precision_models_get_half_precision_outputs():
    layer = nn.Linear(6, 5).to(torch.bfloat16)
    stack = stack_for((5, 6))
    x = torch.randn(4, 6)
    with attach({"layer": Slot(layer)}, {"layer": stack}) as router:
        router.merged()
        output = layer(x.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    exact = layer.weight.double() + dense_of(stack, (1, 1))
    wanted = nn.functional.linear(x.to(torch.bfloat16).double(), exact, layer.bias.double())
    # bf16 keeps 8 bits: input to hidden to output are three roundings of terms of this size
    size = x.abs().double() @ (layer.weight.abs().double() + stack.up.abs().double() @ stack.down.abs().double()).T + 1
    assert ((output.double() - wanted).abs() <= 4 * 2.0**-8 * size).all()
