"""The kinds of LoRA that are read: one table, from which the tests and the README's table are made, and who writes them.

Every file is written by the library that defines its kind, with random values; what it adds to the model is that library's
own merge, less the weight as it was.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ziplora_lib.lora.keys import layer_key

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# every Linear and Conv2d, by the ends of their names
UNET = r"(.*\.)?(to_[qkv]|to_out\.0|time_emb_proj|proj|proj_in|proj_out|net\.2|conv|conv[12]|conv_(shortcut|in|out)|linear_.)"
TEXT = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2|text_projection)"
# those of them that have a bias
WITH_BIAS = (
    r"(.*\.)?(to_out\.0|time_emb_proj|proj|proj_in|proj_out|net\.2|conv|conv[12]|conv_(shortcut|in|out)|linear_.)"
)


@dataclass(frozen=True)
class File:
    """A file of a kind. kinds: what the reader tells of its layers; by: who writes it; size: of its random values.

    natural: how the rank that ΔW has by nature follows from a layer's tensors, where the file gives it; None for kinds of
    full rank.
    """

    name: str
    kinds: set[str]
    by: str
    options: Mapping = field(default_factory=dict)
    natural: Callable[[Mapping[str, Tensor]], int] | None = None
    size: float = 0.1


@dataclass(frozen=True)
class Row:
    """A row of the README's table: a kind, who writes it, what becomes of it, what is lost; and files of it for the tests."""

    kind: str
    written_by: str
    treated: str
    lost: str
    files: tuple[File, ...] = ()


def _lora(parts: Mapping[str, Tensor]) -> int:
    return next(parts[p].shape[0] for p in ("lora_down.weight", "lora_A.weight") if p in parts)


def _loha(parts: Mapping[str, Tensor]) -> int:
    return parts["hada_w1_b"].shape[0] * parts["hada_w2_b"].shape[0]


def _lokr(parts: Mapping[str, Tensor]) -> int:
    rank = 1
    for n in (1, 2):
        whole = parts.get(f"lokr_w{n}")
        rank *= parts[f"lokr_w{n}_b"].shape[0] if whole is None else min(whole.shape[0], whole[0].numel())
    return rank


def _glora(parts: Mapping[str, Tensor]) -> int:
    # W a1 a2 has the rank of a2 at each position of the kernel
    return parts["b2.weight"].shape[0] * (1 + parts["b2.weight"].shape[2:].numel())


LINEAR = dict(lora_dim=4, alpha=2, conv_lora_dim=0)
BOTH = dict(lora_dim=4, alpha=2, conv_lora_dim=3, conv_alpha=6)
# the roots of the ranks, and the constraints below, are numbers that every dtype has
FOUR = dict(lora_dim=4, alpha=2, conv_lora_dim=4, conv_alpha=6)
SMALL = dict(lora_dim=2, alpha=1, conv_lora_dim=2, conv_alpha=3)
LORA, LOCON, NORM, BIAS = "LoRA", "LoCon", "norm", "bias"

TABLE = (
    Row(
        "LoRA, LoCon, also Tucker",
        "kohya, LyCORIS, PEFT, diffusers, OneTrainer, ComfyUI",
        "as it is, at its own rank r",
        "nothing",
        (
            File("lora", {LORA}, "lycoris", dict(algo="lora", **LINEAR), _lora),
            File("locon", {LORA, LOCON}, "lycoris", dict(algo="locon", **BOTH), _lora),
            File("locon-tucker", {LORA, LOCON}, "lycoris", dict(algo="locon", use_tucker=True, **BOTH), _lora),
            File("locon-rs", {LORA, LOCON}, "lycoris", dict(algo="locon", rs_lora=True, **FOUR), _lora),
            File("peft-lora", {LORA, LOCON}, "peft", dict(config="LoraConfig", r=4, lora_alpha=6), _lora),
            File(
                "peft-rslora",
                {LORA, LOCON},
                "peft",
                dict(config="LoraConfig", r=4, lora_alpha=6, use_rslora=True),
                _lora,
            ),
            File("diffusers-lora", {LORA, LOCON}, "diffusers", dict(config="LoraConfig", r=4, lora_alpha=6), _lora),
        ),
    ),
    Row(
        "LoHa, also Tucker",
        "LyCORIS, PEFT",
        "as it is, at rank r²",
        "nothing",
        (
            File("loha", {"LoHa"}, "lycoris", dict(algo="loha", **SMALL), _loha, 0.3),
            File("loha-tucker", {"LoHa"}, "lycoris", dict(algo="loha", use_tucker=True, **SMALL), _loha, 0.3),
            File("peft-loha", {"LoHa"}, "peft", dict(config="LoHaConfig", r=2, alpha=3), _loha, 0.3),
            File(
                "peft-loha-tucker",
                {"LoHa"},
                "peft",
                dict(config="LoHaConfig", r=2, alpha=3, use_effective_conv2d=True),
                _loha,
                0.3,
            ),
        ),
    ),
    Row(
        "LoKr, also Tucker",
        "LyCORIS, PEFT",
        "as it is, at the product of its two ranks; at full rank as DoRA below",
        "nothing",
        (
            File("lokr", {"LoKr"}, "lycoris", dict(algo="lokr", factor=4, **SMALL), _lokr, 0.3),
            File(
                "lokr-both", {"LoKr"}, "lycoris", dict(algo="lokr", factor=8, decompose_both=True, **SMALL), _lokr, 0.4
            ),
            File("lokr-tucker", {"LoKr"}, "lycoris", dict(algo="lokr", factor=4, use_tucker=True, **SMALL), _lokr, 0.3),
            File("lokr-whole", {"LoKr"}, "lycoris", dict(algo="lokr", factor=4, full_matrix=True, **SMALL), _lokr, 0.2),
            File("peft-lokr", {"LoKr"}, "peft", dict(config="LoKrConfig", r=2, alpha=3), _lokr, 0.3),
            File(
                "peft-lokr-both",
                {"LoKr"},
                "peft",
                dict(config="LoKrConfig", r=2, alpha=3, decompose_both=True, use_effective_conv2d=True),
                _lokr,
                0.3,
            ),
            File("peft-lokr-whole", {"LoKr"}, "peft", dict(config="LoKrConfig", r=64, alpha=48), _lokr, 0.2),
        ),
    ),
    Row(
        "GLoRA",
        "LyCORIS",
        "worked out on your model, at rank 2r (r more for each position of a kernel)",
        "nothing",
        (File("glora", {"GLoRA"}, "lycoris", dict(algo="glora", **SMALL), _glora),),
    ),
    Row(
        "DoRA, of LoRA, LoHa and LoKr",
        "LyCORIS, PEFT, diffusers",
        "worked out on your model, brought to rank 64",
        "what does not fit that rank; how much is said afterwards",
        (
            File(
                "dora", {"DoRA of LoRA", "DoRA of LoCon"}, "lycoris", dict(algo="locon", weight_decompose=True, **BOTH)
            ),
            File(
                "dora-on-inputs",
                {"DoRA of LoRA", "DoRA of LoCon"},
                "lycoris",
                dict(algo="locon", weight_decompose=True, wd_on_out=False, **BOTH),
            ),
            File("dora-loha", {"DoRA of LoHa"}, "lycoris", dict(algo="loha", weight_decompose=True, **SMALL), size=0.3),
            File(
                "dora-lokr",
                {"DoRA of LoKr"},
                "lycoris",
                dict(algo="lokr", factor=4, weight_decompose=True, **SMALL),
                size=0.3,
            ),
            File(
                "peft-dora",
                {"DoRA of LoRA", "DoRA of LoCon"},
                "peft",
                dict(config="LoraConfig", r=4, lora_alpha=6, use_dora=True),
            ),
            File(
                "diffusers-dora",
                {"DoRA of LoRA", "DoRA of LoCon"},
                "diffusers",
                dict(config="LoraConfig", r=4, lora_alpha=6, use_dora=True),
            ),
        ),
    ),
    Row(
        "(IA)³",
        "LyCORIS",
        "as DoRA",
        "as DoRA",
        (
            File("ia3", {"(IA)³"}, "lycoris", dict(algo="ia3", **SMALL), size=0.2),
            File("ia3-on-inputs", {"(IA)³"}, "lycoris", dict(algo="ia3", train_on_input=True, **SMALL), size=0.2),
        ),
    ),
    Row(
        "OFT, BOFT",
        "LyCORIS, kohya",
        "as DoRA",
        "as DoRA",
        (
            File("oft", {"OFT"}, "lycoris", dict(algo="diag-oft", **BOTH)),
            File("oft-rescaled", {"OFT"}, "lycoris", dict(algo="diag-oft", rescaled=True, constraint=2**-7, **BOTH)),
            File("oft-kohya", {"OFT"}, "kohya-oft", dict(algo="diag-oft", constraint=2**-7, **BOTH)),
            File("boft", {"BOFT"}, "lycoris", dict(algo="boft", **BOTH)),
            File("boft-rescaled", {"BOFT"}, "lycoris", dict(algo="boft", rescaled=True, **BOTH)),
        ),
    ),
    Row(
        "full difference (`diff`)",
        "LyCORIS, ComfyUI",
        "as DoRA",
        "as DoRA",
        (File("full", {"full"}, "lycoris", dict(algo="full", **BOTH)),),
    ),
    Row(
        "norms and biases",
        "LyCORIS, PEFT, ComfyUI",
        "added up: they have no columns to learn",
        "nothing",
        (
            File("norms", {LORA, LOCON, NORM}, "lycoris", dict(algo="locon", train_norm=True, **BOTH), _lora),
            File(
                "peft-biases",
                {LORA, LOCON},
                "peft",
                dict(config="LoraConfig", r=4, lora_alpha=6, lora_bias=True, target_modules=WITH_BIAS),
                _lora,
            ),
        ),
    ),
    Row(
        "bundled embeddings",
        "kohya, OneTrainer",
        "carried over",
        "the later one of two of the same name, with a warning",
    ),
    Row(
        "PEFT's OFT, BOFT, (IA)³ and VeRA; T-LoRA; LyCORIS' old sparse biases; pickled files",
        "",
        "refused, with the reason",
        "",
    ),
)
FILES = {file.name: file for row in TABLE for file in row.files}


def rendered() -> str:
    """The table as Markdown."""
    lines = ["| Kind | Written by | In the zipped LoRA | What is lost |", "|---|---|---|---|"]
    lines += [f"| {row.kind} | {row.written_by} | {row.treated} | {row.lost} |" for row in TABLE]
    return "\n".join(lines)


@dataclass(frozen=True)
class Written:
    """A file, and what the library that wrote it adds to the miniature with it, by layer key.

    deltas: ΔW; vectors: (weight, bias) of norms, and (None, bias) of other layers; weights: ‖W‖, whose rounding ΔW has.
    """

    path: Path
    deltas: dict[str, Tensor]
    vectors: dict[str, tuple[Tensor | None, Tensor | None]]
    weights: dict[str, float]

    def only(self, keys: set[str]) -> Written:
        """The file with these layers alone, beside the whole one."""
        tensors = {n: t for n, t in load_file(self.path).items() if _split(n)[0] in keys}
        path = self.path.parent / "few" / self.path.name
        path.parent.mkdir()
        save_file(tensors, path, _metadata(self.path))
        for settings in self.path.parent.glob("adapter_config.json"):
            shutil.copy(settings, path.parent)
        chosen = ({k: v for k, v in had.items() if k in keys} for had in (self.deltas, self.vectors, self.weights))
        return Written(path, *chosen)


# where a tensor's name goes on from its layer's to its part
_PART = re.compile(r"\.(?=(lora_|hada_|lokr_|[ab][12m]\.|alpha|dora_|weight$|on_input|oft_|rescale|diff|[wb]_norm))")


def _split(tensor: str) -> tuple[str | None, str]:
    layer, _, part = _PART.split(tensor, maxsplit=1)
    return layer_key(layer), part


def _metadata(path: Path) -> dict[str, str] | None:
    with safe_open(str(path), framework="pt") as opened:
        return opened.metadata()


def layer_parts(path: Path) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by layer key and part: read with safetensors, not with the reader."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        key, part = _split(name)
        layers.setdefault(key, {})[part] = tensor
    return layers


def write(file: File, pipe, folder: Path, dtype: str) -> Written:
    """Writes a file for the miniature `pipe`, which is left as it was."""
    writers = {"lycoris": _by_lycoris, "kohya-oft": _by_lycoris, "peft": _by_peft, "diffusers": _by_peft}
    return writers[file.by](file, pipe, folder, DTYPES[dtype])


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], dtype: torch.dtype, size: float) -> None:
    """Random values that the dtype holds exactly."""
    generator = torch.Generator().manual_seed(0)
    for name, p in parameters.items():
        noise = torch.randn(p.shape, generator=generator)
        near = any(part in name for part in ("dora_scale", "lora_magnitude_vector", "rescale"))
        p.copy_((p * (1 + size * noise) if near else noise * size).to(dtype))


def _by_lycoris(file: File, pipe, folder: Path, dtype: torch.dtype) -> Written:
    from lycoris.kohya import LycorisNetworkKohya

    options = dict(file.options)
    # without the class that holds the time layers, which LyCORIS also names one by one
    found = LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE
    LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE = [
        "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D",
    ]  # fmt: skip
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    try:
        network = LycorisNetworkKohya(encoders, pipe.unet, network_module=options.pop("algo"), **options)
    finally:
        LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE = found
    before = {lora: _state(lora.org_module[0]) for lora in network.loras}
    network.apply_to(encoders, pipe.unet, True, True)
    deltas, vectors, weights = {}, {}, {}
    try:
        for lora in network.loras:
            own, (weight, bias) = dict(lora.named_parameters()), before[lora]
            _fill(own, dtype, file.size)
            if type(lora).__name__ == "FullModule":  # its parameters are the changed weights themselves
                lora.weight.data.add_(weight)
                if bias is not None:
                    lora.bias.data.add_(bias)
        path = folder / f"{file.name}.safetensors"
        network.save_weights(str(path), dtype, {"ss_base_model_version": "sdxl_base_v1-0"})
        for lora in network.loras:
            key, (weight, bias) = layer_key(lora.lora_name), before[lora]
            with torch.no_grad():
                after, bias_after = _merged(lora, weight)
            added = None if bias_after is None else bias_after - bias
            if type(lora).__name__ == "NormModule":
                vectors[key] = (after - weight, added)
                continue
            deltas[key], weights[key] = after.detach().reshape(weight.shape) - weight, float(weight.norm())
            if added is not None:
                vectors[key] = (None, added.detach())
    finally:
        for lora in network.loras:
            lora.restore()
    if file.by == "kohya-oft":  # kohya's own OFT of SDXL calls its layers so
        tensors = {name.replace("lora_", "oft_", 1): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    return Written(path, deltas, vectors, weights)


def _merged(lora, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's weight and bias as LyCORIS trains them."""
    if not hasattr(lora, "get_weight"):
        return lora.get_merged_weight(1.0)
    # not get_merged_weight, which has alpha / rank twice where the forward pass of the training has it once
    after = weight + lora.get_weight(None).reshape(weight.shape)
    return (lora.apply_weight_decompose(after) if lora.wd else after), None


def _state(module) -> tuple[Tensor, Tensor | None]:
    bias = getattr(module, "bias", None)
    return module.weight.detach().clone(), None if bias is None else bias.detach().clone()


def _by_peft(file: File, pipe, folder: Path, dtype: torch.dtype) -> Written:
    """peft: its own save_pretrained of a UNet's adapter; diffusers: save_lora_weights of the whole pipeline's."""
    import peft

    options = dict(file.options)
    config = getattr(peft, options.pop("config"))
    if config is not peft.LoraConfig:
        options["init_weights"] = False
    parts = ("unet",) if file.by == "peft" else ("unet", "text_encoder", "text_encoder_2")
    deltas, vectors, weights, states, settings = {}, {}, {}, {}, {}
    for part in parts:
        root = getattr(pipe, part)
        model = peft.get_peft_model(root, config(**{"target_modules": UNET if part == "unet" else TEXT, **options}))
        try:
            mine = {
                name: p for name, p in model.named_parameters() if any(m in name for m in ("lora_", "hada_", "lokr_"))
            }
            _fill(mine, dtype, file.size)
            if file.by == "peft":
                model.save_pretrained(folder)
                path = folder / "adapter_model.safetensors"
                save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path, {"format": "pt"})
            else:
                state = peft.get_peft_model_state_dict(model)
                states[part] = {
                    n.removeprefix("base_model.model."): t.detach().clone().to(dtype) for n, t in state.items()
                }
                settings[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
            for name, module in model.base_model.model.named_modules():
                if not hasattr(module, "base_layer"):
                    continue
                key, base = layer_key(f"{part}.{name}"), module.base_layer
                weight, bias = _state(base)
                module.merge()
                deltas[key], weights[key] = base.weight.detach() - weight, float(weight.norm())
                if options.get("lora_bias") and bias is not None:
                    vectors[key] = (None, base.bias.detach() - bias)
                base.weight.data.copy_(weight)
                if bias is not None:
                    base.bias.data.copy_(bias)
                module.merged_adapters.clear()
        finally:
            model.unload()
    if file.by == "diffusers":
        layers = [states[part] for part in parts]
        pipe.save_lora_weights(folder, *layers, **settings)
        path = folder / "pytorch_lora_weights.safetensors"
    return Written(path, deltas, vectors, weights)
