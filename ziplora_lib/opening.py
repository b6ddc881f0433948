"""Layers that are no factors by nature (DoRA, full, OFT, (IA)³ …), worked out on the host's model and brought to factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ziplora_lib.errors import BadInput, Stopped
from ziplora_lib.hosts.host import Host
from ziplora_lib.lora.delta import DenseDelta
from ziplora_lib.lora.keys import listed
from ziplora_lib.lora.limit import Loss
from ziplora_lib.lora.reader import Lora
from ziplora_lib.merge.attach import Router, attach
from ziplora_lib.merge.method import Callback
from ziplora_lib.merge.pairing import pair


@dataclass(frozen=True)
class Opened:
    """A LoRA with all its layers as factors, what that lost (None: nothing), and the layers that had to be left out."""

    lora: Lora
    loss: Loss | None
    left_out: list[str]

    def warnings(self) -> list[str]:
        """In words."""
        said = []
        if self.loss is not None and self.loss.worst > 1e-4:
            said.append(
                f"{self.lora.name}: bringing {self.loss.layers} layers to factors lost {self.loss}. A higher dense_rank "
                "loses less; 0 loses nothing"
            )
        if self.left_out:
            said.append(f"{self.lora.name} has {listed(self.left_out)} that cannot be applied to this model")
        return said


def opened(loras: Sequence[Lora], host: Host, rank: int | None, callback: Callback) -> list[Opened]:
    """Brings every layer of every LoRA to factors of at most `rank`; None keeps them whole. Needs the host's session.

    Raises Stopped when the callback asks to stop, and BadInput for a LoRA of which nothing can be applied.
    """
    steps, done = sum(len(lora.dense) for lora in loras), 0
    result = []
    for lora in loras:
        deltas, lost, energies = dict(lora.deltas), {}, {}
        for key, weight in host.dense(lora):
            by_nature = lora.dense[key].exact_rank
            wanted = rank if rank is None or by_nature is None else max(rank, by_nature)
            factors, lost[key] = DenseDelta(weight).low_rank(wanted)
            deltas[key] = replace(factors, up=factors.up.cpu(), down=factors.down.cpu())
            energies[key] = float(weight.float().square().sum())
            done += 1
            if callback({"phase": "open", "step": done, "steps": steps, "what": f"opening {lora.name}"}):
                raise Stopped
        left_out = [key for key in lora.dense if key not in deltas]
        if not deltas and not lora.vectors:
            raise BadInput(
                f"none of its {len(left_out)} layers ({next(iter(lora.dense.values())).kind}) can be applied to this model",
                file=lora.path.name,
                key=left_out[0],
                remedy="Whoever runs the model must be able to use this LoRA by itself: try it in a prompt first",
            )
        loss = Loss.of(lost, energies) if lost else None
        result.append(Opened(replace(lora, deltas=dict(sorted(deltas.items())), dense={}), loss, left_out))
    return result


@contextmanager
def attached(lora: Lora, host: Host) -> Iterator[Router]:
    """One LoRA on the host's model, whole and at strength 1, as a prompt with its tag has it. Needs the host's session."""
    slots = host.slots([*lora.layers, *lora.vectors])
    [whole] = opened([lora], host, None, lambda _: None)
    layers = pair([whole.lora], [1.0], {key: slot.shape for key, slot in slots.items()})
    with attach(slots, layers.stacks, layers.vectors) as router:
        router.merged()
        yield router
