"""The blocks of a live UNet: computed again in the backward, kept in main memory, and what each holds for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# sgm's, ldm's and diffusers' names, also of what other extensions derive from them
BLOCKS = {"BasicTransformerBlock", "ResBlock", "ResnetBlock2D"}


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """In the order of the modules; none is inside another."""
    return [m for m in unet.modules() if any(kind.__name__ in BLOCKS for kind in type(m).__mro__)]


@contextmanager
def recomputed(unet: nn.Module) -> Iterator[None]:
    """Each block keeps its inputs alone, and is computed again in the backward.

    Not the re-entrant kind, sgm's own: that gives no gradient where all weights are frozen.
    """

    def wrap(_block: nn.Module, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            # nothing in a model in eval mode is random
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    with _wrapped(blocks_of(unet), wrap):
        yield


@contextmanager
def offloaded(unet: nn.Module, device: torch.device | str) -> Iterator[None]:
    """The blocks' weights lie in main memory, and come to the device while their block runs; the others lie on the device.

    Within `recomputed`, so that a block's weights come again for its backward. Exit puts every weight back where it was.
    The weights that a block runs with are other tensors than the parameters: autograd keeps those that it has seen, and a
    parameter whose data is swapped between forward and backward silently gives wrong gradients.
    """
    device = torch.device(device)
    blocks = blocks_of(unet)
    inside = {id(p) for block in blocks for p in block.parameters()}
    found = [(p, p.device) for p in unet.parameters()]

    def wrap(block: nn.Module, forward: Callable) -> Callable:
        held = [(m, name) for m in block.modules() for name, p in m._parameters.items() if p is not None]

        def run(*args, **kwargs):
            before = [m._parameters[name] for m, name in held]
            try:
                for (m, name), p in zip(held, before):
                    m._parameters[name] = _fetched(p.data, device)
                return forward(*args, **kwargs)
            finally:
                for (m, name), p in zip(held, before):
                    m._parameters[name] = p

        return run

    with ExitStack() as back:  # one that fails leaves the others to be put back
        for p, was in found:
            back.callback(_put, p, was)
            _put(p, torch.device("cpu") if id(p) in inside else device)
        with _wrapped(blocks, wrap):
            yield


def _put(p: nn.Parameter, device: torch.device) -> None:
    # not into page-locked memory: what PyTorch once took of that it keeps for good
    p.data = p.data.to(device)


def _fetched(weight: Tensor, device: torch.device) -> Tensor:
    return weight.to(device)


@contextmanager
def _wrapped(blocks: Sequence[nn.Module], wrap: Callable[[nn.Module, Callable], Callable]) -> Iterator[None]:
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = wrap(block, block.forward)
        yield
    finally:
        for block, forward in before:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


@dataclass(frozen=True)
class Kept:
    """Bytes that a pass keeps for its backward.

    outside: of what is in no block; inputs: of the blocks; blocks: of each block, in the order in which they ran. What
    several share counts for the first.
    """

    outside: int
    inputs: int
    blocks: tuple[int, ...]

    @property
    def all(self) -> int:
        return self.outside + sum(self.blocks)

    @property
    def recomputed(self) -> int:
        """Where blocks are computed again: at most one of them is there in full."""
        return self.outside + self.inputs + max(self.blocks, default=0)


def kept(unet: nn.Module, forward: Callable[[], object]) -> Kept:
    """Counts what one pass with gradients keeps, weights left out. Nothing is changed."""
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    # by block, None for none
    saved: dict[nn.Module | None, int] = {None: 0}
    inputs = 0
    now: list[nn.Module | None] = [None]
    # held on to, so that no storage is taken for one that is gone
    seen: dict[int, torch.UntypedStorage] = {}
    given_in: dict[int, torch.UntypedStorage] = {}

    def new(tensor: Tensor, where: dict[int, torch.UntypedStorage]) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in weights or storage._cdata in where:
            return 0
        where[storage._cdata] = storage
        return storage.nbytes()

    def count(tensor: Tensor) -> None:
        # nothing is given back: no backward comes, and a graph that holds itself would stay for good
        saved[now[0]] += new(tensor, seen)

    def wrap(block: nn.Module, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            nonlocal inputs
            for given in (*args, *kwargs.values()):
                if isinstance(given, Tensor):
                    inputs += new(given, given_in)
            now[0], saved[block] = block, 0
            try:
                return forward(*args, **kwargs)
            finally:
                now[0] = None

        return run

    with _wrapped(blocks_of(unet), wrap), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, _never):
        result = forward()
    del result
    return Kept(saved.pop(None), inputs, tuple(saved.values()))


def _never(_: None) -> Tensor:
    raise AssertionError("a pass that is only counted has no backward")


def weights_freed(unet: nn.Module) -> int:
    """Bytes of weights that `offloaded` takes from the device: all blocks' but for the largest one's, which runs."""
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(unet)]
    return sum(sizes) - max(sizes, default=0)
