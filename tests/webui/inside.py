"""What tests do inside the WebUI's process: a fingerprint of all that a job could leave behind, failures in its midst.

Loaded there by its path (see `INSIDE`); imports neither pytest nor what stands beside it.
"""

import contextlib
import dis
import gc
import inspect
import linecache
import os
import random
import shutil
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch

# run by `webui.run`: gives `inside`, this file as a module that lives as long as the WebUI
INSIDE = f"""
import importlib.util, sys
if "ziplora_inside" not in sys.modules:
    spec = importlib.util.spec_from_file_location("ziplora_inside", {str(Path(__file__).resolve())!r})
    sys.modules["ziplora_inside"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["ziplora_inside"])
inside = sys.modules["ziplora_inside"]
"""


class Boom(RuntimeError):
    """What is raised in a job's midst."""


KINDS = {
    kind.__name__: kind
    for kind in (
        Boom,
        torch.cuda.OutOfMemoryError,
        AssertionError,
        MemoryError,
        KeyboardInterrupt,
        OSError,
        SystemExit,
        ValueError,
        KeyError,
    )
}


def host_of_tab():
    """The WebUI's own host, that of its tab and of its API."""
    from modules import script_callbacks

    [found] = [
        c.callback for c in script_callbacks.callback_map["callbacks_app_started"] if c.script.endswith("ziplora.py")
    ]
    return found.__globals__["HOST"]


# --- the fingerprint ------------------------------------------------------------------------------------


def fingerprint() -> dict:
    """Every part of the live process that a merge touches, by name, as something that can be compared."""
    found = {}
    bake_in()
    for part in (_model, _values, _classes, _networks, _settings, _shown, _chance, _files):
        found |= part()
    return found


def changes(before: dict, after: dict) -> list[str]:
    """What differs, as "name: before -> after"."""
    names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [f"{name}: {str(before.get(name))[:100]} -> {str(after.get(name))[:100]}" for name in sorted(names)]


def _model() -> dict:
    from modules import sd_models

    model = sd_models.model_data.sd_model
    found = {"model": (id(model), id(model.sd_checkpoint_info), str(getattr(model, "loaded_vae_file", None)))}
    for name, module in model.named_modules():
        own = vars(module)
        methods = {field: id(own[field]) for field in ("forward", "_forward", "encode", "decode") if field in own}
        hooks = {
            field: [(key, id(hook)) for key, hook in table.items()]
            for field, table in own.items()
            if "hooks" in field and table
        }
        rest = [own.get(field) for field in ("padding_mode", "is_trainable", "network_current_names")]
        backups = [own.get(field) is None for field in ("network_weights_backup", "network_bias_backup")]
        params = getattr(module, "__webui_hypertile_params", None)
        tiled = params and params.enabled
        found[f"module {name}"] = (module.training, id(type(module)), hooks, methods, rest, backups, tiled)
    return found


def bake_in() -> None:
    """What the next forward does first: the LoRAs that are loaded go into the weights, or leave them."""
    from modules import sd_models

    networks = sys.modules["networks"]
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.MultiheadAttention)
    with torch.no_grad():
        for module in sd_models.model_data.sd_model.modules():
            # the projection inside a MultiheadAttention is baked with it, and is never called itself
            if isinstance(module, kinds) and type(module).__name__ != "NonDynamicallyQuantizableLinear":
                networks.network_apply_weights(module)


def _values() -> dict:
    """The weights."""
    from modules import sd_models

    model, found = sd_models.model_data.sd_model, {}
    for name, p in model.named_parameters():
        found[f"weight {name}"] = (p.requires_grad, p.grad is None, *_told(p))
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = _told(buffer)
    return found


def _told(tensor) -> tuple:
    crc = 0 if tensor.is_meta else zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return str(tensor.dtype), str(tensor.device), tuple(tensor.shape), crc


def _classes() -> dict:
    import ldm.modules.attention
    import sgm.modules.attention
    from modules import script_callbacks, sd_hijack_unet, sd_models

    kinds = set(map(type, sd_models.model_data.sd_model.modules()))
    kinds |= {ldm.modules.attention.CrossAttention, sgm.modules.attention.CrossAttention, torch.nn.Module}
    found = {}
    for kind in kinds:
        methods = {name: id(value) for name, value in vars(kind).items() if callable(value) or "forward" in name}
        found[f"class {kind.__module__}.{kind.__qualname__}"] = methods
    found["torch in the unet"] = {name: id(value) for name, value in vars(sd_hijack_unet.th).items()}
    found["callbacks"] = {name: [id(c) for c in callbacks] for name, callbacks in script_callbacks.callback_map.items()}
    return found


def _networks() -> dict:
    from modules import sd_hijack, shared

    networks, known = sys.modules["networks"], sd_hijack.model_hijack.embedding_db
    loaded = [(id(n), n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in networks.loaded_networks]
    hijack = sd_hijack.model_hijack
    return {
        "loaded LoRAs": loaded,
        "LoRAs in memory": sorted(networks.networks_in_memory),
        "embeddings": {name: id(e) for name, e in known.word_embeddings.items()},
        "embeddings by token": {
            key: [(tuple(ids), id(e)) for ids, e in found] for key, found in known.ids_lookup.items()
        },
        "hypernetworks": [id(h) for h in shared.loaded_hypernetworks],
        "hijack": (list(hijack.comments), dict(hijack.extra_generation_params), hijack.fixes, hijack.circular_enabled),
        "attention": (hijack.optimization_method, id(sd_hijack.current_optimizer), len(hijack.layers or ())),
    }


def _settings() -> dict:
    from modules import devices, sd_unet, sd_vae_approx, shared

    plain = (bool, int, float, str, type(None), torch.dtype, torch.device)
    return {
        "settings": {name: repr(value) for name, value in shared.opts.data.items()},
        "devices": {name: str(value) for name, value in vars(devices).items() if isinstance(value, plain)},
        "sd unet": (id(sd_unet.current_unet), id(sd_unet.current_unet_option)),
        "preview models": sorted(map(str, sd_vae_approx.sd_vae_approx_models)),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled()),
        "threads of torch": torch.get_num_threads(),
    }


def _shown() -> dict:
    from modules import call_queue, progress, shared

    lock = call_queue.queue_lock
    return {
        "queue": (lock._lock.locked(), len(lock._pending_threads)),
        "progress": (progress.current_task, list(progress.pending_tasks)),
        "state": (shared.state.job, shared.state.job_count, shared.state.textinfo),
        "wishes": (shared.state.skipped, shared.state.interrupted, shared.state.stopping_generation),
        "bar": shared.total_tqdm._tqdm is None,
    }


def _chance() -> dict:
    said = np.random.get_state()
    return {
        "chance of torch": zlib.crc32(torch.get_rng_state().numpy()),
        "chance of numpy": (zlib.crc32(said[1]), said[2]),
        "chance of python": hash(random.getstate()),
    }


def _files() -> dict:
    from modules import shared
    from modules.paths import data_path

    folder = Path(shared.cmd_opts.lora_dir)
    files = {
        str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()
    }
    scratch = Path(data_path) / "cache/ziplora"
    return {"files": files, "scratch": sorted(map(str, scratch.rglob("*"))) if scratch.is_dir() else []}


# --- failures -------------------------------------------------------------------------------------------


def watched() -> dict[str, str]:
    """The files whose lines fail, by path."""
    import ziplora_lib

    root = Path(ziplora_lib.__file__).parent
    names = ("hosts/webui.py", "hosts/webui_state.py", "hosts/precision.py", "job.py", "opening.py", "calibration.py")
    names += ("merge/attach.py", "memory.py", "merge/learning.py", "merge/ziplora.py", "lora/writer.py")
    return {str(root / name): name for name in names if (root / name).is_file()}


_YIELD = dis.opmap["YIELD_VALUE"]


class Trap:
    """Follows the lines of a job in this thread, and raises at one of them: `at`, (place, which time that it is passed).

    Lines that put something back, or delete what is left over, do not count: a failure there is of another kind.
    """

    def __init__(self, at: tuple[str, int] | None = None, kind: type[BaseException] = Boom):
        self.at, self.kind = at, kind
        self.passed: dict[str, int] = {}
        self.sprung = False
        self._files = watched()
        self._entered: set[int] = set()

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, _):
        if frame.f_code.co_filename not in self._files:
            return None
        caller = frame
        while caller is not None:
            if caller.f_code.co_name == "__exit__" or id(caller) in self._entered:
                return None
            caller = caller.f_back
        return self._line

    def _line(self, frame, event, _):
        code = frame.f_code
        if event == "return":
            # a context manager that has been entered: what comes after its yield puts back
            yielded = code.co_flags & inspect.CO_GENERATOR and code.co_code[frame.f_lasti] == _YIELD
            (self._entered.add if yielded else self._entered.discard)(id(frame))
        elif event == "line" and id(frame) not in self._entered and not self._deletes(frame):
            place = f"{self._files[code.co_filename]}:{frame.f_lineno}"
            self.passed[place] = self.passed.get(place, 0) + 1
            if self.at == (place, self.passed[place]) and not self.sprung:
                self.sprung = True
                raise self.kind(f"a failure at {place}")
        return self._line

    @staticmethod
    def _deletes(frame) -> bool:
        return ".unlink(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)


_last: list[dict] = []


def run(recipe: dict, at=None, kind: str = "Boom", again: bool = False) -> dict:
    """One merge in this thread, as a job's own thread has it: its end, what escaped, and what has changed.

    again: nothing has happened since the last one, whose fingerprint serves.
    """
    from ziplora_lib.jobs import Job
    from ziplora_lib.recipe import parse

    chosen, job, escaped = host_of_tab(), Job.merge(parse(recipe)), None
    phases = []

    def watch(info):
        phases.append(info["phase"])
        return chosen.progress(info)

    before = _last.pop() if again and _last else fingerprint()
    with Trap(at and tuple(at), KINDS[kind]) as passed:
        try:
            with chosen.exclusive(job.task):
                job.run(chosen, watch)
        except BaseException as error:
            escaped = type(error).__name__
            del error
    after = fingerprint()
    _last[:] = [after]
    return {
        "state": job.state,
        "error": job.error,
        "escaped": escaped,
        "phases": list(dict.fromkeys(phases)),
        "passed": passed.passed,
        "sprung": passed.sprung,
        "changes": without_output(changes(before, after), before, after, recipe["output"]),
        "warnings": getattr(job.result, "warnings", []),
    }


def without_output(found: list[str], before: dict, after: dict, output: str) -> list[str]:
    """All but the output's own files, which may be there, whole, or not, and what is kept on purpose to go on from."""

    def others(fingerprint):
        return {name: facts for name, facts in fingerprint["files"].items() if Path(name).name.split(".")[0] != output}

    kept = [line for line in found if not line.startswith(("files: ", "scratch: "))]
    return kept + (["files"] if others(before) != others(after) else [])


def forget(output: str) -> dict:
    """Deletes what a job has saved, and tells what that was: {name: crc}. Nor does anything stay to go on from."""
    from modules import shared
    from modules.paths import data_path

    shutil.rmtree(Path(data_path) / "cache/ziplora", ignore_errors=True)
    found = {}
    for file in sorted(Path(shared.cmd_opts.lora_dir).glob(f"{output}*")):
        found[file.name] = zlib.crc32(file.read_bytes())
        file.unlink()
    sys.modules["networks"].list_available_networks()
    return found


# --- memory -----------------------------------------------------------------------------------------------


def memory() -> dict:
    """Bytes of this process that are in memory, and what stays there, after all that can be given back was."""
    import ctypes

    for _ in range(3):
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/statm").read_text().split()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    from modules import sd_models

    model = sd_models.model_data.sd_model
    hooks = sum(len(t) for m in model.modules() for f, t in vars(m).items() if f.endswith("hooks") and t)
    return {
        "resident": int(status[1]) * os.sysconf("SC_PAGE_SIZE"),
        "tensors": len(tensors),
        "tensor_bytes": sum(t.numel() * t.element_size() for t in tensors if not t.is_meta),
        "objects": len(gc.get_objects()),
        "hooks": hooks,
        "threads": threading.active_count(),
        "at": time.time(),
    }


# --- gates ------------------------------------------------------------------------------------------------


class Gate:
    """Holds a job where it calls one of the host's methods, until it is opened: then nothing depends on who is faster.

    when: what of the call's arguments is asked for, such as {"phase": "merge"} of `progress`.
    """

    def __init__(self, method: str, when: dict | None = None):
        from ziplora_lib.hosts.webui import WebuiHost

        self._reached, self._open = threading.Event(), threading.Event()
        self._kind, self._method, self._kept = WebuiHost, method, getattr(WebuiHost, method)
        kept, wanted = self._kept, when or {}

        def held(host, *args, **kwargs):
            if all(isinstance(args[0], dict) and args[0].get(name) == value for name, value in wanted.items()):
                self._reached.set()
                self._open.wait(60)
            return kept(host, *args, **kwargs)

        setattr(WebuiHost, method, held)

    def reached(self) -> bool:
        return self._reached.wait(60)

    def open(self) -> None:
        setattr(self._kind, self._method, self._kept)
        self._open.set()


gates: list[Gate] = []

# outputs whose job is interrupted as soon as it runs: what the WebUI's button does while it is the job's turn
aimed_at: set[str] = set()


def aim() -> None:
    """From now on jobs in `aimed_at`, by their task, are interrupted in their calibration."""
    from modules import shared

    from ziplora_lib.hosts.webui import WebuiHost

    kept = WebuiHost.progress
    if getattr(kept, "aims", False):
        return

    def progress(host, info):
        if info["phase"] == "calibrate" and shared.state.job.removeprefix("ziplora ") in aimed_at:
            shared.state.interrupt()
        return kept(host, info)

    progress.aims = True
    WebuiHost.progress = progress
