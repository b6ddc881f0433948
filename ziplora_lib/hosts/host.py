"""The Protocol: what a merge needs from whoever has the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from ziplora_lib.lora.reader import Lora
    from ziplora_lib.merge.attach import Slot

# A prompt, encoded: opaque to all but its host.
Cond = Any


@dataclass(frozen=True)
class Model:
    """What the host says of its model.

    base: "sd1", "sd2" or "sdxl"; prediction: "epsilon" or "v"; moves: what of it changes its device by itself: "" for
    nothing, "parts" (the UNet, the text encoders, the VAE), "blocks" (of the UNet, too).
    """

    name: str
    base: str
    device: str
    dtype: str
    prediction: str
    moves: str = ""


@dataclass(frozen=True)
class Entry:
    """A LoRA as the host lists it. folder: below the LoRA folder, "" for itself; preview: its picture's URL, "" for none."""

    name: str
    path: Path
    folder: str = ""
    preview: str = ""


# endings of pictures that stand beside a LoRA, the likeliest first: NAME.png, NAME.preview.png
PREVIEWS = tuple(f"{mark}.{kind}" for kind in ("png", "jpg", "jpeg", "webp", "gif") for mark in ("", ".preview"))


def entries(found: Sequence[tuple[str, Path]], root: Path, url: Callable[[Path], str]) -> list[Entry]:
    """LoRAs as (name, file) -> how they are listed, by name; each folder is looked into once."""
    inside: dict[Path, set[str]] = {}
    listed = []
    for name, path in found:
        folder = path.parent
        if folder not in inside:
            inside[folder] = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        picture = next((path.stem + ending for ending in PREVIEWS if path.stem + ending in inside[folder]), None)
        below = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)
        listed.append(Entry(name, path, "" if below == "." else below, url(folder / picture) if picture else ""))
    return sorted(listed, key=lambda entry: entry.name.lower())


# how much of the progress bar each phase takes: (from, to)
PHASES = {
    "preflight": (0.0, 0.01),
    "open": (0.01, 0.05),
    "measure": (0.05, 1),
    "calibrate": (0.05, 0.35),
    "warm start": (0.35, 0.4),
    "merge": (0.4, 0.9),
    "save": (0.9, 0.9),
    "preview": (0.9, 1),
    "draw": (0, 1),
    # several merges as one job: its steps are those of all of them
    "many": (0.0, 1.0),
}


def share(info: dict) -> float:
    """How far a job is, from 0 to 1, by what its callback says of phase and step."""
    begin, end = PHASES[info["phase"]]
    return begin + (end - begin) * info.get("step", 0) / max(info.get("steps", 1), 1)


class Host(Protocol):
    """A model, and the LoRAs that it can be given. Levels t run from 0 (clean) to 999 (noise), as in training."""

    def loras(self) -> list[str]:
        """The names that `open` takes."""

    def listing(self) -> list[Entry]:
        """The same with folder and picture."""

    def refresh(self) -> None:
        """Looks for LoRA files again."""

    def option(self, name: str) -> Any:
        """A setting of the user's: see options.py."""

    def open(self, name: str) -> Lora:
        """Reads a LoRA. Raises BadInput if there is none of that name, or the file cannot be read."""

    def glance(self, name: str) -> Lora:
        """As `open`, but by its header alone: see `reader.glance`."""

    def peek(self, name: str) -> Lora:
        """As `open`, but without the layers: metadata and card only, at once."""

    def unapplied(self, lora: Lora) -> list[str]:
        """The layers of a LoRA that the host leaves out when it is prompted with by itself, though the merge has them."""

    def destination(self, output: str) -> Path:
        """Where a LoRA of this name is saved. Raises BadInput for a name that cannot be one."""

    def scratch(self) -> Path | None:
        """A folder for what a run leaves while it works, outside the list of LoRAs; None to leave nothing."""

    def missing(self) -> str:
        """What keeps a merge from ever working here, and what to do; "" for nothing."""

    def model(self) -> Model:
        """Raises BadInput if no model that can be worked with is loaded, with what to change."""

    def model_at_hand(self) -> Model | None:
        """The same without waiting: None where no model is loaded yet."""

    def slots(self, keys: Sequence[str]) -> dict[str, Slot]:
        """The live modules of those layer keys that the model has."""

    def dense(self, lora: Lora) -> Iterator[tuple[str, Tensor]]:
        """ΔW of a LoRA's dense layers, as the host itself applies them to its model, with their keys; in a session.

        Layers that the model does not have, or that the host cannot apply, are left out.
        """

    def embeddings(self, loras: Sequence[Lora]) -> AbstractContextManager[None]:
        """The LoRAs' bundled embeddings, known to `encode` and `sample` meanwhile."""

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        """The host to ourselves: waits for its other work, and that for us. name: a progress bar's task."""

    def progress(self, info: dict) -> bool:
        """Shows a job's step on the host's own progress bar, if it has one; true if its own interrupt was asked for."""

    def session(self, full_precision: bool = False) -> AbstractContextManager[None]:
        """Base model bare, in eval mode, without gradients for its weights; exit restores all that was found.

        full_precision: it computes in fp32, whatever it did before; that takes twice the memory of fp16.
        """

    def unet(self) -> nn.Module:
        """The live UNet."""

    def resting(self, text: bool = False) -> AbstractContextManager[None]:
        """Meanwhile only `predict` is asked: the VAE leaves the device, and the text encoders, unless text says otherwise.

        Where the host itself moves the UNet's blocks to and fro, or computes attention in pieces by what memory is free, it
        does not meanwhile: a block that is computed again has to come out as before.
        """

    def encode(self, prompt: str, resolution: int, negative: bool = False, gradients: bool = False) -> Cond:
        """Encodes a prompt with the text encoders as they now are. negative: as the sampler's negative prompt.

        gradients: the result is differentiable in what is attached to the text encoders.
        """

    def sample(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> Tensor:
        """A picture's latent, (1, 4, h, w), from the host's own sampler. Raises Stopped if the host broke it off."""

    def infotext(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> str:
        """What the WebUI would write into the picture that `sample` makes of the same: see infotext.py."""

    def encode_picture(self, picture: Image.Image) -> Tensor:
        """A picture's latent, (1, 4, h, w)."""

    def decode(self, latent: Tensor) -> Image.Image:
        """The picture of a latent."""

    def add_noise(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latent at noise level t."""

    def predict(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """The UNet's output for noised latents x (B, 4, h, w), levels t (B,) and a prompt each; on its device."""

    def publish(self, path: Path) -> str:
        """Makes a saved LoRA known to the host; returns its prompt tag."""
