"""The headless host: any SD 1.5, SD 2.x or SDXL pipeline on diffusers, or an embedded miniature. No WebUI."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from ziplora_lib.errors import BadInput, out_of_memory
from ziplora_lib.hosts import precision
from ziplora_lib.hosts.host import Entry, Model, entries
from ziplora_lib.hosts.miniature import MINIATURES
from ziplora_lib.infotext import infotext
from ziplora_lib.lora.keys import layer_key
from ziplora_lib.lora.reader import Lora, glance, peek, read
from ziplora_lib.merge.attach import Slot
from ziplora_lib.options import OPTIONS

# of a pipeline, what LoRAs adapt; SD 1.5 and SD 2.x have one text encoder
ADAPTED = ("unet", "text_encoder", "text_encoder_2")

# what the WebUI calls diffusers' schedulers
SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


class DiffusersHost:
    """A pipeline. LoRAs are paths, or names in `folder`, where what is merged goes.

    Cond: (embeddings,), SDXL: (…, pooled, sizes).
    """

    # one job at a time in this process, whichever host it is on
    _mine = threading.RLock()

    def __init__(self, model: str = "miniature", folder: Path = Path("."), device: str = "auto"):
        """model: one of MINIATURES, a pipeline's folder, a single .safetensors checkpoint, or a hub id. Raises BadInput."""
        self.folder = Path(folder)
        self.paths = True  # whether a LoRA may be named by its path: not by who comes over the network
        self.name = model
        self.device = usable_device(device)
        self.pipe = load(model, torch.float32 if self.device.type == "cpu" else torch.float16).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = base_of(self.pipe)
        self.adapted = {name: getattr(self.pipe, name) for name in ADAPTED if hasattr(self.pipe, name)}
        self._latent: tuple[int, Tensor | None] = (0, None)
        # training's noise schedule, whatever the sampler makes of it
        self.alphas = self.pipe.scheduler.alphas_cumprod.clone()

    def loras(self) -> list[str]:
        return [entry.name for entry in self.listing()]

    def listing(self) -> list[Entry]:
        found = {path.stem: path for path in sorted(self.folder.rglob("*.safetensors"), reverse=True)}
        return entries(list(found.items()), self.folder, lambda picture: f"file={quote(str(picture.resolve()))}")

    def refresh(self) -> None:
        """Nothing is kept of the folder."""

    def option(self, name: str) -> Any:
        return OPTIONS[name].default

    def open(self, name: str) -> Lora:
        return read(self._path(name))

    def glance(self, name: str) -> Lora:
        return glance(self._path(name))

    def peek(self, name: str) -> Lora:
        return peek(self._path(name))

    def _path(self, name: str) -> Path:
        """The file of a name in the folder, or of a path where `paths` are taken."""
        if self.paths and (name.endswith(".safetensors") or Path(name).is_file()):
            return Path(name)
        found = next((entry.path for entry in self.listing() if entry.name == name), None)
        if found is None and not self.paths:
            raise BadInput(f"there is no LoRA named {name!r}", remedy="Pick one of the list, or refresh it")
        return found or Path(name)

    def unapplied(self, lora: Lora) -> list[str]:
        return [key for key, layer in lora.dense.items() if "oft_diag" in layer.parts]  # LyCORIS' old form

    def destination(self, output: str) -> Path:
        return self.folder / f"{output}.safetensors"

    def scratch(self) -> Path | None:
        return self.folder / ".ziplora"

    def missing(self) -> str:
        return ""

    def model(self) -> Model:
        prediction = self.pipe.scheduler.config.prediction_type
        return Model(
            self.name,
            self.base,
            str(self.device),
            str(self.pipe.unet.dtype).removeprefix("torch."),
            "v" if prediction.startswith("v") else prediction,
        )

    def model_at_hand(self) -> Model | None:
        return self.model()

    def slots(self, keys: Sequence[str]) -> dict[str, Slot]:
        known = {}
        for part, root in self.adapted.items():
            for name, module in root.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
                    known[layer_key(f"{part}.{name}", self.base)] = Slot(module)
        return {key: known[key] for key in keys if key in known}

    def dense(self, lora: Lora) -> Iterator[tuple[str, Tensor]]:
        if not lora.dense:
            return
        from ziplora_lib.hosts.lycoris import dense_delta

        for key, slot in self.slots(list(lora.dense)).items():
            try:
                delta = dense_delta(lora.dense[key], slot.module)
            except (RuntimeError, ValueError, IndexError) as error:
                if out_of_memory(error):
                    raise
                shapes = ", ".join(f"{part} {list(t.shape)}" for part, t in lora.dense[key].parts.items())
                raise BadInput(
                    f"a {lora.dense[key].kind} layer that does not fit the model's, of shape {list(slot.shape)} ({shapes})",
                    file=lora.path.name,
                    key=key,
                    remedy="This LoRA belongs to another model, or the file is damaged",
                ) from error
            if delta is not None:
                yield key, delta.to(self.device)

    @contextmanager
    def embeddings(self, loras: Sequence[Lora]) -> Iterator[None]:
        encoders = [("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2")]
        found = [entry for entry in encoders if entry[1] in self.adapted]
        bundled: dict[str, dict[str, Tensor]] = {}
        for lora in loras:  # of one name the first counts, as in the merged file
            bundled = {**lora.embeddings, **bundled}
        undo = []
        try:
            for part, name, tokenizer in found if bundled else ():
                encoder, words = self.adapted[name], getattr(self.pipe, tokenizer)
                known = encoder.get_input_embeddings()
                undo.append(partial(setattr, self.pipe, tokenizer, words))
                undo.append(partial(encoder.set_input_embeddings, known))
                undo.append(partial(setattr, encoder.config, "vocab_size", encoder.config.vocab_size))
                setattr(self.pipe, tokenizer, copy.deepcopy(words))
                encoder.set_input_embeddings(copy.deepcopy(known))  # it is made larger in place
                for module in encoder.modules():
                    # SDXL's second encoder takes the highest token for the end of the text, and new ones are higher
                    if hasattr(module, "eos_token_id"):
                        undo.append(partial(setattr, module, "eos_token_id", module.eos_token_id))
                        module.eos_token_id = words.eos_token_id
                for token, parts in bundled.items():
                    vectors = parts.get(part, next(iter(parts.values())) if len(parts) == 1 else None)
                    if vectors is not None and vectors.shape[-1] == known.embedding_dim:
                        own = {"text_encoder": encoder, "tokenizer": getattr(self.pipe, tokenizer)}
                        try:
                            self.pipe.load_textual_inversion(vectors, token=token, **own)
                            encoder.get_input_embeddings().requires_grad_(False)
                        except ValueError as error:
                            raise BadInput(
                                f"brings an embedding {token!r}, which the tokenizer cannot be taught ({error})",
                                file=", ".join(lora.path.name for lora in loras if token in lora.embeddings),
                                remedy="Use a copy of the file without it",
                            ) from error
            yield
        finally:
            for restore in reversed(undo):
                restore()

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        return self._mine

    def progress(self, info: dict) -> bool:
        return False

    @contextmanager
    def session(self, full_precision: bool = False) -> Iterator[None]:
        roots = [*self.adapted.values(), self.pipe.vae]
        flags = [(p, p.requires_grad) for root in roots for p in root.parameters()]
        modes = [(module, module.training) for root in roots for module in root.modules()]
        try:
            for root in roots:
                root.requires_grad_(False).eval()
            with precision.full_precision(roots if full_precision else []):
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def unet(self) -> nn.Module:
        return self.pipe.unet

    @contextmanager
    def resting(self, text: bool = False) -> Iterator[None]:
        parts = [self.pipe.vae, *(part for name, part in self.adapted.items() if name != "unet" and not text)]
        with ExitStack() as back:
            for part in parts:
                back.callback(part.to, self.device)
                part.to("cpu")
            yield

    def encode(
        self, prompt: str, resolution: int, negative: bool = False, gradients: bool = False
    ) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradients):
            embeddings, _, *pooled = self.pipe.encode_prompt(
                prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if not pooled:
            return (embeddings,)
        pooled = pooled[0]
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
            callback_on_step_end=self._look,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images

    def _look(self, _pipe, step: int, _t, tensors: dict) -> dict:
        """Keeps what a sampler has so far, for `live_preview`."""
        self._latent = (self._latent[0] + 1, tensors["latents"].detach().clone())
        return {}

    def live_preview(self) -> tuple[int, Image.Image | None]:
        """The picture that is being made, small, and its number; None before the first."""
        number, latent = self._latent
        return number, None if latent is None else self.decode(latent[:1])

    def infotext(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> str:
        scheduler = self.pipe.scheduler
        name = type(scheduler).__name__
        settings = {
            "Steps": steps,
            "Sampler": SAMPLERS.get(name, name.removesuffix("Scheduler")),
            "Schedule type": "Karras" if scheduler.config.get("use_karras_sigmas") else "Automatic",
            "CFG scale": guidance,
            "Seed": seed,
            "Size": f"{resolution}x{resolution}",
            "Model": PurePath(self.name).name.removesuffix(".safetensors"),
        }
        return infotext(prompt, settings)

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        latent = self.pipe.vae.encode(pixels.to(self.device, self.pipe.vae.dtype)).latent_dist.mode()
        return latent * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Image.Image:
        # where the VAE is: a page can ask for the last picture while it rests
        latent = latent.to(self.pipe.vae.device, self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
        return self.pipe.image_processor.postprocess(self.pipe.vae.decode(latent).sample)[0]

    def add_noise(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = self.alphas.to(latent.device)[t].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise

    def predict(self, x: Tensor, t: Tensor, conds: Sequence[tuple[Tensor, ...]]) -> Tensor:
        embeddings, *added = (torch.cat(parts) for parts in zip(*conds))
        x = x.to(self.device, self.pipe.unet.dtype)
        added = dict(zip(("text_embeds", "time_ids"), added))
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


def load(model: str, dtype: torch.dtype) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline of a model's name. Raises BadInput for what cannot be loaded or is no plain SD 1.5, SD 2.x or SDXL."""
    if model in MINIATURES:
        pipe = MINIATURES[model]()
        return pipe if dtype == torch.float32 else pipe.to(dtype)
    remedy = (
        f"Give {', '.join(MINIATURES)}, the folder of an SD 1.5, SD 2.x or SDXL pipeline, a single .safetensors file, or a "
        "hub id"
    )
    try:
        if Path(model).is_file():
            with safe_open(model, framework="pt") as file:
                sdxl = any(name.startswith("conditioner.") for name in file.keys())
        else:
            sdxl = DiffusionPipeline.load_config(model)["_class_name"].startswith("StableDiffusionXL")
        # a safety checker would only be loaded: latents pass it by
        kind, options = (StableDiffusionXLPipeline, {}) if sdxl else (StableDiffusionPipeline, {"safety_checker": None})
        start = kind.from_single_file if Path(model).is_file() else kind.from_pretrained
        pipe = start(model, torch_dtype=dtype, **options)
    except Exception as error:  # diffusers and its hub client raise a dozen kinds, all of which mean this
        raise BadInput(
            f"cannot be loaded as an SD 1.5, SD 2.x or SDXL model ({type(error).__name__}: {error})".splitlines()[0],
            file=model,
            remedy=remedy,
        ) from error
    if base_of(pipe) is None:
        raise BadInput(
            "is not a plain SD 1.5, SD 2.x or SDXL model (an inpainting model, or a refiner?)",
            file=model,
            remedy=remedy,
        )
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise BadInput(
            f"was trained with another kind of noise ({type(pipe.scheduler).__name__})", file=model, remedy=remedy
        )
    if pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)  # SDXL's own VAE overflows in half precision
    return pipe


def base_of(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> str | None:
    """Its base model, "sd1", "sd2" or "sdxl", by what its UNet reads; None for one that reads more or other things."""
    config = pipe.unet.config
    if config.in_channels != 4 or config.class_embed_type is not None or pipe.text_encoder is None:
        return None
    if config.addition_embed_type == "text_time":
        return "sdxl" if getattr(pipe, "text_encoder_2", None) is not None else None
    widths = {768: "sd1", 1024: "sd2"}
    return widths.get(config.cross_attention_dim) if config.addition_embed_type is None else None
