"""All that a job changes on the WebUI's live model, and how it is put back: the one owner of restoring.

Every change is preceded by what undoes it, on a stack of its own: whatever fails, and wherever, all that was changed is put
back in reverse order, and what cannot be put back keeps nothing else from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from modules import devices, progress, script_callbacks, sd_hijack, sd_models, sd_vae_approx, sd_vae_taesd, shared

from ziplora_lib.errors import BadInput, MergeFailed
from ziplora_lib.hosts import precision
from ziplora_lib.hosts.host import Model

# what other extensions hang on a module: its fields of hooks, and what replaces its methods
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METHODS = ("forward", "_forward")
# a sampler asks these at every step, and they may change what it is given
CALLBACKS = ("callbacks_cfg_denoiser", "callbacks_cfg_denoised", "callbacks_cfg_after_cfg")
FLAGS = ("skipped", "interrupted", "stopping_generation")


def lora_extension():
    """The built-in Lora extension's `networks`: a top-level module, there once the WebUI's scripts are loaded."""
    networks = sys.modules.get("networks")
    if networks is None:
        raise BadInput(
            "the WebUI's built-in Lora extension is not active",
            remedy="Switch it on in Extensions > Installed, and restart",
        )
    return networks


@dataclass(frozen=True)
class Held:
    """The model that a session began with. said: what the host says of it; checkpoint, vae: whose weights it has."""

    model: torch.nn.Module
    said: Model
    checkpoint: object
    vae: object
    device: torch.device

    @classmethod
    def now(cls, said: Model) -> Held:
        model = shared.sd_model
        return cls(model, said, model.sd_checkpoint_info, _vae_of(model), _device_of(model))

    def check(self) -> None:
        """Raises MergeFailed if the WebUI has another model by now. Its own ways to change it wait for us; others may not."""
        same = sd_models.model_data.sd_model is self.model and self.model.sd_checkpoint_info is self.checkpoint
        if not (same and _vae_of(self.model) == self.vae):
            raise changed()

    def check_place(self) -> None:
        """Raises MergeFailed if the model was unloaded, which does not wait for what runs on it."""
        self.check()
        if not getattr(self.model, "lowvram", False) and _device_of(self.model) != self.device:
            raise changed()


def changed() -> MergeFailed:
    return MergeFailed("The checkpoint was changed or unloaded while this was running. Load it again, and begin again.")


def _vae_of(model: torch.nn.Module) -> object:
    return getattr(model, "loaded_vae_file", None)


def _device_of(model: torch.nn.Module) -> torch.device:
    return next(model.model.parameters()).device


def each(action: Callable, things: Iterable) -> None:
    """Does it with every one of them, whatever fails; raises what failed afterwards."""
    with ExitStack() as every:
        for thing in things:
            every.callback(action, thing)


# --- the WebUI's LoRAs ----------------------------------------------------------------------------------


@contextmanager
def bare(model: torch.nn.Module) -> Iterator[None]:
    """No LoRA in the weights, no hypernetwork in the attention.

    LoRAs are baked in lazily, layer by layer, so each layer is asked to restore itself now. Those that were loaded are
    listed again at exit, as they were, and baked in by the next generation that asks for them.
    """
    networks = lora_extension()
    loaded, hypernetworks = list(networks.loaded_networks), list(shared.loaded_hypernetworks)
    bundled = [e for net in loaded for e in net.bundle_embeddings.values() if e.loaded]
    with ExitStack() as back:
        back.callback(_load_again, model, loaded, bundled)
        back.callback(_unload, model)
        _unload(model)
        back.callback(shared.loaded_hypernetworks.__setitem__, slice(None), hypernetworks)
        shared.loaded_hypernetworks.clear()
        yield


def _unload(model: torch.nn.Module) -> None:
    networks = lora_extension()
    networks.load_networks([])
    with torch.no_grad():
        each(networks.network_apply_weights, [m for m in model.modules() if getattr(m, "network_current_names", ())])


def _load_again(model: torch.nn.Module, loaded: list, bundled: list) -> None:
    """The very objects that were loaded: another extension may have changed them, and their files may be gone by now."""
    networks, known = lora_extension(), sd_hijack.model_hijack.embedding_db
    if sd_models.model_data.sd_model is not model:  # another one has come meanwhile, with LoRAs of its own
        return
    # of one that was overwritten, the next prompt that has it loads what is there now
    networks.loaded_networks[:] = kept = [net for net in loaded if _unchanged(net)]
    own = {id(e) for net in kept for e in net.bundle_embeddings.values()}
    each(lambda embedding: known.register_embedding(embedding, model), [e for e in bundled if id(e) in own])


def _unchanged(net) -> bool:
    try:
        return os.path.getmtime(net.network_on_disk.filename) == net.mtime
    except OSError:
        return False


def forget(name: str) -> None:
    """A LoRA's file is another one now: nothing of the old one stays in memory, nor in the weights.

    The Lora extension tells by name and strength what a layer has, not by content: a layer that has it would keep it.
    """
    lora_extension().networks_in_memory.pop(name, None)
    if (model := sd_models.model_data.sd_model) is not None:
        with bare(model):
            pass


@contextmanager
def known_embeddings(model: torch.nn.Module, embeddings: Iterable) -> Iterator[None]:
    """Bundled embeddings that prompts can name meanwhile, unless one of that name is known already."""
    known = sd_hijack.model_hijack.embedding_db

    def unknown(embedding) -> None:
        # where another model was loaded meanwhile, it is already
        if known.word_embeddings.get(embedding.name) is embedding:
            known.register_embedding_by_name(None, model, embedding.name)

    with ExitStack() as back:
        for embedding in embeddings:
            fits = known.expected_shape in (-1, embedding.shape)
            if (
                fits and embedding.name not in known.word_embeddings
            ):  # one in the embeddings folder comes first there too
                back.callback(unknown, embedding)
                known.register_embedding(embedding, model)
        yield


# --- the model ------------------------------------------------------------------------------------------


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for any weight; exit puts each flag back and drops gradients."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            # a gradient that somebody else has left does not fit any more where the weights were moved meanwhile
            if grad is None or (grad.device, grad.dtype) == (parameter.device, parameter.dtype):
                parameter.grad = grad


@contextmanager
def by_itself(model: torch.nn.Module) -> Iterator[None]:
    """Without what other extensions have hung on the UNet, the text encoders and the sampler.

    A generation that broke off leaves it there (ControlNet, NegPiP), others leave it there for good: a merge would learn it.
    """
    from modules import sd_hijack_unet

    text = model.conditioner if getattr(model, "is_sdxl", False) else model.cond_stage_model
    modules = [*model.model.modules(), *text.modules()]
    with ExitStack() as back:
        for module in modules:
            _take_off(back, vars(module), METHODS)
            for field in HOOKS:
                if hooks := getattr(module, field, None):
                    _put_aside(back, hooks, {key: hook for key, hook in hooks.items() if _moves(hook)})
        # FreeU's place
        _put_aside(back, vars(sd_hijack_unet.th), {})
        for name in CALLBACKS:
            if callbacks := script_callbacks.callback_map.get(name):
                back.callback(callbacks.__setitem__, slice(0, 0), list(callbacks))
                callbacks.clear()
        yield


def _take_off(back: ExitStack, fields: dict, names: Iterable[str]) -> None:
    for name in names:
        if name in fields:
            back.callback(fields.__setitem__, name, fields[name])
            del fields[name]


def _put_aside(back: ExitStack, table: dict, kept: dict) -> None:
    """Leaves in the table only what is to be kept; in the end all is there again, in its order."""
    found = dict(table)
    if len(found) == len(kept):
        return
    back.callback(table.update, found)
    back.callback(table.clear)
    table.clear()
    table.update(kept)


def _moves(hook: Callable) -> bool:
    """Whether it is the WebUI's own, of --medvram and --lowvram: without it the weights do not come to the device."""
    return getattr(hook, "__module__", "") == "modules.lowvram"


@contextmanager
def usual(model: torch.nn.Module) -> Iterator[None]:
    """Without what the last generation has left on: Hypertile, tiling, a noise schedule; and with its comments aside."""
    hijack = sd_hijack.model_hijack
    with ExitStack() as back:
        if hasattr(model, "alphas_cumprod"):
            back.callback(setattr, model, "alphas_cumprod", model.alphas_cumprod)
        sd_models.apply_alpha_schedule_override(model)  # as the settings have it now
        if hijack.circular_enabled:
            back.callback(hijack.apply_circular, True)
            hijack.apply_circular(False)
        for params in [p for m in model.modules() if (p := getattr(m, "__webui_hypertile_params", None)) is not None]:
            back.callback(setattr, params, "enabled", params.enabled)
            params.enabled = False
        for name, value in (("comments", []), ("extra_generation_params", {}), ("fixes", None)):
            back.callback(setattr, hijack, name, getattr(hijack, name))
            setattr(hijack, name, value)
        yield


@contextmanager
def same_chance() -> Iterator[None]:
    """Samplers seed the generators that all share."""
    with torch.random.fork_rng([devices.device] if devices.device.type == "cuda" else []):
        yield


@contextmanager
def full_precision(model: torch.nn.Module) -> Iterator[None]:
    """As if the WebUI had been started with --no-half."""
    wanted = dict.fromkeys(("dtype", "dtype_vae", "dtype_unet", "dtype_inference"), torch.float32)
    wanted |= {"unet_needs_upcast": False, "force_fp16": False}
    with ExitStack() as back:
        for name, value in wanted.items():
            back.callback(setattr, devices, name, getattr(devices, name))
            setattr(devices, name, value)
        # live previews' models, kept in the precision in which they were first used
        for cache in (sd_vae_approx.sd_vae_approx_models, sd_vae_taesd.sd_vae_taesd_models):
            back.callback(cache.update, dict(cache))
            back.callback(cache.clear)
            cache.clear()
        back.enter_context(precision.full_precision([model]))
        yield


@contextmanager
def unhooked(unet: torch.nn.Module) -> Iterator[None]:
    """Without --lowvram's hooks, which swap the data of the weights that a backward will need."""
    with ExitStack() as back:
        for module in unet.modules():
            hooks = module._forward_pre_hooks
            _put_aside(back, hooks, {key: hook for key, hook in hooks.items() if not _moves(hook)})
        yield


@contextmanager
def off_device(model: torch.nn.Module, parts: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Parts of the model in main memory; at exit where they were, unless the whole model was unloaded meanwhile."""
    device = _device_of(model)

    def bring_back(part: torch.nn.Module, was: torch.device) -> None:
        if _device_of(model) == device:
            part.to(was)

    with ExitStack() as back:
        for part in parts:
            back.callback(bring_back, part, next(part.parameters()).device)
            part.to(devices.cpu)
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """PyTorch's own attention, whatever the settings say.

    The WebUI's others cut their work by the memory that is free at the moment, so that a block that is computed again would
    not be computed in the same way; and some keep all scores for the backward.
    """
    import ldm.modules.attention
    import sgm.modules.attention
    from modules.sd_hijack_optimizations import scaled_dot_product_attention_forward

    with ExitStack() as back:
        for kind in (ldm.modules.attention.CrossAttention, sgm.modules.attention.CrossAttention):
            back.callback(setattr, kind, "forward", kind.forward)
            kind.forward = scaled_dot_product_attention_forward
        yield


@contextmanager
def trainable(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """SDXL's conditioner runs its encoders without gradients, unless they say that they are trainable."""
    with ExitStack() as back:
        for encoder in model.conditioner.embedders if wanted and model.is_sdxl else ():
            back.callback(setattr, encoder, "is_trainable", encoder.is_trainable)
            encoder.is_trainable = True
        yield


# --- what the WebUI shows ---------------------------------------------------------------------------------


@contextmanager
def shown_as_job(name: str) -> Iterator[None]:
    """A job in the WebUI's state, as a generation's; at exit there is none, and no wish to interrupt one."""

    def clear() -> None:
        shared.state.job, shared.state.job_count, shared.state.textinfo = "", 0, None
        shared.state.current_latent = None
        for flag in FLAGS:
            setattr(shared.state, flag, False)

    with ExitStack() as back:
        back.callback(devices.torch_gc)
        back.callback(clear)
        back.callback(shared.total_tqdm.clear)
        back.callback(progress.finish_task, name)
        shared.state.begin(job=name)
        back.callback(shared.state.end)
        progress.start_task(name)
        yield
