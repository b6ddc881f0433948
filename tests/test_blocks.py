"""The UNet's blocks: computed again, kept in main memory, counted; the gradient is the same and nothing is left."""

import gc
import weakref
from contextlib import ExitStack, nullcontext

import pytest
import torch

from ziplora_lib.merge import blocks
from ziplora_lib.merge.attach import attach
from ziplora_lib.merge.blocks import blocks_of, kept, offloaded, recomputed, weights_freed


@pytest.fixture(scope="module")
def world():
    """-> (UNet, host, pairing, slots)"""
    pytest.importorskip("diffusers")
    from benchmarks.scale import RandomModel, Size, random_pair, unet

    size = Size((32, 64, 64), (1, 1), 16)
    model = unet(size)
    model.disable_gradient_checkpointing()
    model.requires_grad_(False).eval()
    return model, RandomModel(model, size), *random_pair(model, 4, where="transformer_blocks")


def prediction(world, side=16, rows=2):
    """A pass with coefficients; -> (the output, the coefficients by layer)."""
    _, host, pairing, slots = world
    m = {key: torch.ones(2, pairing.stacks[key].columns, requires_grad=True) for key in pairing.learned}
    x = torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(0))
    with attach(slots, pairing.stacks) as router:
        router.merged({key: lambda stack, key=key: stack.folded_down(m[key]) for key in m})
        out = host.predict(x, torch.full((rows,), 500), [host.encode("x", 0)] * rows)
        out.square().sum().backward()
    return out.detach(), {key: row.grad for key, row in m.items()}


def test_every_block_is_found_once_also_one_that_another_extension_derived(world):
    model = world[0]
    found = blocks_of(model)
    names = {type(block).__name__ for block in found}
    assert names == {"BasicTransformerBlock", "ResnetBlock2D"}
    inside = [id(m) for block in found for m in block.modules()]
    assert len(inside) == len(set(inside)), "none is in another"
    derived = type("ToMeBlock", (type(found[0]),), {})
    before, found[0].__class__ = found[0].__class__, derived
    try:
        assert blocks_of(model) == found
    finally:
        found[0].__class__ = before


@pytest.mark.parametrize("way", ["recomputed", "both"])
def test_the_same_output_and_gradient_to_the_bit_and_nothing_left(world, way):
    model = world[0]
    wanted, gradients = prediction(world)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with offloaded(model, "cpu") if way == "both" else nullcontext(), recomputed(model):
        out, given = prediction(world)
    assert torch.equal(out, wanted)
    assert all(gradients[key].any() for key in gradients)
    assert all(torch.equal(given[key], gradients[key]) for key in gradients)
    assert not any("forward" in vars(block) for block in blocks_of(model))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


class Elsewhere:
    """Main memory and device told apart on a machine that has one: what lies at home is of no use, and fetched by copying."""

    def __init__(self, model, monkeypatch):
        inside = {id(p) for block in blocks_of(model) for p in block.parameters()}
        self.truth, self.alive, self.most = {}, 0, 0

        def put(p, device):
            if p.data_ptr() in self.truth:  # back again
                p.data = self.truth.pop(p.data_ptr())
            elif id(p) in inside:
                here, p.data = p.data, torch.full_like(p.data, torch.nan)
                self.truth[p.data_ptr()] = here

        def fetch(weight, device):
            copy = self.truth[weight.data_ptr()].clone()
            self.alive += copy.nbytes
            self.most = max(self.most, self.alive)
            weakref.finalize(copy, self._gone, copy.nbytes)
            return copy

        monkeypatch.setattr(blocks, "_put", put)
        monkeypatch.setattr(blocks, "_fetched", fetch)

    def _gone(self, size):
        self.alive -= size


def test_offloaded_weights_come_for_their_block_alone_and_again_for_its_backward(world, monkeypatch):
    """With weights that lie elsewhere, unusable there: the same gradient, and never more than a block or two of them here."""
    model = world[0]
    wanted, gradients = prediction(world)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    elsewhere = Elsewhere(model, monkeypatch)
    with offloaded(model, "cpu"), recomputed(model):
        out, given = prediction(world)
        gc.collect()
        assert elsewhere.alive == 0, "after the backward none is left on the device"
    assert torch.equal(out, wanted)
    assert all(torch.equal(given[key], gradients[key]) for key in gradients)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(model)]
    assert 0 < elsewhere.most <= 2 * max(sizes) < sum(sizes) / 2
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_a_weight_that_cannot_be_put_back_keeps_none_of_the_others(world, monkeypatch):
    """As where a card is full; what is said is what went wrong."""
    model = world[0]
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    elsewhere = Elsewhere(model, monkeypatch)
    put, calls = blocks._put, []

    def failing(p, device):
        calls.append(p)
        put(p, device)
        if len(calls) == len(places) + 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(blocks, "_put", failing)
    with pytest.raises(torch.cuda.OutOfMemoryError), offloaded(model, "cpu"):
        pass
    assert elsewhere.truth == {}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_weights_come_back_after_an_error(world):
    model = world[0]
    values = {name: p.data.clone() for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), offloaded(model, "cpu"), recomputed(model):
        raise ZeroDivisionError
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(block) for block in blocks_of(model))


def test_what_is_kept_is_counted_as_the_allocator_sees_it(world):
    """Against the bytes of all tensors that are alive between forward and backward, in three ways of running."""
    model, host, pairing, slots = world

    def alive():
        gc.collect()
        found = {}
        for t in gc.get_objects():
            if issubclass(type(t), torch.Tensor):
                found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return sum(found.values())

    def forward():
        m = {key: torch.ones(2, pairing.stacks[key].columns, requires_grad=True) for key in pairing.learned}
        router.merged({key: lambda stack, key=key: stack.folded_down(m[key]) for key in m})
        return host.predict(torch.zeros(1, 4, 16, 16), torch.tensor([500]), [host.encode("x", 0)])

    with attach(slots, pairing.stacks) as router:
        counted = kept(model, forward)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()), lambda t: t):
            before = alive()
            out = forward()
            held = alive() - before
        del out
    assert len(counted.blocks) == len(blocks_of(model))
    assert counted.blocks[0] == 0, "no coefficient lies before it"
    assert min(counted.blocks[3:]) > 0
    assert counted.inputs > 0
    assert counted.recomputed < counted.all
    # the LoRAs' own factors are saved too, and were there before; a few tensors are alive that no backward needs
    factors = sum(stack.up.nbytes + stack.down.nbytes for stack in pairing.stacks.values())
    assert counted.all - factors <= held <= 1.1 * counted.all


def test_weights_freed_are_all_blocks_but_the_largest(world):
    model = world[0]
    sizes = sorted(sum(p.nbytes for p in block.parameters()) for block in blocks_of(model))
    assert weights_freed(model) == sum(sizes[:-1])
    with ExitStack() as stack:
        stack.enter_context(offloaded(model, "cpu"))
        assert weights_freed(model) == sum(sizes[:-1])
