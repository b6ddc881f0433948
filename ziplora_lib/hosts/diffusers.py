"""The headless host: any SDXL pipeline on diffusers, or the embedded miniature. No WebUI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from ziplora_lib.errors import BadInput
from ziplora_lib.hosts.host import Model
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import Lora, peek, read
from ziplora_lib.merge.attach import Slot
from ziplora_lib.recipe import Recipe

MINIATURE = "miniature"


class DiffusersHost:
    """An SDXL pipeline. LoRAs are paths; what is merged goes into `folder`. Cond: (embeddings, pooled, sizes)."""

    def __init__(self, model: str = MINIATURE, folder: Path = Path("."), device: str = "auto"):
        """model: miniature, a pipeline's folder, a single .safetensors checkpoint, or a hub id. Raises BadInput."""
        self.folder = Path(folder)
        self.name = model
        self.device = usable_device(device)
        self.pipe = load(model, torch.float32 if self.device.type == "cpu" else torch.float16).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        # training's noise schedule, whatever the sampler makes of it
        self.alphas = self.pipe.scheduler.alphas_cumprod.clone()

    def loras(self) -> list[str]:
        return sorted(str(path) for path in self.folder.glob("*.safetensors"))

    def open(self, name: str) -> Lora:
        return read(Path(name))

    def peek(self, name: str) -> Lora:
        return peek(Path(name))

    def unapplied(self, lora: Lora) -> list[str]:
        return []

    def destination(self, output: str) -> Path:
        return self.folder / f"{output}.safetensors"

    def model(self) -> Model:
        prediction = self.pipe.scheduler.config.prediction_type
        return Model(
            self.name,
            "sdxl",
            str(self.device),
            str(self.pipe.unet.dtype).removeprefix("torch."),
            "v" if prediction.startswith("v") else prediction,
        )

    def slots(self, keys: Sequence[str]) -> dict[str, Slot]:
        known = {}
        parts = {
            "unet": self.pipe.unet,
            "text_encoder": self.pipe.text_encoder,
            "text_encoder_2": self.pipe.text_encoder_2,
        }
        for part, root in parts.items():
            for name, module in root.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    known[layer_key(f"{part}.{name}")] = Slot(module)
        return {key: known[key] for key in keys if key in known}

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def session(self, recipe: Recipe) -> Iterator[None]:
        roots = [self.pipe.unet, self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.vae]
        flags = [(p, p.requires_grad) for root in roots for p in root.parameters()]
        modes = [(module, module.training) for root in roots for module in root.modules()]
        checkpointed = self.pipe.unet.is_gradient_checkpointing
        try:
            for root in roots:
                root.requires_grad_(False).eval()
            if recipe.checkpointing:
                self.pipe.unet.enable_gradient_checkpointing()
            yield
        finally:
            if not checkpointed:
                self.pipe.unet.disable_gradient_checkpointing()
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @torch.no_grad()
    def encode(self, prompt: str, resolution: int, negative: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False
        )
        if negative and not prompt and self.pipe.config.force_zeros_for_empty_prompt:
            embeddings, pooled = torch.zeros_like(embeddings), torch.zeros_like(pooled)
        sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]])
        return embeddings, pooled, sizes.to(embeddings)

    @torch.no_grad()
    def sample(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> Tensor:
        return self.pipe(
            prompt,
            height=resolution,
            width=resolution,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        latent = self.pipe.vae.encode(pixels.to(self.device, self.pipe.vae.dtype)).latent_dist.mode()
        return latent * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Image.Image:
        latent = latent.to(self.device, self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
        return self.pipe.image_processor.postprocess(self.pipe.vae.decode(latent).sample)[0]

    def add_noise(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = self.alphas.to(latent.device)[t].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise

    def predict(self, x: Tensor, t: Tensor, conds: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        embeddings, pooled, sizes = (torch.cat(parts) for parts in zip(*conds))
        x = x.to(self.device, self.pipe.unet.dtype)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.pipe.unet(x, t.to(self.device), encoder_hidden_states=embeddings, added_cond_kwargs=added).sample

    def publish(self, path: Path) -> str:
        return f"<lora:{path.stem}:1>"


def usable_device(name: str) -> torch.device:
    """The device of that name, "auto" for the best there is. Raises BadInput for one that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"the device {name} cannot be used ({reason})", remedy="Give cpu, cuda, mps or auto") from error


def load(model: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """The pipeline of a model's name. Raises BadInput for what cannot be loaded or is not SDXL."""
    if model == MINIATURE:
        from ziplora_lib.hosts.miniature import build_miniature

        pipe = build_miniature()
        return pipe if dtype == torch.float32 else pipe.to(dtype)
    remedy = "Give miniature, the folder of an SDXL pipeline, a single .safetensors file, or a hub id"
    try:
        if Path(model).is_file():
            pipe = StableDiffusionXLPipeline.from_single_file(model, torch_dtype=dtype)
        else:
            pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=dtype)
    except Exception as error:  # diffusers and its hub client raise a dozen kinds, all of which mean this
        raise BadInput(
            f"cannot be loaded as an SDXL model ({type(error).__name__}: {error})".splitlines()[0],
            file=model,
            remedy=remedy,
        ) from error
    plain = pipe.unet.config.addition_embed_type == "text_time" and pipe.unet.config.in_channels == 4
    if not plain or pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise BadInput("is not a plain SDXL model (an inpainting model, or a refiner?)", file=model, remedy=remedy)
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise BadInput(
            f"was trained with another kind of noise ({type(pipe.scheduler).__name__})", file=model, remedy=remedy
        )
    if pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)  # SDXL's own VAE overflows in half precision
    return pipe
