"""The Protocol: what a merge needs from whoever has the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from ziplora_lib.lora.reader import Lora
from ziplora_lib.merge.attach import Slot
from ziplora_lib.recipe import Recipe

# A prompt, encoded: opaque to all but its host.
Cond = Any


@dataclass(frozen=True)
class Model:
    """What the host says of its model.

    base: "sd1", "sd2" or "sdxl"; prediction: "epsilon" or "v"; moves: its parts change their device between passes.
    """

    name: str
    base: str
    device: str
    dtype: str
    prediction: str
    moves: bool = False


class Host(Protocol):
    """A model, and the LoRAs that it can be given. Levels t run from 0 (clean) to 999 (noise), as in training."""

    def loras(self) -> list[str]:
        """The names that `open` takes."""

    def open(self, name: str) -> Lora:
        """Reads a LoRA. Raises BadInput if there is none of that name, or the file cannot be read."""

    def peek(self, name: str) -> Lora:
        """As `open`, but without the layers: metadata and card only, at once."""

    def unapplied(self, lora: Lora) -> list[str]:
        """The layers of a LoRA that the host leaves out when it is prompted with by itself, though the merge has them."""

    def destination(self, output: str) -> Path:
        """Where a LoRA of this name is saved. Raises BadInput for a name that cannot be one."""

    def model(self) -> Model:
        """Raises BadInput if no model that can be worked with is loaded, with what to change."""

    def slots(self, keys: Sequence[str]) -> dict[str, Slot]:
        """The live modules of those layer keys that the model has."""

    def dense(self, lora: Lora) -> Iterator[tuple[str, Tensor]]:
        """ΔW of a LoRA's dense layers, as the host itself applies them to its model, with their keys; in a session.

        Layers that the model does not have, or that the host cannot apply, are left out.
        """

    def embeddings(self, loras: Sequence[Lora]) -> AbstractContextManager[None]:
        """The LoRAs' bundled embeddings, known to `encode` and `sample` meanwhile."""

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        """The host to ourselves: waits for its other work, and that for us."""

    def session(self, recipe: Recipe) -> AbstractContextManager[None]:
        """Base model bare, in eval mode, without gradients for its weights; exit restores all that was found."""

    def encode(self, prompt: str, resolution: int, negative: bool = False, gradients: bool = False) -> Cond:
        """Encodes a prompt with the text encoders as they now are. negative: as the sampler's negative prompt.

        gradients: the result is differentiable in what is attached to the text encoders.
        """

    def sample(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> Tensor:
        """A picture's latent, (1, 4, h, w), from the host's own sampler. Raises Stopped if the host broke it off."""

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
