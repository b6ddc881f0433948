"""What LoRAs add to norms and biases: attached it is the changed model, and the saved file has it for others and for us."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ziplora_lib.errors import BadInput
from ziplora_lib.lora import writer
from ziplora_lib.lora.delta import LowRankDelta
from ziplora_lib.lora.extras import extra_tensors
from ziplora_lib.lora.reader import read
from ziplora_lib.lora.stack import Stack
from ziplora_lib.lora.vectors import Vectors
from ziplora_lib.merge.attach import Slot, attach

# (module, input), in float64
CASES = {
    "group norm, pictures": lambda: (nn.GroupNorm(4, 8), torch.randn(3, 8, 5, 6)),
    "group norm, tokens": lambda: (nn.GroupNorm(4, 8, eps=1e-2), torch.randn(3, 8, 7)),
    "layer norm, tokens": lambda: (nn.LayerNorm(8), torch.randn(3, 7, 8)),
    "layer norm, one row": lambda: (nn.LayerNorm(8, eps=1e-2), torch.randn(3, 8)),
    "linear, tokens": lambda: (nn.Linear(6, 8), torch.randn(3, 7, 6)),
    "linear, one row": lambda: (nn.Linear(6, 8), torch.randn(3, 6)),
    "linear, picture-like": lambda: (nn.Linear(6, 8), torch.randn(3, 2, 5, 6)),
    "convolution": lambda: (nn.Conv2d(6, 8, 3, padding=1), torch.randn(3, 6, 5, 4)),
    "convolution, stride": lambda: (nn.Conv2d(6, 8, 3, stride=2), torch.randn(3, 6, 9, 8)),
}
NORMS = [name for name in CASES if "norm" in name]


def case(name):
    torch.manual_seed(0)
    module, x = CASES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.requires_grad_(False), x


def vectors_of(module, weight):
    generator = torch.Generator().manual_seed(1)
    size = module.bias.numel()
    rows = [torch.randn(2, size, generator=generator) for _ in range(2)]
    return Vectors(rows[0] if weight else None, rows[1])


def stack_of(module):
    generator, shape = torch.Generator().manual_seed(2), tuple(module.weight.shape)
    return Stack.of([
        LowRankDelta(torch.randn(shape[0], r, generator=generator), torch.randn(r, *shape[1:], generator=generator), 0.4)
        for r in (2, 3)
    ])  # fmt: skip


def changed(module, route, vectors, stack=None, m=None):
    """The module with its parameters changed themselves."""
    other = copy.deepcopy(module)
    for i, strength in enumerate(route):
        if vectors.weight is not None:
            other.weight.data += strength * vectors.weight[i]
        other.bias.data += strength * vectors.bias[i]
        if stack is not None:
            delta = stack.part(i).dense() * (1 if m is None else m[i].reshape(module.weight.shape[1:]))
            other.weight.data += strength * delta
    return other


def equal(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "with_delta"), [*((name, False) for name in CASES), *((name, True) for name in CASES if name not in NORMS)]
)
def test_every_way_to_route_equals_changed_parameters(name, with_delta):
    module, x = case(name)
    vectors, stack = vectors_of(module, name in NORMS), stack_of(module) if with_delta else None
    plain, stacks = copy.deepcopy(module), {"layer": stack} if with_delta else {}
    with attach({"layer": Slot(module)}, stacks, {"layer": vectors}) as router:
        assert router.parents == 2
        assert torch.equal(module(x), plain(x)), "nothing is routed yet"
        router.merged()
        equal(module(x), changed(plain, (1, 1), vectors, stack)(x))
        router.merged(weights=[0.7, -1.2])
        equal(module(x), changed(plain, (0.7, -1.2), vectors, stack)(x))
        for i, route in enumerate([(1, 0), (0, 1)]):
            router.alone(i)
            equal(module(x), changed(plain, route, vectors, stack)(x))
        # a route for each sample
        router.alone(1, None, 0)
        wanted = [changed(plain, route, vectors, stack)(x)[i] for i, route in enumerate([(0, 1), (0, 0), (1, 0)])]
        equal(module(x), torch.stack(wanted))
        if with_delta:  # the coefficients are the columns' alone
            m = torch.rand(2, stack.columns)
            router.merged({"layer": lambda stack: stack.folded_down(m)})
            equal(module(x), changed(plain, (1, 1), vectors, stack, m)(x))
        router.bare()
        assert torch.equal(module(x), plain(x))
    assert torch.equal(module(x), plain(x))
    assert not module._forward_hooks


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_norm_with_one_of_the_two(part):
    module, x = case("layer norm, tokens")
    both = vectors_of(module, True)
    alone = Vectors(weight=both.weight) if part == "weight" else Vectors(bias=both.bias)
    other = copy.deepcopy(module)
    getattr(other, part).data += getattr(both, part).sum(0)
    with attach({"layer": Slot(module)}, {}, {"layer": alone}) as router:
        router.merged()
        equal(module(x), other(x))


def test_a_norm_without_parameters_of_its_own():
    torch.manual_seed(0)
    module, x = nn.LayerNorm(8, bias=False).requires_grad_(False), torch.randn(3, 7, 8)
    added = Vectors(bias=torch.randn(1, 8))
    with attach({"layer": Slot(module)}, {}, {"layer": added}) as router:
        router.merged()
        equal(module(x), torch.nn.functional.layer_norm(x, (8,), module.weight, added.bias[0]))


def test_half_precision_keeps_its_dtype():
    module, x = case("group norm, pictures")
    vectors, half = vectors_of(module, True), copy.deepcopy(module).bfloat16()
    with attach({"layer": Slot(half)}, {}, {"layer": vectors}) as router:
        router.alone(0, 1, None)
        given = half(x.bfloat16())
    assert given.dtype == torch.bfloat16
    wanted = [changed(module, route, vectors)(x)[i] for i, route in enumerate([(1, 0), (0, 1), (0, 0)])]
    torch.testing.assert_close(given.float(), torch.stack(wanted), rtol=2e-2, atol=3e-2)


# --- the vectors of several LoRAs --------------------------------------------------------------------------


def test_strengths_are_in_the_rows_and_a_lora_without_any_has_zeros():
    dog, ink = Vectors(torch.ones(1, 3), torch.full((1, 3), 2.0)), Vectors(bias=torch.full((1, 3), 4.0))
    found = Vectors.of([dog, None, ink], [0.5, 3.0, 2.0])
    assert found.weight.tolist() == [[0.5] * 3, [0.0] * 3, [0.0] * 3]
    assert found.bias.tolist() == [[1.0] * 3, [0.0] * 3, [8.0] * 3]
    assert found.size == 3
    assert found.scaled([2.0, 1.0, 0.5]).bias.tolist() == [[2.0] * 3, [0.0] * 3, [4.0] * 3]
    assert found.row(1) is None
    assert not found.row(2).weight.any()
    assert found.row(2).bias.tolist() == [[8.0] * 3]


# --- in a file -----------------------------------------------------------------------------------------------

BLOCK = "lora_unet_input_blocks_4"
BOTH, BIAS = f"{BLOCK}_0_in_layers_2", f"{BLOCK}_1_proj_in"
NORM, PLAIN, GONE = f"{BLOCK}_1_norm", f"{BLOCK}_1_proj_out", f"{BLOCK}_9_proj_in"
MODEL = {BOTH: (8, 6, 3, 3), BIAS: (8, 6), NORM: (8,)}
METADATA = {"ziplora.ranks": "{}"}


@pytest.fixture
def merge():
    """(stacks, vectors): a layer with ΔW and bias, one with a bias alone, a norm, and a plain layer."""
    conv, linear = nn.Conv2d(6, 8, 3), nn.Linear(6, 8)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(2, 8, generator=generator) for _ in range(4)]
    stacks = {BOTH: stack_of(conv), PLAIN: stack_of(linear)}
    vectors = {BOTH: Vectors(bias=rows[0]), BIAS: Vectors(bias=rows[1]), NORM: Vectors(rows[2], rows[3])}
    return stacks, vectors


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_others_read_the_sum_and_we_the_parts(tmp_path, merge, dtype):
    stacks, vectors = merge
    plain, extra = extra_tensors(stacks, vectors, MODEL, lambda key: key)
    assert plain.keys() == {PLAIN}
    path = tmp_path / "merged.safetensors"
    saved = writer.write(path, plain, dtype, METADATA, False, extra=extra)
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    close = dict(rtol=2e-3, atol=1e-3) if dtype == "fp16" else dict(rtol=1e-5, atol=1e-6)
    assert saved["largest_error"] < (1e-3 if dtype == "fp16" else 1e-6)
    # what LyCORIS and the WebUI look for
    torch.testing.assert_close(tensors[f"{BOTH}.diff"], stacks[BOTH].total().dense(), **close)
    torch.testing.assert_close(tensors[f"{BOTH}.diff_b"], vectors[BOTH].bias.sum(0), **close)
    assert tensors[f"{BIAS}.diff"].shape == MODEL[BIAS]
    assert not tensors[f"{BIAS}.diff"].any()
    torch.testing.assert_close(tensors[f"{BIAS}.diff_b"], vectors[BIAS].bias.sum(0), **close)
    torch.testing.assert_close(tensors[f"{NORM}.w_norm"], vectors[NORM].weight.sum(0), **close)
    torch.testing.assert_close(tensors[f"{NORM}.b_norm"], vectors[NORM].bias.sum(0), **close)
    assert f"{NORM}.diff" not in tensors
    # and what we do
    lora = read(path)
    assert lora.dense == {}
    assert lora.deltas.keys() == stacks.keys()
    assert lora.vectors.keys() == vectors.keys()
    for key, stack in stacks.items():
        again = lora.deltas[key]
        assert again.rank == sum(stack.ranks)
        torch.testing.assert_close(again.dense(), stack.total().dense(), **close)
        halves = Stack(again.up.float() * again.scale, again.down.float(), stack.ranks)
        for i in range(2):
            torch.testing.assert_close(halves.part(i).dense(), stack.part(i).dense(), **close)
    for key, added in vectors.items():
        for given, wanted in ((lora.vectors[key].weight, added.weight), (lora.vectors[key].bias, added.bias)):
            assert (given is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(given.float(), wanted, **close)


def test_a_bias_of_a_layer_that_is_nowhere_has_no_place():
    plain, extra = extra_tensors({}, {GONE: Vectors(bias=torch.ones(2, 8))}, MODEL, lambda key: key)
    assert plain == extra == {}


def test_a_saved_merge_goes_into_the_next_one_as_it_is(tmp_path, merge):
    """Its norms and biases count once, however many parents it had."""
    stacks, vectors = merge
    plain, extra = extra_tensors(stacks, vectors, MODEL, lambda key: key)
    writer.write(tmp_path / "merged.safetensors", plain, "fp32", METADATA, False, extra=extra)
    lora = read(tmp_path / "merged.safetensors")
    again = Vectors.of([lora.vectors[NORM], None], [0.5, 1.0])
    torch.testing.assert_close(again.weight[0], 0.5 * vectors[NORM].weight.sum(0))
    torch.testing.assert_close(again.bias[0], 0.5 * vectors[NORM].bias.sum(0))
    assert again.bias.shape == (2, 8)


def test_a_file_whose_parts_another_tool_has_changed_is_refused(tmp_path, merge):
    plain, extra = extra_tensors(*merge, MODEL, lambda key: key)
    writer.write(tmp_path / "merged.safetensors", plain, "fp32", METADATA, False, extra=extra)
    tensors = load_file(tmp_path / "merged.safetensors")
    tensors[f"{BOTH}.ziplora_down"] = tensors[f"{BOTH}.ziplora_down"][:-1].clone()
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(BadInput, match="factors do not fit") as caught:
        read(tmp_path / "cut.safetensors")
    assert BOTH in caught.value.key


# --- on a whole model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norms", "full"])
def test_attached_to_the_miniature_it_is_the_changed_model(host, tmp_path, name):
    """Norms, biases and weights of all layers together: the prediction of a copy whose parameters are changed themselves."""
    pytest.importorskip("lycoris.kohya")
    import kinds

    from ziplora_lib.hosts.miniature import build_miniature
    from ziplora_lib.merge.pairing import pair
    from ziplora_lib.opening import opened

    written = kinds.write(kinds.FILES[name], build_miniature(), tmp_path, "fp32")
    (parent,) = opened([host.open(str(written.path))], host, None, lambda info: None)
    slots = host.slots([*parent.lora.layers, *parent.lora.vectors])
    strength = 0.3
    pairing = pair([parent.lora], [strength], {key: slot.shape for key, slot in slots.items()})
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 800])

    def predict():
        with torch.no_grad():
            conds = [host.encode(text, 64) for text in ("a photo of sks cat", "")]
            return torch.cat([host.predict(x, t, conds).flatten(), conds[0][0].flatten(), conds[0][1].flatten()])

    bare = predict()
    with attach(slots, pairing.stacks, pairing.vectors) as router:
        router.merged()
        attached = predict()
    assert torch.equal(predict(), bare)
    with torch.no_grad():
        for key, slot in slots.items():
            weight, bias = written.vectors.get(key, (None, None))
            for parameter, added in ((slot.module.weight, written.deltas.get(key, weight)), (slot.module.bias, bias)):
                if added is not None:
                    parameter.add_(strength * added)
    wanted = predict()
    assert float((wanted - bare).norm()) > 0.02 * float(bare.norm())
    assert float((attached - wanted).norm()) < 1e-3 * float((wanted - bare).norm())
