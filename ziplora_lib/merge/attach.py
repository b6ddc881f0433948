"""Deltas on live modules: while attached, chosen LoRAs take part in every forward; afterwards there is no trace.

Factorised, x -> down -> up, so ΔW is never formed. Each sample of a batch can have its own route, a strength for every
LoRA, applied between down and up where a LoRA is just some of the ranks: one batched pass serves all teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ziplora_lib.lora.stack import Stack
from ziplora_lib.lora.vectors import Vectors

HEADS = ("q", "k", "v", "out")

# What a layer has in place of its own `down`: made from its stack, on the stack's device, each time that the layer runs.
# -> (R, in…)
Down = Callable[[Stack], Tensor]
# What is shown a layer's inputs: (the LoRA that runs alone, x (tokens, columns) in fp32).
Visit = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Slot:
    """Where a layer key lives in a model: a Linear, Conv2d or norm, or one projection of a MultiheadAttention."""

    module: nn.Module
    head: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, (out, in…)."""
        if self.head is None:
            return tuple(self.module.weight.shape)
        return (self.module.embed_dim, self.module.embed_dim)

    @property
    def weight(self) -> Tensor:
        """The live weight, of `shape`."""
        if self.head in (None, "out"):
            return self.module.weight if self.head is None else self.module.out_proj.weight
        return self.module.in_proj_weight.chunk(3)[HEADS.index(self.head)]

    def columns(self, x: Tensor) -> Tensor:
        """The layer's input as the weight's columns meet it: x @ weight.flatten(1).T is the output, without the bias.

        x: (B, …, in), for a convolution (B, in, h, w) -> (tokens, columns), fp32; a convolution has a token for every
        position of its output, with in·kh·kw columns.
        """
        if self.head is not None or not isinstance(self.module, nn.Conv2d):
            return x.flatten(0, -2).float()
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x.float(), conv._reversed_padding_repeated_twice, mode)
        return F.unfold(x, conv.kernel_size, conv.dilation, stride=conv.stride).transpose(1, 2).flatten(0, 1)


class Router:
    """Which LoRAs take part in the next forwards.

    route: (B, P) strengths, (1, P) for the whole batch, or None for the bare model; downs: by layer key what a layer has in
    place of its own `down`. Set both before a forward, and leave them until after its backward.
    """

    def __init__(self, parents: int):
        self.parents = parents
        self.route: Tensor | None = None
        self.downs: Mapping[str, Down] = {}
        self._weighted = False
        self._visits: Mapping[str, Visit] = {}
        self._alone: tuple[int | None, ...] = ()

    def bare(self) -> None:
        self.route, self.downs = None, {}

    def alone(self, *parents: int | None) -> None:
        """One LoRA a sample, as it is; None for the bare model. One argument serves the whole batch."""
        self._choose([[float(i == parent) for i in range(self.parents)] for parent in parents], {})
        self._alone = parents

    def merged(self, downs: Mapping[str, Down] | None = None, weights: list[float] | None = None) -> None:
        """All LoRAs, with other downs where given and at the weights given: by default the plain sum."""
        self._choose([weights or [1.0] * self.parents], downs or {})

    def _choose(self, route: list[list[float]], downs: Mapping[str, Down]) -> None:
        self.route, self.downs, self._alone = torch.tensor(route), downs, ()
        self._weighted = any(weight != 1 for row in route for weight in row)

    @contextmanager
    def watching(self, visits: Mapping[str, Visit]) -> Iterator[None]:
        """Meanwhile, while LoRAs run alone, each of these layers is shown its inputs, sample by sample."""
        self._visits = visits
        try:
            yield
        finally:
            self._visits = {}

    def delta(self, key: str, stack: Stack, slot: Slot, x: Tensor) -> Tensor | None:
        """What the routed LoRAs add to this layer's output for input x; None if nothing."""
        if self.route is None:
            return None
        if (visit := self._visits.get(key)) is not None:
            with _full_precision(x.device):
                for k in range(len(x)):  # one at a time: a convolution's columns are many times its input
                    parent = self._alone[k if len(self._alone) > 1 else 0]
                    if parent is not None:
                        visit(parent, slot.columns(x[k : k + 1]))
        fold, x = self.downs.get(key), x.to(stack.up.dtype)
        down = stack.down if fold is None else fold(stack).to(x.dtype)
        # a convolution is the module's own, with its stride, padding and padding mode
        hidden = slot.module._conv_forward(x, down, None) if down.ndim == 4 else F.linear(x, down)
        if self._weighted:
            self.route = self.route.to(x.device)
            weights = stack.per_rank(self.route).to(hidden.dtype)
            # (B, R) over the dimensions between, or after, the sample and the rank
            between, after = (0, 2) if down.ndim == 4 else (hidden.ndim - 2, 0)
            hidden = hidden * weights.reshape(-1, *[1] * between, weights.shape[-1], *[1] * after)
        return F.conv2d(hidden, stack.up[:, :, None, None]) if down.ndim == 4 else F.linear(hidden, stack.up)

    def offset(self, vectors: Vectors, module: nn.Module, x: Tensor) -> Tensor | None:
        """What the routed LoRAs' norm weights and biases add to this layer's output for input x; None if nothing."""
        if self.route is None:
            return None
        # channels are last, but for convolutions and group norms
        first = isinstance(module, nn.Conv2d | nn.GroupNorm)

        def routed(rows: Tensor) -> Tensor:
            """(P, n) -> (B or 1, …, n, …), over the dimensions of the layer's output."""
            values = (self.route.to(x.device) @ rows).to(x.dtype)
            between, after = (0, x.ndim - 2) if first else (x.ndim - 2, 0)
            return values.reshape(len(values), *[1] * between, -1, *[1] * after)

        added = None if vectors.bias is None else routed(vectors.bias)
        if vectors.weight is None:
            return added
        # a norm is linear in its weight and bias
        if isinstance(module, nn.GroupNorm):
            normed = F.group_norm(x.float(), module.num_groups, eps=module.eps)
        else:
            normed = F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)
        scaled = normed.to(x.dtype) * routed(vectors.weight)
        return scaled if added is None else scaled + added


@contextmanager
def attach(
    slots: Mapping[str, Slot], stacks: Mapping[str, Stack], vectors: Mapping[str, Vectors] | None = None
) -> Iterator[Router]:
    """Attaches the stacks, and what goes to norms and biases, to the model; yields the Router: which LoRAs take part.

    Layers without a slot are left out. The factors go to each module's device, in the dtype that it computes in, while the
    coefficients that `downs` fold in may have more digits. Exit removes every hook.
    """
    vectors = vectors or {}
    parents = [len(stack.ranks) for stack in stacks.values()]
    parents += [len(rows) for v in vectors.values() for rows in (v.weight, v.bias) if rows is not None]
    router = Router(parents[0])
    heads: dict[nn.MultiheadAttention, dict[str, tuple[str, Stack, Slot]]] = {}
    undo = []
    try:
        for key, stack in stacks.items():
            if (slot := slots.get(key)) is None:
                continue
            if slot.head is None:
                undo.append(slot.module.register_forward_hook(_hook(router, key, stack, slot)).remove)
            else:
                heads.setdefault(slot.module, {})[slot.head] = (key, stack, slot)
        for attention, layers in heads.items():
            undo.append(_replace_forward(attention, router, layers))
        for key, added in vectors.items():
            slot = slots.get(key)
            if slot is not None and slot.head is None:
                undo.append(slot.module.register_forward_hook(_vector_hook(router, added)).remove)
        yield router
    finally:
        for remove in reversed(undo):
            remove()


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Without autocast, under which a host may run its model."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def _following(stack: Stack) -> Callable[[Tensor], Stack]:
    """The factors where a layer computes, in what it computes in: its output says so, its input does not under autocast."""
    there = [stack]

    def at(output: Tensor) -> Stack:
        if (there[0].up.device, there[0].up.dtype) != (output.device, output.dtype):
            there[0] = replace(stack, up=stack.up.to(output), down=stack.down.to(output))
        return there[0]

    return at


def _hook(router: Router, key: str, stack: Stack, slot: Slot):
    factors = _following(stack)

    def add_delta(_module, args, output):
        added = router.delta(key, factors(output), slot, args[0])
        return None if added is None else output + added.to(output.dtype)

    return add_delta


def _vector_hook(router: Router, vectors: Vectors):
    cached = [vectors]

    def add_vectors(module, args, output):
        x = args[0]
        rows = cached[0].weight if cached[0].bias is None else cached[0].bias
        if rows.device != output.device:
            cached[0] = cached[0].to(output.device)
        added = router.offset(cached[0], module, x if cached[0].weight is not None else output)
        return None if added is None else output + added.to(output.dtype)

    return add_vectors


def _replace_forward(attention: nn.MultiheadAttention, router: Router, layers: Mapping[str, tuple[str, Stack, Slot]]):
    """Self-attention with deltas on its fused projections: nn.MultiheadAttention offers no hook between them."""

    factors = {head: _following(stack) for head, (_, stack, _) in layers.items()}

    def project(head: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if head not in layers:
            return y
        key, _, slot = layers[head]
        added = router.delta(key, factors[head](y), slot, x)
        return y if added is None else y + added.to(y.dtype)

    def forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):  # fmt: skip
        if key_padding_mask is not None or need_weights:
            raise NotImplementedError("a text encoder that asks for attention weights or a padding mask")
        inputs = [x if attention.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        q, k, v = (
            project(head, x, w, b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for head, x, w, b in zip(HEADS, inputs, attention.in_proj_weight.chunk(3), biases)
        )
        mask = _logit_mask(attn_mask, q)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal and mask is None)
        y = project("out", y.transpose(1, 2).flatten(-2), attention.out_proj.weight, attention.out_proj.bias)
        return (y if attention.batch_first else y.transpose(0, 1)), None

    found = attention.__dict__.get("forward")  # another extension's, which stays out of it meanwhile
    attention.forward = forward

    def restore() -> None:
        if found is None:
            del attention.forward
        else:
            attention.forward = found

    return restore


def _logit_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """MultiheadAttention's mask (float: added to the logits, bool: forbids) as scaled_dot_product_attention takes it."""
    if mask is None:
        return None
    return ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
