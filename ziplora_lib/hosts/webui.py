"""The WebUI and its Lora extension: the model that is loaded there, on its device, and the LoRAs that it lists.

This file and webui_state.py, which puts back whatever is changed on the live model, are the only ones that import the WebUI's
`modules`.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from modules import (
    call_queue,
    devices,
    extra_networks,
    processing,
    progress,
    prompt_parser,
    rng,
    sd_models,
    sd_samplers_common,
    sd_unet,
    sd_vae,
    shared,
)
from PIL import Image
from torch import Tensor

from ziplora_lib.errors import BadInput, MergeFailed, Stopped, out_of_memory
from ziplora_lib.hosts import webui_state as state
from ziplora_lib.hosts.host import Entry, Model, entries, share
from ziplora_lib.hosts.webui_state import lora_extension
from ziplora_lib.later import later
from ziplora_lib.options import OPTIONS

if TYPE_CHECKING:
    from ziplora_lib.lora.reader import Lora
    from ziplora_lib.merge.attach import Slot

attach, reader = later("ziplora_lib.merge.attach"), later("ziplora_lib.lora.reader")

# the WebUI's own default, so that a preview is the picture that txt2img makes of the same prompt and seed
SAMPLER, SCHEDULER = "DPM++ 2M", "Automatic"

BASES = ("sd1", "sd2", "sdxl")

# Forge and reForge: LoRAs are patches there, and the Lora extension knows no layers of the model
FORGE = find_spec("modules_forge") is not None
NOT_IN_FORGE = (
    "this WebUI is Forge or built on it, where ZipLoRA cannot learn a merge: LoRAs are applied in another way"
)
INSTEAD = "Merge in AUTOMATIC1111's WebUI, or by python -m ziplora_lib zip; what was merged works here like any LoRA"

# an attention of open_clip's text encoder: SDXL's second one (1_), and SD 2.x's only one
_FUSED_ATTENTION = re.compile(r"((?:1_)?model_transformer_resblocks_\d+_attn)_(q|k|v|out)_proj")
SLOTS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.GroupNorm)


class WebuiHost:
    """The WebUI as host. Cond: what `get_learned_conditioning` gives; SDXL: {"crossattn", "vector"}, else {"crossattn"}."""

    # the model of the session that this thread is in: other threads look at the WebUI meanwhile
    _own = threading.local()

    @property
    def _held(self) -> state.Held | None:
        return getattr(self._own, "held", None)

    def _live(self):
        """The WebUI's model. Raises MergeFailed in a session that began with another."""
        if self._held is None:
            return shared.sd_model
        self._held.check()
        return self._held.model

    # --- LoRAs -------------------------------------------------------------------------------------

    def loras(self) -> list[str]:
        return sorted(self._listed(), key=str.lower)

    def listing(self) -> list[Entry]:
        found = [(name, Path(entry.filename)) for name, entry in self._listed().items()]
        return entries(found, Path(shared.cmd_opts.lora_dir), _thumbnail)

    def _listed(self) -> dict:
        """A copy: whoever refreshes the list empties it first, in whatever thread."""
        listed = lora_extension().available_networks.copy()
        return {name: entry for name, entry in listed.items() if entry.is_safetensors}

    def option(self, name: str) -> Any:
        return shared.opts.data.get(f"ziplora_{name}", OPTIONS[name].default)

    def refresh(self) -> None:
        lora_extension().list_available_networks()

    def open(self, name: str) -> Lora:
        return reader.read(self._path(name))

    def glance(self, name: str) -> Lora:
        return reader.glance(self._path(name))

    def peek(self, name: str) -> Lora:
        return reader.peek(self._path(name))

    def _path(self, name: str) -> Path:
        return Path(self._entry(name).filename)

    def _entry(self, name: str):
        available = lora_extension().available_networks
        if (found := available.get(name)) is None:
            self.refresh()
            found = available.get(name)
        if found is None:
            raise BadInput(f"there is no LoRA named {name!r}", remedy="Pick one of the list, or refresh it")
        return found

    def _network(self, lora: Lora):
        """A LoRA as the Lora extension loads it for a prompt. Raises BadInput for one that it fails at."""
        networks, entry = lora_extension(), self._entry(lora.name)
        try:
            with state.same_chance():  # its modules are made with random weights first
                return networks.load_network(lora.name, entry)
        except Exception as error:  # its parsers assert and raise whatever they meet
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInput(
                f"the WebUI itself cannot load it ({reason})",
                file=lora.path.name,
                remedy="Pick a LoRA that can be prompted with",
            ) from error

    def _same_network(self, lora: Lora):
        """The same, where its values count: they must be those that were read before, and stay so."""
        network = self._network(lora)
        for module in network.modules.values():  # as loaded they lie in the file, which may be overwritten
            vars(module).update({name: v.clone() for name, v in vars(module).items() if isinstance(v, Tensor)})
        for embedding in network.bundle_embeddings.values():
            many = isinstance(embedding.vec, dict)
            embedding.vec = {k: v.clone() for k, v in embedding.vec.items()} if many else embedding.vec.clone()
        try:
            same = reader.tensor_sha256(lora.path) == lora.hash
        except OSError:
            same = False
        if not same:
            raise BadInput(
                "was changed, moved or deleted while it was being read",
                file=lora.path.name,
                remedy="Wait until it is saved, and begin again",
            )
        return network

    def unapplied(self, lora: Lora) -> list[str]:
        known = self._network(lora).modules
        names = {key: network_name(key) for key in (*lora.layers, *lora.vectors)}
        attentions: dict[str, set[str]] = {}
        for name in names.values():
            if match := _FUSED_ATTENTION.fullmatch(name):
                attentions.setdefault(match[1], set()).add(match[2])
        # of a text encoder's attention the four projections together, or none
        partial = {
            f"{name}_{head}_proj" for name, found in attentions.items() if found != set(attach.HEADS) for head in found
        }
        left_out = {key for key, name in names.items() if name not in known or name in partial}
        # beside the factors of a LoRA it reads no bias
        biased = [key for key, v in lora.vectors.items() if v.bias is not None and v.weight is None]
        left_out |= {key for key in biased if getattr(known.get(names[key]), "ex_bias", None) is None}
        # whether its formula takes this model's weights is seen on one layer of each kind
        slots = self.slots([key for key in lora.dense if key not in left_out])
        for kind in {lora.dense[key].kind for key in slots}:
            own = [key for key in slots if lora.dense[key].kind == kind]
            smallest = min(own, key=lambda key: math.prod(slots[key].shape))
            if _updown(known[names[smallest]], slots[smallest]) is None:
                left_out |= set(own)
        return sorted(left_out)

    def destination(self, output: str) -> Path:
        folder = (Path(shared.cmd_opts.lora_dir) / str(self.option("folder")).strip("/\\ ")).resolve()
        if not folder.is_relative_to(Path(shared.cmd_opts.lora_dir).resolve()):
            raise BadInput(
                f"the folder for new LoRAs, {self.option('folder')}, is not below the Lora folder",
                remedy="Change it in Settings > ZipLoRA",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"the folder for new LoRAs, {folder}, cannot be made ({error.strerror})",
                remedy="Change it in Settings > ZipLoRA, or make the folder",
            ) from error
        path = folder / f"{output}.safetensors"
        for name, entry in lora_extension().available_networks.items():
            if name.lower() == output.lower() and Path(entry.filename).resolve() != path.resolve():
                raise BadInput(
                    f"a LoRA named {name} is already there, in {Path(entry.filename).parent.name}",
                    remedy="Choose another output name: the WebUI knows LoRAs by name, not by folder",
                )
        return path

    def publish(self, path: Path) -> str:
        # an overwritten file would otherwise go on with its old weights, and with prompts encoded under them
        with ExitStack() as every:  # one that fails keeps none of the others from it
            every.callback(self.refresh)
            every.callback(_encode_again)
            if FORGE:
                every.callback(_forget_in_forge, lora_extension())
            else:
                every.callback(state.forget, path.stem)
        return f"<lora:{path.stem}:1>"

    # --- the model ---------------------------------------------------------------------------------

    def scratch(self) -> Path | None:
        return Path(shared.data_path, "cache", "ziplora")

    def missing(self) -> str:
        return f"{NOT_IN_FORGE}. {INSTEAD}." if FORGE else ""

    def model(self) -> Model:
        if self._held is not None:  # settings that are changed meanwhile wait for the next generation
            self._held.check()
            return self._held.said
        if FORGE:
            raise BadInput(NOT_IN_FORGE, remedy=INSTEAD)
        model = shared.sd_model
        plain = "Pick an SD 1.5, SD 2.x or SDXL checkpoint at the top left"
        if model is None or getattr(model, "model", None) is None:
            raise BadInput("no checkpoint is loaded", remedy=plain)
        name = model.sd_checkpoint_info.name_for_extra
        base = next((base for base in BASES if getattr(model, f"is_{base}", False)), None)
        if base is None:
            raise BadInput(f"the loaded checkpoint {name} is neither SD 1.5, SD 2.x nor SDXL", remedy=plain)
        if getattr(model, "is_sdxl_inpaint", False) or model.model.conditioning_key != "crossattn":
            raise BadInput(
                f"the loaded checkpoint {name} is an inpainting model or another that needs more than a prompt",
                remedy=plain,
            )
        if base == "sdxl" and sum(embedder.input_key == "txt" for embedder in model.conditioner.embedders) != 2:
            raise BadInput(f"the loaded checkpoint {name} is a refiner", remedy=plain)
        if devices.fp8:
            raise BadInput("FP8 weights are on", remedy="Set Settings > Optimizations > FP8 weight to Disable")
        if sd_unet.current_unet is not None or sd_unet.get_unet_option() is not None:
            raise BadInput("another SD Unet (such as TensorRT) is active", remedy="Set Settings > SD Unet to None")
        # the WebUI's own is on while it generates, and only then
        own = getattr(model, "applied_token_merged_ratio", 0)
        if not own and any(type(module).__name__ == "ToMeBlock" for module in model.model.modules()):
            raise BadInput(
                "token merging is on, by another extension than the WebUI's own",
                remedy="Switch that extension off, and load the checkpoint again",
            )
        if shared.opts.data.get("hypertile_enable_unet", False):
            raise BadInput("Hypertile is on", remedy="Switch off Settings > Hypertile > Enable Hypertile U-Net")
        dtype = next(model.model.parameters()).dtype
        prediction = "v" if getattr(model, "parameterization", "eps") == "v" else "epsilon"
        moves = ("blocks" if shared.cmd_opts.lowvram else "parts") if getattr(model, "lowvram", False) else ""
        return Model(name, base, str(devices.device), str(dtype).removeprefix("torch."), prediction, moves)

    def model_at_hand(self) -> Model | None:
        # asking for shared.sd_model loads one
        return None if sd_models.model_data.sd_model is None and not FORGE else self.model()

    def slots(self, keys: Sequence[str]) -> dict[str, Slot]:
        mapping = self._live().network_layer_mapping
        slots = {}
        heads: dict[str, dict[str, str]] = {}
        for key in keys:
            name = network_name(key)
            if match := _FUSED_ATTENTION.fullmatch(name):
                heads.setdefault(match[1], {})[match[2]] = key
            elif isinstance(mapping.get(name), SLOTS):
                slots[key] = attach.Slot(mapping[name])
        for name, parts in heads.items():
            # the Lora extension applies these four together or not at all
            if set(parts) == set(attach.HEADS) and isinstance(mapping.get(name), torch.nn.MultiheadAttention):
                slots |= {parts[head]: attach.Slot(mapping[name], head) for head in attach.HEADS}
        return slots

    def dense(self, lora: Lora) -> Iterator[tuple[str, Tensor]]:
        if not lora.dense:
            return
        applied = self._same_network(lora).modules
        for key, slot in self.slots(list(lora.dense)).items():
            module = applied.get(network_name(key))
            # what the Lora extension cannot apply, it leaves out as well
            if module is not None and (delta := _updown(module, slot)) is not None:
                yield key, delta

    @contextmanager
    def embeddings(self, loras: Sequence[Lora]) -> Iterator[None]:
        bundled = [e for x in loras if x.embeddings for e in self._same_network(x).bundle_embeddings.values()]
        with state.known_embeddings(self._live(), bundled):
            yield

    @contextmanager
    def session(self, full_precision: bool = False) -> Iterator[None]:
        model = shared.sd_model
        with ExitStack() as back:
            back.enter_context(state.same_chance())
            for changed in (state.bare, state.by_itself, state.usual, state.frozen):
                back.enter_context(changed(model))
            if full_precision:
                back.enter_context(state.full_precision(model))
            back.callback(setattr, self._own, "held", None)
            self._own.held = held = state.Held.now(self.model())
            try:
                yield
            except (MergeFailed, BadInput, Stopped):
                raise
            except Exception:  # of tensors on two devices, for instance
                held.check_place()
                raise

    def unet(self) -> torch.nn.Module:
        return self._live().model.diffusion_model

    @contextmanager
    def resting(self, text: bool = False) -> Iterator[None]:
        model = self._live()
        # with a live preview's wish still open the page's thread would have the VAE decode
        shared.state.current_latent = None
        with ExitStack() as back:
            back.enter_context(state.plain_attention())
            kind = devices.device.type
            if kind == "mps" or (kind == "cuda" and devices.cuda_no_autocast()):
                # casts there are patches of classes, which a block that is computed again in the backward needs too
                back.enter_context(devices.autocast())
            if getattr(model, "lowvram", False):  # of its parts one at a time is on the device anyway
                back.enter_context(state.unhooked(self.unet()))
            else:
                texts = [] if text else [model.conditioner if model.is_sdxl else model.cond_stage_model]
                back.enter_context(state.off_device(model, [model.first_stage_model, *texts]))
            yield

    # --- prompts, pictures, predictions ----------------------------------------------------------------

    def encode(
        self, prompt: str, resolution: int, negative: bool = False, gradients: bool = False
    ) -> dict[str, Tensor]:
        model = self._live()
        (text,), _ = extra_networks.parse_prompts([prompt])
        texts = prompt_parser.SdConditioning([text], width=resolution, height=resolution, is_negative_prompt=negative)
        with torch.set_grad_enabled(gradients), state.trainable(model, gradients), devices.autocast():
            cond = model.get_learned_conditioning(texts)
        return cond if model.is_sdxl else {"crossattn": cond}

    def sample(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> Tensor:
        p = _txt2img(self._live(), prompt, seed, resolution, steps, guidance)
        p.seeds, p.subseeds, p.prompts, p.negative_prompts = [seed], [seed], p.all_prompts, p.all_negative_prompts
        p.parse_extra_network_prompts()  # takes <lora:…> out of the text; none is activated
        with torch.no_grad(), p.sd_model.ema_scope():
            with devices.autocast():
                p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
            p.setup_conds()
            sd_models.apply_alpha_schedule_override(p.sd_model, p)
            while True:
                shared.state.skipped = False
                p.rng = rng.ImageRNG((4, resolution // 8, resolution // 8), [seed], subseeds=[seed])
                with _unet_autocast():
                    latent = p.sample(p.c, p.uc, p.seeds, p.subseeds, p.subseed_strength, p.prompts)
                if shared.state.interrupted:
                    raise Stopped  # the sampler broke off: this is no picture
                if not shared.state.skipped:  # Skip is for a batch of pictures; half a picture is of no use here
                    break
        if shared.opts.live_previews_enable and shared.opts.show_progress_every_n_steps != -1:
            # the WebUI's own way, which small pictures are too quick for
            shared.state.current_latent = latent
            shared.state.do_set_current_image()
        return latent

    def infotext(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> str:
        p = _txt2img(self._live(), prompt, seed, resolution, steps, guidance)
        p.sd_model_name, p.sd_model_hash = p.sd_model.sd_checkpoint_info.name_for_extra, p.sd_model.sd_model_hash
        p.sd_vae_name, p.sd_vae_hash = sd_vae.get_loaded_vae_name(), sd_vae.get_loaded_vae_hash()
        return processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds)

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        # the VAE draws from its posterior: the same latent for the same picture, and the caller's random state kept
        with torch.random.fork_rng(), devices.autocast():
            torch.manual_seed(0)
            return sd_samplers_common.images_tensor_to_samples(pixels, model=self._live())

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Image.Image:
        decoded = processing.decode_latent_batch(self._live(), latent, target_device=devices.cpu, check_for_nans=True)
        pixels = torch.clamp((decoded[0].float() + 1.0) / 2.0, 0.0, 1.0)
        return Image.fromarray((255.0 * pixels.permute(1, 2, 0).numpy()).astype(np.uint8))

    def add_noise(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = self._live().alphas_cumprod.float().to(latent.device)[t].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise

    def predict(self, x: Tensor, t: Tensor, conds: Sequence[dict[str, Tensor]]) -> Tensor:
        model = self._live()
        # prompts of different length: attention does not change when the whole sequence is repeated
        length = math.lcm(*(c["crossattn"].shape[1] for c in conds))
        text = torch.cat([c["crossattn"].repeat(1, length // c["crossattn"].shape[1], 1) for c in conds])
        if model.is_sdxl:
            cond = {"crossattn": text, "vector": torch.cat([c["vector"] for c in conds])}
        else:
            cond = {"c_crossattn": [text]}
        # as the samplers call it, through the wrapper where casts and the medvram hook sit
        with _unet_autocast():
            return model.apply_model(x.to(devices.device), t.float().to(devices.device), cond)

    # --- the WebUI's queue and progress bar ---------------------------------------------------------------

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """The WebUI's queue: waits for generations, and they for it. The page's progress bar asks by the name."""
        progress.add_task_to_queue(name)
        try:
            with call_queue.queue_lock, state.shown_as_job(name):
                yield
        finally:
            progress.pending_tasks.pop(name, None)

    def progress(self, info: dict) -> bool:
        # the sampler sets sampling_step itself, within one hundredth
        shared.state.job_count, shared.state.job_no = 100, int(100 * share(info))
        shared.state.sampling_step, shared.state.sampling_steps = 0, 0
        text = f"{info.get('what') or info['phase']}: step {info.get('step', 0)}/{info.get('steps', 1)}"
        shared.state.textinfo = text + (f", loss {info['loss']:.3f}" if "loss" in info else "")
        return bool(shared.state.interrupted or shared.state.stopping_generation)


def _txt2img(
    model, prompt: str, seed: int, resolution: int, steps: int, guidance: float
) -> processing.StableDiffusionProcessingTxt2Img:
    """One picture as the txt2img tab would ask for it."""
    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=model,
        prompt=prompt,
        seed=seed,
        steps=steps,
        cfg_scale=guidance,
        width=resolution,
        height=resolution,
        sampler_name=SAMPLER,
        scheduler=SCHEDULER,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    # not the shared caches: they do not know of attached deltas
    p.cached_c, p.cached_uc = [None, None], [None, None]
    p.fill_fields_from_opts()
    p.setup_prompts()
    p.all_seeds, p.all_subseeds = [seed], [seed]
    return p


def _encode_again() -> None:
    """Forgets the prompts that generations have encoded."""
    for kind in (processing.StableDiffusionProcessing, processing.StableDiffusionProcessingTxt2Img):
        for cache in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
            if cache in vars(kind):
                setattr(kind, cache, [None, None])


def _forget_in_forge(networks) -> None:
    """Forge keeps what it has read by the file's name, and the patched weights: an overwritten file would stay old."""
    networks.load_lora_state_dict.cache_clear()
    model = sd_models.model_data.sd_model
    objects = getattr(model, "forge_objects", None)
    if objects is None:  # no picture was made yet
        return
    model.current_lora_hash = None
    for part in (objects.unet, getattr(objects.clip, "patcher", None)):
        if loader := getattr(part, "lora_loader", None):
            loader.loaded_hash = None


def _thumbnail(picture: Path) -> str:
    """Where the WebUI serves a picture beside a LoRA; the time in it renews what a browser has kept."""
    return f"./sd_extra_networks/thumb?filename={quote(picture.as_posix())}&mtime={picture.stat().st_mtime}"


def network_name(key: str) -> str:
    """A layer key -> the Lora extension's name of the layer, as its `load_network` finds it."""
    if key.startswith("lora_unet_"):
        return key.replace("lora_unet", "diffusion_model", 1)
    if key.startswith("lora_te1_text_model"):
        return key.replace("lora_te1_text_model", "0_transformer_text_model", 1)
    return lora_extension().convert_diffusers_name_to_compvis(key, shared.sd_model.is_sd2)


@torch.no_grad()
def _updown(module, slot: Slot) -> Tensor | None:
    """ΔW of a layer in fp32, as the Lora extension computes it during a generation; None where it fails at it."""
    weight = slot.weight.detach().to(devices.device)
    # in a model of half precision some formulas need what surrounds them in a generation, others more precision
    for context, given in ((devices.autocast, weight), (devices.without_autocast, weight.float())):
        try:
            with context():
                return module.calc_updown(given)[0].to(devices.device).float().expand(weight.shape)
        except (RuntimeError, AttributeError, ValueError) as error:
            if out_of_memory(error):
                raise
            continue
    return None


def _unet_autocast():
    return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()
