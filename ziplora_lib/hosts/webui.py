"""The WebUI and its Lora extension: the model that is loaded there, on its device, and the LoRAs that it lists.

The only file that imports the WebUI's `modules`. Whatever it changes on the live model, `session` puts back.
"""

from __future__ import annotations

import math
import re
import sys
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
    sd_hijack,
    sd_models,
    sd_samplers_common,
    sd_unet,
    sd_vae,
    sd_vae_approx,
    sd_vae_taesd,
    shared,
)
from PIL import Image
from torch import Tensor

from ziplora_lib.errors import BadInput, Stopped, out_of_memory
from ziplora_lib.hosts import precision
from ziplora_lib.hosts.host import Entry, Model, entries, share
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


def lora_extension():
    """The built-in Lora extension's `networks`: a top-level module, there once the WebUI's scripts are loaded."""
    networks = sys.modules.get("networks")
    if networks is None:
        raise BadInput(
            "the WebUI's built-in Lora extension is not active",
            remedy="Switch it on in Extensions > Installed, and restart",
        )
    return networks


class WebuiHost:
    """The WebUI as host. Cond: what `get_learned_conditioning` gives; SDXL: {"crossattn", "vector"}, else {"crossattn"}."""

    # --- LoRAs -------------------------------------------------------------------------------------

    def loras(self) -> list[str]:
        listed = lora_extension().available_networks.items()
        return sorted((name for name, entry in listed if entry.is_safetensors), key=str.lower)

    def listing(self) -> list[Entry]:
        found = [(name, Path(lora_extension().available_networks[name].filename)) for name in self.loras()]
        return entries(found, Path(shared.cmd_opts.lora_dir), _thumbnail)

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
        available = lora_extension().available_networks
        if name not in available:
            self.refresh()
        if name not in available:
            raise BadInput(f"there is no LoRA named {name!r}", remedy="Pick one of the list, or refresh it")
        return Path(available[name].filename)

    def _network(self, lora: Lora):
        """A LoRA as the Lora extension loads it for a prompt. Raises BadInput for one that it fails at."""
        networks = lora_extension()
        try:
            return networks.load_network(lora.name, networks.available_networks[lora.name])
        except Exception as error:  # its parsers assert and raise whatever they meet
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInput(
                f"the WebUI itself cannot load it ({reason})",
                file=lora.path.name,
                remedy="Pick a LoRA that can be prompted with",
            ) from error

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
        networks = lora_extension()
        if FORGE:
            _forget_in_forge(networks)
        else:
            networks.networks_in_memory.pop(path.stem, None)
            networks.load_networks([])
        for kind in (processing.StableDiffusionProcessing, processing.StableDiffusionProcessingTxt2Img):
            for cache in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
                if cache in vars(kind):
                    setattr(kind, cache, [None, None])
        self.refresh()
        return f"<lora:{path.stem}:1>"

    # --- the model ---------------------------------------------------------------------------------

    def missing(self) -> str:
        return f"{NOT_IN_FORGE}. {INSTEAD}." if FORGE else ""

    def model(self) -> Model:
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
        mapping = shared.sd_model.network_layer_mapping
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
        applied = self._network(lora).modules
        for key, slot in self.slots(list(lora.dense)).items():
            module = applied.get(network_name(key))
            # what the Lora extension cannot apply, it leaves out as well
            if module is not None and (delta := _updown(module, slot)) is not None:
                yield key, delta

    @contextmanager
    def embeddings(self, loras: Sequence[Lora]) -> Iterator[None]:
        known = sd_hijack.model_hijack.embedding_db
        registered = []
        try:
            for lora in loras:
                if not lora.embeddings:
                    continue
                for name, embedding in self._network(lora).bundle_embeddings.items():
                    fits = known.expected_shape in (-1, embedding.shape)
                    if fits and name not in known.word_embeddings:  # one in the embeddings folder comes first there too
                        known.register_embedding(embedding, shared.sd_model)
                        registered.append(name)
            yield
        finally:
            for name in registered:
                known.register_embedding_by_name(None, shared.sd_model, name)

    @contextmanager
    def session(self, full_precision: bool = False) -> Iterator[None]:
        model = shared.sd_model
        with ExitStack() as stack:
            stack.enter_context(_bare(model))
            sd_models.apply_alpha_schedule_override(model)  # as the settings have it now, not the last generation
            stack.enter_context(_frozen(model))
            stack.enter_context(_no_hypertile(model))
            if full_precision:
                stack.enter_context(_full_precision(model))
            yield

    def unet(self) -> torch.nn.Module:
        return shared.sd_model.model.diffusion_model

    @contextmanager
    def resting(self, text: bool = False) -> Iterator[None]:
        model = shared.sd_model
        # with a live preview's wish still open the page's thread would have the VAE decode
        shared.state.current_latent = None
        with ExitStack() as back:
            back.enter_context(_plain_attention())
            kind = devices.device.type
            if kind == "mps" or (kind == "cuda" and devices.cuda_no_autocast()):
                # casts there are patches of classes, which a block that is computed again in the backward needs too
                back.enter_context(devices.autocast())
            if getattr(model, "lowvram", False):  # of its parts one at a time is on the device anyway
                back.enter_context(_unhooked(self.unet()))
                yield
                return
            parts = [model.first_stage_model]
            if not text:
                parts.append(model.conditioner if model.is_sdxl else model.cond_stage_model)
            for part in parts:
                back.callback(part.to, next(part.parameters()).device)
                part.to(devices.cpu)
            yield

    # --- prompts, pictures, predictions ----------------------------------------------------------------

    def encode(
        self, prompt: str, resolution: int, negative: bool = False, gradients: bool = False
    ) -> dict[str, Tensor]:
        model = shared.sd_model
        (text,), _ = extra_networks.parse_prompts([prompt])
        texts = prompt_parser.SdConditioning([text], width=resolution, height=resolution, is_negative_prompt=negative)
        with torch.set_grad_enabled(gradients), _trainable(model, gradients), devices.autocast():
            cond = model.get_learned_conditioning(texts)
        return cond if model.is_sdxl else {"crossattn": cond}

    def sample(self, prompt: str, seed: int, resolution: int, steps: int, guidance: float) -> Tensor:
        p = _txt2img(prompt, seed, resolution, steps, guidance)
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
        p = _txt2img(prompt, seed, resolution, steps, guidance)
        p.sd_model_name, p.sd_model_hash = p.sd_model.sd_checkpoint_info.name_for_extra, p.sd_model.sd_model_hash
        p.sd_vae_name, p.sd_vae_hash = sd_vae.get_loaded_vae_name(), sd_vae.get_loaded_vae_hash()
        return processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds)

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        # the VAE draws from its posterior: the same latent for the same picture, and the caller's random state kept
        with torch.random.fork_rng(), devices.autocast():
            torch.manual_seed(0)
            return sd_samplers_common.images_tensor_to_samples(pixels, model=shared.sd_model)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Image.Image:
        decoded = processing.decode_latent_batch(
            shared.sd_model, latent, target_device=devices.cpu, check_for_nans=True
        )
        pixels = torch.clamp((decoded[0].float() + 1.0) / 2.0, 0.0, 1.0)
        return Image.fromarray((255.0 * pixels.permute(1, 2, 0).numpy()).astype(np.uint8))

    def add_noise(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = shared.sd_model.alphas_cumprod.float().to(latent.device)[t].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise

    def predict(self, x: Tensor, t: Tensor, conds: Sequence[dict[str, Tensor]]) -> Tensor:
        # prompts of different length: attention does not change when the whole sequence is repeated
        length = math.lcm(*(c["crossattn"].shape[1] for c in conds))
        text = torch.cat([c["crossattn"].repeat(1, length // c["crossattn"].shape[1], 1) for c in conds])
        if shared.sd_model.is_sdxl:
            cond = {"crossattn": text, "vector": torch.cat([c["vector"] for c in conds])}
        else:
            cond = {"c_crossattn": [text]}
        # as the samplers call it, through the wrapper where casts and the medvram hook sit
        with _unet_autocast():
            return shared.sd_model.apply_model(x.to(devices.device), t.float().to(devices.device), cond)

    # --- the WebUI's queue and progress bar ---------------------------------------------------------------

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """The WebUI's queue: waits for generations, and they for it. The page's progress bar asks by the name."""
        progress.add_task_to_queue(name)
        with call_queue.queue_lock:
            shared.state.begin(job=name)
            progress.start_task(name)
            try:
                yield
            finally:
                progress.finish_task(name)
                shared.state.end()
                devices.torch_gc()

    def progress(self, info: dict) -> bool:
        # the sampler sets sampling_step itself, within one hundredth
        shared.state.job_count, shared.state.job_no = 100, int(100 * share(info))
        shared.state.sampling_step, shared.state.sampling_steps = 0, 0
        text = f"{info.get('what') or info['phase']}: step {info.get('step', 0)}/{info.get('steps', 1)}"
        shared.state.textinfo = text + (f", loss {info['loss']:.3f}" if "loss" in info else "")
        return bool(shared.state.interrupted or shared.state.stopping_generation)


def _txt2img(
    prompt: str, seed: int, resolution: int, steps: int, guidance: float
) -> processing.StableDiffusionProcessingTxt2Img:
    """One picture as the txt2img tab would ask for it."""
    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model,
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


@contextmanager
def _trainable(model, wanted: bool) -> Iterator[None]:
    """SDXL's conditioner runs its encoders without gradients, unless they say that they are trainable."""
    found = (
        [(e, e.is_trainable) for e in getattr(model, "conditioner", None).embedders] if wanted and model.is_sdxl else []
    )
    try:
        for encoder, _ in found:
            encoder.is_trainable = True
        yield
    finally:
        for encoder, flag in found:
            encoder.is_trainable = flag


def _unet_autocast():
    return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()


@contextmanager
def _bare(model) -> Iterator[None]:
    """No LoRA in the weights, no hypernetwork in the attention.

    LoRAs are baked in lazily, layer by layer, so each layer is asked to restore itself now. Those that were loaded are
    named again at exit; the next generation bakes in what its own prompt asks for.
    """
    networks = lora_extension()
    loaded = [
        (n.mentioned_name or n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in networks.loaded_networks
    ]

    def restore() -> None:
        with torch.no_grad():
            for module in model.modules():
                if getattr(module, "network_current_names", ()):
                    networks.network_apply_weights(module)

    hypernetworks = list(shared.loaded_hypernetworks)
    networks.load_networks([])
    try:
        shared.loaded_hypernetworks.clear()
        restore()
        yield
    finally:
        shared.loaded_hypernetworks[:] = hypernetworks
        networks.load_networks([])
        restore()
        if loaded:
            networks.load_networks(*map(list, zip(*loaded)))


@contextmanager
def _frozen(model) -> Iterator[None]:
    """Eval mode and no gradients for any weight; exit puts each flag back and drops gradients."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, training in modes:
            module.training = training


@contextmanager
def _unhooked(unet: torch.nn.Module) -> Iterator[None]:
    """Without --lowvram's hooks, which swap the data of the weights that a backward will need."""
    found = [(module, dict(module._forward_pre_hooks)) for module in unet.modules()]
    try:
        for module, hooks in found:
            for number, hook in hooks.items():
                if getattr(hook, "__module__", "") == "modules.lowvram":
                    del module._forward_pre_hooks[number]
        yield
    finally:
        for module, hooks in found:
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(hooks)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """PyTorch's own attention, whatever the settings say.

    The WebUI's others cut their work by the memory that is free at the moment, so that a block that is computed again would
    not be computed in the same way; and some keep all scores for the backward.
    """
    import ldm.modules.attention
    import sgm.modules.attention
    from modules.sd_hijack_optimizations import scaled_dot_product_attention_forward

    kinds = (ldm.modules.attention.CrossAttention, sgm.modules.attention.CrossAttention)
    found = [kind.forward for kind in kinds]
    try:
        for kind in kinds:
            kind.forward = scaled_dot_product_attention_forward
        yield
    finally:
        for kind, forward in zip(kinds, found):
            kind.forward = forward


@contextmanager
def _full_precision(model) -> Iterator[None]:
    """As if the WebUI had been started with --no-half."""
    wanted = dict.fromkeys(("dtype", "dtype_vae", "dtype_unet", "dtype_inference"), torch.float32)
    wanted |= {"unet_needs_upcast": False, "force_fp16": False}
    found = {name: getattr(devices, name) for name in wanted}
    # live previews' models, kept in the precision in which they were first used
    caches = (sd_vae_approx.sd_vae_approx_models, sd_vae_taesd.sd_vae_taesd_models)
    kept = [dict(cache) for cache in caches]
    with ExitStack() as back:
        for name, value in wanted.items():
            back.callback(setattr, devices, name, found[name])
            setattr(devices, name, value)
        for cache, before in zip(caches, kept):
            back.callback(cache.update, before)
            back.callback(cache.clear)
            cache.clear()
        back.enter_context(precision.full_precision([model]))
        yield


@contextmanager
def _no_hypertile(model) -> Iterator[None]:
    """A Hypertile that the last generation left on stays hooked until the next one: off for the job."""
    found = [p for m in model.modules() if (p := getattr(m, "__webui_hypertile_params", None)) is not None]
    before = [p.enabled for p in found]
    try:
        for params in found:
            params.enabled = False
        yield
    finally:
        for params, enabled in zip(found, before):
            params.enabled = enabled
