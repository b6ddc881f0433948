"""A fuzzer of all that reads LoRA files: seeded inputs, what must hold of each, and long runs in processes of their own.

    python -m tests.fuzz --count 100000 --seed 0 --json benchmarks/results/fuzz.json

An input is its seed and number. Each is either refused in one line (BadInput), or read right; nothing else may happen, nor
may it take long or much memory. `--only N` runs one input in this process.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file

from ziplora_lib import history, inspection
from ziplora_lib.errors import BadInput, out_of_memory
from ziplora_lib.lora import bake, metadata, reader
from ziplora_lib.merge import pairing

# what one input may take: seconds of the processor's time, and on the clock, which other programs can stretch; bytes beyond
# what the process has and so many times its files' size
SECONDS, WAIT, BYTES, TIMES = 5, 30, 2 << 30, 64
# characters of a refusal
LONGEST = 1000
# inputs of one process
BATCH = 250

# --- inputs that are right, and what they mean ---------------------------------------------------------------------

_TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
# layer key -> (the weight's shape, its names)
LAYERS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        (6, 8),
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    ),
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (
        (12, 6),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "base_model.model.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj",
    ),
    "lora_unet_output_blocks_3_0_in_layers_2": (
        (4, 6, 3, 3),
        "lora_unet_up_blocks_1_resnets_0_conv1",
        "unet.up_blocks.1.resnets.0.conv1",
        "base_model.model.up_blocks.1.resnets.0.conv1",
        "diffusion_model.output_blocks.3.0.in_layers.2",
    ),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
        (6, 6),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        f"text_encoder.{_TEXT}",
        f"text_encoder.{_TEXT}",
        f"text_encoders.clip_l.transformer.{_TEXT}",
    ),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (
        (10, 10),
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        f"text_encoder_2.{_TEXT}",
        f"text_encoder_2.{_TEXT}",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    ),
}
NORM = "lora_unet_input_blocks_4_1_norm"
FORMATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2,
         "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8, "F8_E8M0": 1}  # fmt: skip


@dataclass
class Tensor:
    """A tensor as a header has it; shape may be any JSON."""

    dtype: str
    shape: object
    data: bytes


@dataclass
class Input:
    """A file, what stands beside it, and what is known of it.

    raw: the file's bytes, where they are not simply those of its tensors; special: what stands in the file's place; beside:
    name -> bytes, or what of `_SPECIAL` stands there; deltas: ΔW by layer key where the file is right, else None; dense: the
    layers that the host works out; halves: ΔW of each parent of a merge; done: what was done to it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    name: str = "lora.safetensors"
    raw: bytes | None = None
    special: str = ""
    beside: dict[str, bytes | str] = field(default_factory=dict)
    deltas: dict[str, np.ndarray] | None = None
    dense: set[str] = field(default_factory=set)
    halves: list[dict[str, np.ndarray]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> bytes:
        return written(self.tensors, self.metadata) if self.raw is None else self.raw


def written(tensors: dict[str, Tensor], told: dict) -> bytes:
    """A safetensors file, by hand: the writer of the library would refuse what is wrong."""
    header, body, at = {}, [], 0
    if told:
        header["__metadata__"] = told
    for name, tensor in tensors.items():
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + len(tensor.data)]}
        header[name] = entry
        at += len(tensor.data)
        body.append(tensor.data)
    return framed(json.dumps(header).encode(), b"".join(body))


def framed(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def split_bytes(raw: bytes) -> tuple[bytes, bytes]:
    """A file's header and body."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def tensor(values: np.ndarray, dtype: str) -> Tensor:
    """Values in a format; BF16 by cutting off the lower half of an F32."""
    if dtype == "BF16":
        data = (_cast(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = _cast(values, FORMATS[dtype]).tobytes()
    return Tensor(dtype, list(values.shape), data)


def _cast(values: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)


def values_of(stored: Tensor) -> np.ndarray:
    """What a tensor holds, in fp64."""
    if stored.dtype == "BF16":
        bits = np.frombuffer(stored.data, "<u2").astype("<u4") << 16
        return _cast(bits.view("<f4"), float).reshape(stored.shape)
    return _cast(np.frombuffer(stored.data, FORMATS[stored.dtype]), float).reshape(stored.shape)


class _Maker:
    """Tensors with random values, of one file."""

    def __init__(self, rng: random.Random, dtype: str):
        self.rng, self.dtype = rng, dtype
        self.numbers = np.random.default_rng(rng.getrandbits(32))

    def tensor(self, *shape: int) -> tuple[Tensor, np.ndarray]:
        made = tensor(self.numbers.standard_normal(shape) * self.rng.choice((0.01, 0.3, 1.0)), self.dtype)
        return made, values_of(made)

    def alpha(self) -> tuple[Tensor, float]:
        made = tensor(np.array(self.rng.choice((0.5, 1.0, 2.0, 3.0, 8.0))), self.rng.choice((self.dtype, "F32")))
        made.shape = self.rng.choice(([], [1]))
        return made, float(values_of(made).reshape(()))


def _lora(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], np.ndarray]:
    rank = make.rng.choice((1, 2, 3, 4, 9))
    kernel = shape[2:]
    up, b = make.tensor(shape[0], rank, *[1] * len(kernel))
    if kernel and make.rng.random() < 0.4:
        down, a = make.tensor(rank, shape[1], 1, 1)
        mid, core = make.tensor(rank, rank, *kernel)
        parts = {"lora_mid.weight": mid}
        delta = np.einsum("or,rskl,si->oikl", b.reshape(b.shape[:2]), core, a.reshape(a.shape[:2]))
    else:
        down, a = make.tensor(rank, *shape[1:])
        parts = {}
        delta = (b.reshape(shape[0], rank) @ a.reshape(rank, -1)).reshape(shape)
    return _scaled(make, {"lora_up.weight": up, "lora_down.weight": down, **parts}, delta, rank)


def _scaled(make: _Maker, parts: dict, delta: np.ndarray, rank: int) -> tuple[dict[str, Tensor], np.ndarray]:
    if make.rng.random() < 0.6:
        parts["alpha"], alpha = make.alpha()
        delta = delta * (alpha / rank)
    return parts, delta


def _loha(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], np.ndarray]:
    rank, parts, delta = make.rng.choice((1, 2, 5)), {}, 1.0
    tucker = len(shape) > 2 and make.rng.random() < 0.5
    for n in (1, 2):
        if tucker:
            parts[f"hada_t{n}"], t = make.tensor(rank, rank, *shape[2:])
            parts[f"hada_w{n}_a"], a = make.tensor(rank, shape[0])
            parts[f"hada_w{n}_b"], b = make.tensor(rank, shape[1])
            delta = delta * np.einsum("ijkl,jr,ip->prkl", t, b, a)
        else:
            parts[f"hada_w{n}_a"], a = make.tensor(shape[0], rank)
            parts[f"hada_w{n}_b"], b = make.tensor(rank, math.prod(shape[1:]))
            delta = delta * (a @ b)
    return _scaled(make, parts, delta, rank)


def _lokr(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], np.ndarray]:
    (out, columns), parts, rank = shape[:2], {}, 0
    first = (make.rng.choice([n for n in (1, 2, 3) if out % n == 0]), make.rng.choice((1, 2)))
    second = (out // first[0], columns // first[1], *shape[2:])
    halves = []
    for n, own in ((1, first), (2, second)):
        if make.rng.random() < 0.5:
            parts[f"lokr_w{n}"], whole = make.tensor(*own)
        else:
            rank = make.rng.choice((1, 2))
            parts[f"lokr_w{n}_a"], a = make.tensor(own[0], rank)
            parts[f"lokr_w{n}_b"], b = make.tensor(rank, math.prod(own[1:]))
            whole = (a @ b).reshape(own)
        halves.append(whole)
    first_flat, second_flat = halves[0], halves[1].reshape(second[0], second[1], -1)
    delta = np.einsum("ai,bjk->abijk", first_flat, second_flat).reshape(out, columns, *shape[2:])
    return _scaled(make, parts, delta, rank) if rank else (parts, delta)


def _full(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:
    return {"diff": make.tensor(*shape)[0]}, None


def _dora(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:
    parts, _ = make.rng.choice((_lora, _loha, _lokr))(make, shape)
    return {**parts, "dora_scale": make.tensor(shape[0], 1)[0]}, None


def _glora(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:
    out, columns, rank = shape[0], math.prod(shape[1:]), 2
    shapes = {"a1": (columns, rank), "a2": (rank, columns), "b1": (out, rank), "b2": (rank, columns)}
    return {f"{name}.weight": make.tensor(*own)[0] for name, own in shapes.items()}, None


def _ia3(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:
    return {"weight": make.tensor(shape[0], 1)[0], "on_input": Tensor("BOOL", [], b"\0")}, None


def _oft(make: _Maker, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:
    return {"oft_blocks": make.tensor(2, shape[0] // 2, shape[0] // 2)[0]}, None


_KINDS = (_lora, _lora, _lora, _loha, _lokr, _full, _dora, _glora, _ia3, _oft)
# how else the parts of a LoRA end
_FACTORS = (
    {},
    {},
    {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"},
    {"lora_up.weight": "lora.up.weight", "lora_down.weight": "lora.down.weight"},
    {"lora_up.weight": "lora_linear_layer.up.weight", "lora_down.weight": "lora_linear_layer.down.weight"},
)


def right(rng: random.Random) -> Input:
    """A file that must be read."""
    made = Input(deltas={}, done=["right"])
    make = _Maker(rng, rng.choice(("F16", "BF16", "F32", "F32", "F64")))
    names, factors = rng.randrange(5), rng.choice(_FACTORS)
    for key in rng.sample(sorted(LAYERS), rng.randint(1, 4)):
        shape, *spelled = LAYERS[key]
        kind = rng.choice(_KINDS)
        parts, delta = kind(make, shape)
        layer = [key, *spelled][names]
        made.tensors |= {f"{layer}.{factors.get(part, part)}": stored for part, stored in parts.items()}
        if delta is None or kind is _lokr:
            made.dense.add(key)  # a LoKr may be whole or not
        if delta is not None:
            made.deltas[key] = delta
    if rng.random() < 0.2:
        made.tensors |= {f"{NORM}.w_norm": make.tensor(8)[0], f"{NORM}.b_norm": make.tensor(8)[0]}
    if rng.random() < 0.1:
        made.tensors |= {"bundle_emb.word.clip_l": make.tensor(2, 8)[0], "bundle_emb.word.clip_g": make.tensor(2, 8)[0]}
    if rng.random() < 0.5:
        made.metadata = _training()
    if rng.random() < 0.3:
        made.beside["lora.json"] = json.dumps(_card()).encode()
    return made


def _training() -> dict[str, str]:
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 12, "grass": 3}}),
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.prediction_type": "epsilon",
        "ss_resolution": "(1024, 1024)",
        "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    }


def _card() -> dict:
    return {"activation text": "sks dog", "preferred weight": 0.8, "notes": "a dog", "sd version": "SDXL"}


def merged(rng: random.Random) -> Input:
    """A file as ZipLoRA merges it, which must be read, baked and split."""
    made, n = Input(deltas={}, done=["merged"]), rng.choice((2, 2, 2, 3))
    make = _Maker(rng, rng.choice(("F16", "BF16", "F32")))
    made.halves, table = [{} for _ in range(n)], {}
    keys = rng.sample(sorted(LAYERS), rng.randint(1, 4))
    for i, key in enumerate(keys):
        shape = LAYERS[key][0]
        ranks = [rng.choice((0, 1, 2, 3)) for _ in range(n)] if i else [rng.choice((1, 2)) for _ in range(n)]
        ranks = ranks if any(ranks) else [1] * n
        total, alpha = sum(ranks), rng.choice((1.0, 2.0, 8.0))
        up, b = make.tensor(shape[0], total, *[1] * len(shape[2:]))
        down, a = make.tensor(total, *shape[1:])
        made.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        made.tensors[f"{key}.alpha"] = tensor(np.array(alpha), "F32")
        b, a, start = b.reshape(shape[0], total) * alpha / total, a.reshape(total, -1), 0
        for half, rank in zip(made.halves, ranks):
            if rank:
                half[key] = (b[:, start : start + rank] @ a[start : start + rank]).reshape(shape)
            start += rank
        made.deltas[key] = (b @ a).reshape(shape)
        table[key] = ranks
    roles = ["subject", *["style"] * (n - 1)]
    recipe = {
        "parents": [{"lora": f"l{i}", "role": role, "prompt": "a dog", "strength": 1.0, "reference": 0}
                    for i, role in enumerate(roles)],
        "output": "lora", "method": "ziplora", "steps": 50, "seed": 0, "resolution": 1024, "layer_names": "kohya",
    }  # fmt: skip
    parents = [{"name": f"l{i}", "role": role, "sha256": f"{i}" * 64, "trigger": "x"} for i, role in enumerate(roles)]
    learned = {"mean": [0.9] * n, "error": [0.1] * n, "error_plain_sum": [0.2] * n}
    told = {"parents": parents, "recipe": recipe, "ranks": {"*": table[keys[0]], **table}, "coefficients": learned}
    if rng.random() < 0.3:
        told["strengths"] = [1.0] * n
    made.metadata = {**_training(), "ziplora.version": "1.0"} | {f"ziplora.{k}": json.dumps(v) for k, v in told.items()}
    return made


# --- what is done to them ------------------------------------------------------------------------------------------

_DEEP = (50, 500, 950, 990, 3000, 100_000)
WORDS = (
    "", " ", ".", "..", "\x00", "a\nb", "\r\n", "\x1b[31mred\x1b[0m", "\u202egpj.exe", "\u2028", "\ud800", "\udc80x",
    "../../etc/passwd", "C:\\con", "/dev/zero", "<script>alert(1)</script>", "a" * 5000, "ü" * 60, "🐶", "%s%n", "{0}",
    "alpha", "weight", "lora_unet_", "lora_te_", "lora_te2_", "unet.", "base_model.model.", "text_encoder.", "bundle_emb.",
    "bundle_emb.x", "bundle_emb..", "lora_unet_input_blocks_99999999999999999999_1_x", "lora_unet_input_blocks_٣_1_x",
    f"lora_unet_down_blocks_{'9' * 5000}_attentions_0_x", "lora_unet_mid_block_attentions_7_", "lora_unet_out_3_",
    f"lora_unet_up_blocks_{'1' * 4400}_upsamplers_0_conv", f"lora_unet_input_blocks_{'7' * 4400}_0_op",
    "lora_unet_input_blocks_1_1_x", "lora_te1_text_projection", "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "unet.down_blocks.-1.attentions.0.to_q", "lora_unet_down_blocks_0_resnets_0_conv1", "first_stage_model.decoder",
    "model.diffusion_model.out.2", "transformer.single_transformer_blocks.0.attn.to_q", "__metadata__",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "lora_te2_transformer_resblocks_0_attn_in_proj",
)  # fmt: skip
ENDINGS = (*reader.PARTS, ".oft_R.weight", ".vera_lambda_b", ".set_weight", ".lokr_t1", ".bias_size", ".alpha.alpha", "alpha",
           ".lora_up", ".lora_up.weight.", ".weight.weight", ".lora_A.default_0.weight", ".ziplora_up.x", "")  # fmt: skip
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-42, 1e-30, 1e12, 1e19, 1e30, 3e38, 1e300, -1.0, 65504.0)
TOKENS = (
    "-1", "0", "-0", "1.5", "true", "null", '""', '"8"', "[]", "{}", "1" + "0" * 400, "1e999", "NaN", "Infinity", "1e400",
    "18446744073709551615", "18446744073709551616", "9223372036854775807", "9007199254740993", "4294967296", "[0]",
    '"\\ud800"', '"\\u0000"', '"F4"', '"F6_E2M3"', '"f32"', "[[1]]", "[1,2,3,4,5,6,7,8,9]", "'", "\xff", "[" * 5000,
    "[" * 200 + "]" * 200,
)  # fmt: skip
FIELDS = (
    "ss_base_model_version", "ss_tag_frequency", "modelspec.trigger_phrase", "modelspec.prediction_type", "ss_v2",
    "ss_sd_model_name", "ss_resolution", "ss_epoch", "ss_network_module", "lora_adapter_metadata", "sshs_model_hash",
    "ziplora.recipe", "ziplora.parents", "ziplora.ranks", "ziplora.coefficients", "ziplora.strengths", "ziplora.split_from",
    "ziplora.version", "ziplora.", "ziplora.x\x1b[2J", "format",
)  # fmt: skip


def _leaf(rng: random.Random) -> object:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(WORDS)
    if kind == 1:
        return rng.choice((*NUMBERS, 10**30, -(10**30), 10**400, 2**63, 2**31, 1, 2, 7))
    if kind == 2:
        return rng.choice((None, True, False, [], {}, [[]], {"": None}, [1, 2], ["a", None]))
    return (
        {"parents": [], "subject": "x", "": {}} if kind == 3 else rng.choice(("subject", "style", "1", "nan", "1e999"))
    )


def _changed(rng: random.Random, value: object, depth: int = 0) -> object:
    """The same JSON but for one place in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        act = rng.random()
        if act < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if act < 0.25:
            return {**value, rng.choice(WORDS): _leaf(rng)}
        return {**value, key: _changed(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i, act = rng.randrange(len(value)), rng.random()
        if act < 0.2:
            return value[:i] + value[i + 1 :]
        if act < 0.3:
            return value * rng.choice((2, 5, 300))
        return [*value[:i], _changed(rng, value[i], depth + 1), *value[i + 1 :]]
    return _leaf(rng)


def _json_text(rng: random.Random, usual: str) -> str:
    """JSON text that is nearly what it should be, or nothing like it."""
    act = rng.random()
    if act < 0.1:
        n = rng.choice(_DEEP)
        return rng.choice(("[", '{"a":', '{"parents":[')) * n + rng.choice(("", "]" * n, "1" + "}" * n))
    if act < 0.2:
        return rng.choice((*WORDS, *TOKENS, "[" * 100, usual[: len(usual) // 2], "x" * 200_000))
    try:  # not what depends on how deep Python goes
        value = json.loads(usual) if usual.count("[") + usual.count("{") < 200 else usual
    except ValueError:
        value = usual
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = _changed(rng, value)
    return json.dumps(value)


def _pick(rng: random.Random, made: Input) -> str:
    return rng.choice(sorted(made.tensors))


def _drop(rng: random.Random, made: Input) -> None:
    del made.tensors[_pick(rng, made)]


def _rename(rng: random.Random, made: Input) -> None:
    name = _pick(rng, made)
    layer, dot, part = name.partition(".")
    act = rng.randrange(5)
    new = (
        rng.choice(WORDS),
        rng.choice(WORDS) + dot + part,
        layer + rng.choice(ENDINGS),
        name[: rng.randrange(len(name) + 1)] + rng.choice(WORDS) + name[rng.randrange(len(name) + 1) :],
        name.swapcase() if rng.random() < 0.3 else rng.choice(WORDS) + rng.choice(ENDINGS),
    )[act]
    made.tensors[new] = made.tensors.pop(name)


def _rename_layer(rng: random.Random, made: Input) -> None:
    """All the parts of one layer, so that it stays whole."""
    layer = _pick(rng, made).partition(".")[0]
    new = rng.choice((*WORDS, *(name for _, *names in LAYERS.values() for name in names)))
    made.tensors = {
        (new + name[len(layer) :] if name.partition(".")[0] == layer else name): stored
        for name, stored in made.tensors.items()
    }


def _reshape(rng: random.Random, made: Input) -> None:
    stored = made.tensors[_pick(rng, made)]
    n = len(stored.data) // SIZES.get(stored.dtype, 1)
    divisor = rng.choice([d for d in range(1, n + 1) if n % d == 0] or [1])
    stored.shape = rng.choice(([n], [1, n], [n, 1], [divisor, n // divisor], [divisor, n // divisor, 1, 1],
                               [1, 1, 1, n], [1, n, 1], [n, 1, 1, 1, 1], [divisor, 1, n // divisor, 1]))  # fmt: skip


def _resize(rng: random.Random, made: Input) -> None:
    name = _pick(rng, made)
    shape = [rng.choice((0, 1, 2, 3, 6, 8, 9, 64, 100)) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 4, 5)))]
    n = min(math.prod(shape), 4096)
    shape = shape if math.prod(shape) == n else [n]
    made.tensors[name] = tensor(np.ones(shape), rng.choice(("F16", "F32", "BF16")))


def _poison(rng: random.Random, made: Input) -> None:
    name = _pick(rng, made)
    stored = made.tensors[name]
    if stored.dtype not in (*FORMATS, "BF16"):
        return
    values = values_of(stored).copy()
    if values.size and rng.random() < 0.6:
        values.flat[rng.randrange(values.size)] = rng.choice(NUMBERS)
    else:
        values[...] = rng.choice(NUMBERS)
    made.tensors[name] = tensor(values, rng.choice((stored.dtype, "F64", "F32")))


def _scale_all(rng: random.Random, made: Input) -> None:
    """Every value of a file much larger or smaller."""
    factor = rng.choice((1e-40, 1e-30, 1e-12, 1e6, 1e12, 1e18, 1e25, 1e30, 1e37))
    for name, stored in made.tensors.items():
        if stored.dtype in ("F32", "F64", "BF16") and not name.endswith("alpha"):
            with np.errstate(over="ignore"):
                made.tensors[name] = tensor(values_of(stored) * factor, rng.choice(("F32", "F64")))


def _retype(rng: random.Random, made: Input) -> None:
    stored = made.tensors[_pick(rng, made)]
    size = SIZES.get(stored.dtype, 1)
    stored.dtype = rng.choice([dtype for dtype, own in SIZES.items() if own == size] + ["F4", "X", ""])


def _retype_whole(rng: random.Random, made: Input) -> None:
    """Another format, with as many values."""
    stored = made.tensors[_pick(rng, made)]
    n = len(stored.data) // SIZES.get(stored.dtype, 1)
    stored.dtype = rng.choice(sorted(SIZES))
    stored.data = rng.randbytes(n * SIZES[stored.dtype])


def _alpha(rng: random.Random, made: Input) -> None:
    layer = _pick(rng, made).partition(".lora")[0].partition(".hada")[0].partition(".lokr")[0]
    part = rng.choice(("alpha", "alpha", "alpha", "scale", "dora_scale", "on_input"))
    value = np.full(rng.choice(((), (1,), (1, 1), (2,), (0,), (3, 3))), rng.choice(NUMBERS))
    if rng.random() < 0.2:
        n = value.size
        made.tensors[f"{layer}.{part}"] = Tensor("I64", list(value.shape), rng.randbytes(8 * n))
    else:
        made.tensors[f"{layer}.{part}"] = tensor(value, rng.choice(("F16", "F32", "F64", "BF16")))


def _stray(rng: random.Random, made: Input) -> None:
    layer = rng.choice((rng.choice(WORDS), *LAYERS, *(name for _, *names in LAYERS.values() for name in names)))
    shape = rng.choice(((), (1,), (6,), (6, 8), (2, 2), (8, 6, 1, 1), (3, 0), (1, 1, 1)))
    made.tensors[layer + rng.choice(ENDINGS)] = tensor(np.ones(shape), rng.choice(("F32", "F16")))


def _twice(rng: random.Random, made: Input) -> None:
    """A tensor once more, under another spelling of its layer."""
    name = _pick(rng, made)
    for key, (_, *names) in LAYERS.items():
        for spelled in (key, *names):
            if name.startswith(spelled):
                made.tensors[rng.choice((key, *names)) + name[len(spelled) :]] = made.tensors[name]
                return


def _absurd(rng: random.Random, made: Input) -> None:
    """A layer whose parts are small, but not what they ask for."""
    layer, n = rng.choice(sorted(LAYERS)), rng.choice((200, 1000, 3000))
    one, core = ((n, 1), (1, n)), (1, 1, rng.choice((30, 60)), 60)
    shapes = rng.choice((
        {"hada_w1_a": one[0], "hada_w1_b": one[1], "hada_w2_a": one[0], "hada_w2_b": one[1]},
        {"hada_w1_a": (3, n), "hada_w1_b": (n, 3), "hada_w2_a": (3, n), "hada_w2_b": (n, 3)},
        {"lokr_w1": one[0], "lokr_w2": one[1]},
        {"lokr_w1": one[0], "lokr_w2": one[0]},
        {"lokr_w1": (40, 40), "lokr_w2": (60, 59)},
        {"lokr_w1_a": one[0], "lokr_w1_b": one[1], "lokr_w2_a": (n, 2), "lokr_w2_b": (2, n)},
        {"lokr_w1": (2, 2), "lokr_w2_a": one[0], "lokr_w2_b": (1, 2), "lokr_t2": core},
        {"lora_up.weight": (8, 1, 1, 1), "lora_mid.weight": core, "lora_down.weight": (1, n, 1, 1)},
        {f"hada_{part}": shape for k in "12" for part, shape in ((f"t{k}", core), (f"w{k}_a", (1, 8)), (f"w{k}_b", (1, n)))},
        {"lora_up.weight": one[0], "lora_down.weight": one[1]},
        {"ziplora_up": one[0], "ziplora_down": one[1]},
        {"oft_blocks": (2, 2, 40, 40)},
    ))  # fmt: skip
    made.tensors |= {f"{layer}.{part}": tensor(np.ones(shape), "F16") for part, shape in shapes.items()}


def _embedding(rng: random.Random, made: Input) -> None:
    name = rng.choice(("bundle_emb.w.clip_l", "bundle_emb.w", "bundle_emb.", "bundle_emb..clip_g", "bundle_emb.\n.x",
                       f"bundle_emb.{rng.choice(WORDS)}.clip_l"))  # fmt: skip
    dtype = rng.choice(sorted(SIZES))
    shape = rng.choice(([1, 4], [4], [], [0, 4], [1, 1, 4]))
    made.tensors[name] = Tensor(dtype, shape, rng.randbytes(SIZES[dtype] * math.prod(shape)))


def _own_parts(rng: random.Random, made: Input) -> None:
    """What only a merge's file has, with shapes that may not fit."""
    layer, rows = rng.choice((*LAYERS, NORM)), rng.choice((1, 2, 2, 3))
    shapes = {"diff": (6, 8), "diff_b": (6,), "ziplora_bias": (rows, rng.choice((6, 6, 7))), "ziplora_up": (6, 2),
              "ziplora_down": (2, 8), "ziplora_weight": (rows, 6), "w_norm": (6,),
              "b_norm": (rng.choice((6, 7)),)}  # fmt: skip
    chosen = rng.sample(sorted(shapes), rng.randint(1, 5))
    made.tensors |= {f"{layer}.{part}": tensor(np.full(shapes[part], 0.5), "F32") for part in chosen}


def _width(rng: random.Random, made: Input) -> None:
    """Cross-attention of a base model, or of none."""
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    width = rng.choice((768, 1024, 2048, 100))
    made.tensors |= {f"{key}.lora_up.weight": tensor(np.ones((4, 1)), "F16"),
                     f"{key}.lora_down.weight": tensor(np.ones((1, width)), "F16")}  # fmt: skip


def _tell(rng: random.Random, made: Input) -> None:
    name = rng.choice((*FIELDS, *(sorted(made.metadata) * 2), rng.choice(WORDS)))
    made.metadata[name] = _json_text(rng, str(made.metadata.get(name, '{"unet.lora_alpha": 4, "unet.r": 2}')))


def _tell_lies(rng: random.Random, made: Input) -> None:
    """ziplora.* of a file that is none of ours, or that lies."""
    own = merged(rng).metadata
    made.metadata |= {name: own[name] for name in rng.sample(sorted(own), rng.randint(1, len(own)))}
    if rng.random() < 0.4:
        made.metadata["ziplora.ranks"] = rng.choice(
            ('{"*": [1, 1]}', '{"*": [0, 0]}', '{"*": [-1, 5]}', '{"*": [1e999, 1]}', '{"*": []}', '{"*": [1, 999999999]}',
             '{"*": "12"}', '{"*": [true, 1]}', '{"*": [1.5, 1.5]}', '{}', '[]', '{"*": {"a": 1, "b": 2}}',
             '{"*": [2, 2, 2]}')
        )  # fmt: skip


def _tell_types(rng: random.Random, made: Input) -> None:
    made.metadata[rng.choice(FIELDS)] = _leaf(rng)


def _tell_peft(rng: random.Random, made: Input) -> None:
    settings = {"lora_alpha": 4, "r": 2, "use_rslora": False, "alpha_pattern": {"to_q": 3}, "rank_pattern": {".*to_q": 2},
                "unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {"to_q": 3}}  # fmt: skip
    text = _json_text(rng, json.dumps(settings))
    if rng.random() < 0.5:
        made.metadata["lora_adapter_metadata"] = text
    else:
        made.name = "adapter_model.safetensors"
        made.beside["adapter_config.json"] = rng.choice((text.encode("utf-8", "surrogatepass"), *_SPECIAL_BESIDE))


def _card_beside(rng: random.Random, made: Input) -> None:
    text = _json_text(rng, json.dumps(rng.choice((_card(), {"recipe": {"parents": []}})))).encode(
        "utf-8", "surrogatepass"
    )
    content = rng.choice((text, text, b"\xff\xfe\x00", b"", *_SPECIAL_BESIDE))
    made.beside[Path(made.name).stem + ".json"] = content


def _file_name(rng: random.Random, made: Input) -> None:
    stem = rng.choice(
        ("a\nb", "\x1b[31mred", "\udcff", "x" * 230, " ", "a" * 300, "\u202ex", "<b>", "..", "-", "nul\0x", "ü.json")
    )
    made.name = stem + rng.choice((".safetensors", ".safetensors", ".SafeTensors", ".pt", ".safetensors.ckpt", ""))


def _header_token(rng: random.Random, made: Input) -> None:
    """A value in the header's JSON replaced by another."""
    header, body = split_bytes(made.bytes)
    text = header.decode("latin-1")
    marks = [i for mark in ('"shape": ', '"dtype": ', '"data_offsets": ', "[", ", ") for i in _places(text, mark)]
    if not marks:
        return
    at = rng.choice(marks)
    end = next((i for i in range(at, len(text)) if text[i] in ",]}"), len(text))
    text = text[:at] + rng.choice(TOKENS) + text[end:]
    made.raw = framed(text.encode("latin-1"), body)


def _places(text: str, mark: str) -> Iterator[int]:
    at = text.find(mark)
    while at >= 0:
        yield at + len(mark)
        at = text.find(mark, at + 1)


def _header_entries(rng: random.Random, made: Input) -> None:
    """Offsets that lie, entries that stand twice, fields that do not belong."""
    header, body = split_bytes(made.bytes)
    try:
        entries = list(json.loads(header).items())
    except (ValueError, RecursionError, AttributeError):
        return
    if not entries:
        return
    i = rng.randrange(len(entries))
    name, entry = entries[i]
    act = rng.randrange(6)
    if act == 0:
        entries.append((name, entry))
    elif act == 1 and isinstance(entry, dict):
        entries[i] = (
            name,
            {**entry, "data_offsets": rng.choice(([0, 0], [0, 10**9], [4, 0], [-4, 4], [0, 2**63], [1, 2]))},
        )
    elif act == 2 and isinstance(entry, dict):
        entries[i] = (name, {**entry, "shape": rng.choice(([0, 2**62, 8], [2**32, 2**32], [2**64, 0], [0], [-1, -8], [1] * 70,
                                                           [0] * 3, [2**31], []))})  # fmt: skip
    elif act == 3:
        entries[i] = (name, _changed(rng, entry))
    elif act == 4:
        other = rng.choice(entries)
        entries.append((rng.choice(WORDS), other[1]))
    else:
        rng.shuffle(entries)
    text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries) + "}"
    made.raw = framed(text.encode(), body)


def _bytes(rng: random.Random, made: Input) -> None:
    """The file cut, lengthened, its length wrong, bytes of it changed."""
    raw, act = made.bytes, rng.randrange(7)
    if act == 0:
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif act == 1:
        raw += rng.randbytes(rng.choice((1, 8, 1000)))
    elif act == 2:
        raw = struct.pack("<Q", rng.choice((0, 1, 2, len(raw), len(raw) - 8, 10**8, 2**31, 2**63, 2**64 - 1))) + raw[8:]
    elif act in (3, 4) and raw:
        changed = bytearray(raw)
        for _ in range(rng.choice((1, 2, 20))):
            end = len(changed) if act == 3 else min(len(changed), 600)
            changed[rng.randrange(end)] = rng.randrange(256)
        raw = bytes(changed)
    elif act == 5:
        header, body = split_bytes(raw)
        raw = framed(header + rng.choice((b" " * 3, b"\0" * 4, b"\n", b"}", b"{}")), body)
    else:
        header, body = split_bytes(raw)
        raw = framed(
            rng.choice((b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf" + header, b"{" * 200_000, header[1:])), body
        )
    made.raw = raw


class _Trap:
    """What would leave a mark if it were unpickled."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return (open, (self.mark, "w"))


MARK = "unpickled"
_SPECIAL_BESIDE = ("fifo", "folder", "loop", "closed", "huge")
_SPECIAL = (
    "empty",
    "folder",
    "fifo",
    "loop",
    "dangling",
    "pickle",
    "torch zip",
    "zip",
    "text",
    "closed",
    "missing",
    "device",
)


def _special(rng: random.Random, made: Input) -> None:
    made.special = rng.choice(_SPECIAL)
    if made.special == "pickle" and rng.random() < 0.5:
        made.name = "lora" + rng.choice((".pt", ".ckpt", ".bin"))


_ON_TENSORS = (_drop, _rename, _rename, _rename_layer, _reshape, _resize, _poison, _scale_all, _retype, _retype_whole, _alpha,
               _stray, _twice, _absurd, _embedding, _own_parts, _width)  # fmt: skip
_ON_METADATA = (_tell, _tell, _tell, _tell_lies, _tell_types, _tell_peft, _card_beside, _card_beside)
_ON_BYTES = (_header_token, _header_entries, _header_entries, _bytes)
_ON_FILES = (_file_name, _special)


def made(seed: int, number: int) -> Input:
    """The input of this seed and number, always the same."""
    rng = random.Random(f"{seed}/{number}")
    found = merged(rng) if rng.random() < 0.35 else right(rng)
    changes: list[Callable] = []
    act = rng.random()
    if act > 0.1:
        of = rng.choices((_ON_TENSORS, _ON_METADATA, _ON_BYTES, _ON_FILES), (50, 35, 10, 5))[0]
        changes = [rng.choice(of) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        changes += [rng.choice((*_ON_TENSORS, *_ON_METADATA)) for _ in range(rng.choice((0, 0, 0, 1, 3)))]
        # bytes last, for they end what can be said of tensors
        changes.sort(key=lambda change: (change in _ON_BYTES, change in _ON_FILES))
    for change in changes:
        if found.tensors or change in (*_ON_METADATA, *_ON_FILES):
            change(rng, found)
            found.done.append(change.__name__)
    if changes:
        found.deltas, found.halves = None, []
    return found


def lay(found: Input, folder: Path) -> Path:
    """Puts an input into a folder; returns the path of its file, which may be a name that no file can have."""
    path = folder / found.name
    try:
        _put(path, found.special or found.bytes)
        for name, content in found.beside.items():
            _put(folder / name, content)
    except (OSError, ValueError):  # a name that the system does not take
        pass
    return path


def _put(path: Path, content: bytes | str) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    elif content in ("loop", "dangling"):
        path.symlink_to(path if content == "loop" else path.with_name("nowhere"))
    elif content == "device":
        path.symlink_to("/dev/zero")
    elif content == "closed":
        path.write_bytes(b"{}")
        path.chmod(0)
    elif content == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 34)  # takes no room
    elif content != "missing":
        path.write_bytes(_other_kind(content, path.parent))


def _other_kind(content: str, folder: Path) -> bytes:
    data = io.BytesIO()
    if content == "pickle":
        return pickle.dumps(_Trap(str(folder / MARK)))
    if content == "torch zip":
        torch.save({"lora_up.weight": torch.zeros(2, 2)}, data)
    elif content == "zip":
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps(_Trap(str(folder / MARK))))
    return data.getvalue() if content != "text" else b"<html>404 not found</html>"


# --- what must hold ------------------------------------------------------------------------------------------------


def plain_layers(found: Input) -> dict[str, tuple[np.ndarray, float]]:
    """ΔW of the UNet's plain LoRA layers with an alpha in a file that was changed, and how large its terms can be."""
    deltas = {}
    for key, (_, *names) in LAYERS.items() if found.raw is None else ():
        for name in {key, *names} if "unet" in key else ():
            parts = {n[len(name) + 1 :]: t for n, t in found.tensors.items() if n.startswith(f"{name}.")}
            if parts.keys() != set(_PLAIN) or not all(t.dtype in (*FORMATS, "BF16") for t in parts.values()):
                continue
            up, down, alpha = (values_of(parts[part]) for part in _PLAIN)
            if up.ndim > 1 and down.ndim > 1 and up.shape[1] == len(down) and len(up) * down[0].size < 2**16:
                scale = float(alpha.reshape(-1)[0]) / len(down)
                delta = scale * (up.reshape(up.shape[:2]) @ down.reshape(len(down), -1))
                size = abs(scale) * np.abs(up).max() * np.abs(down).max() * len(down)
                deltas[key] = delta.reshape(len(up), *down.shape[1:]), size
    return deltas


_PLAIN = ("lora_up.weight", "lora_down.weight", "alpha")


class Hang(BaseException):
    """An input took too long."""


@dataclass(frozen=True)
class Fault:
    """kind: exception, refusal, wrong, hang, memory, crash or unpickled; check: where; said: what."""

    kind: str
    check: str
    said: str


def judged(found: Input, folder: Path, number: int = 0) -> tuple[str, list[Fault], Counter]:
    """("read" or "refused", what is wrong, what was looked at) of an input that is laid into an empty folder."""
    judge = _Judge(found, folder, number)
    try:
        judge.all()
    except Hang:
        judge.faults.append(Fault("hang", judge.check, f"more than {SECONDS} s, or {WAIT} s of waiting"))
    return ("refused" if judge.lora is None else "read"), judge.faults, judge.counts


class _Judge:
    def __init__(self, found: Input, folder: Path, number: int):
        self.found, self.folder, self.number = found, folder, number
        self.faults: list[Fault] = []
        self.counts: Counter = Counter()
        self.check, self.lora = "", None

    def fault(self, kind: str, said: str) -> None:
        self.faults.append(Fault(kind, self.check, said))

    def tried(self, check: str, call: Callable):
        """What a call returns; None where it is refused, as it should be, or fails."""
        self.check = check
        self.counts[check] += 1
        try:
            return call()
        except BadInput as error:
            self.counts[f"{check} refused"] += 1
            if wrong := refusal_faults(error):
                self.fault("refusal", f"{wrong}: {str(error)[:300]!a}")
        except Exception as error:
            kind = "memory" if out_of_memory(error) else "exception"
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.fault(
                kind, f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {str(error)[:300]!a}"
            )
        return None

    def all(self) -> None:
        path = lay(self.found, self.folder)
        peeked = self.tried("peek", lambda: reader.peek(path))
        glanced = self.tried("glance", lambda: reader.glance(path))
        dozen = self.tried("dozen", lambda: reader.glance(path, whole=False))
        self.lora = self.tried("read", lambda: reader.read(path))
        if peeked is not None:
            self.tried("told", lambda: (metadata.trigger_words(peeked), metadata.made_by(peeked), bake.origins(peeked)))
        self.tried("recipe", lambda: history.recipe_from(path))
        for name in self.found.beside:
            if name.endswith(".json"):
                self.tried("recipe beside", lambda name=name: history.recipe_from(self.folder / name))
        if self.lora is not None:
            self._agree(peeked, glanced, dozen)
            self._right()
            self._looked_at()
            self._with_another()
            self._made_into(path)
        elif self.found.deltas is not None:
            self.fault("wrong", "a file that is right was refused")
        self.check = "all"
        if (self.folder / MARK).exists():
            self.fault("unpickled", "a pickle was opened")

    def _agree(self, *others) -> None:
        """What is told from headers is what the whole file says."""
        self.check = "agree"
        if None in others:
            self.fault("wrong", "what is read whole was refused by its header")
            return
        glanced = others[1]
        for name in ("layers", "kinds", "ranks", "base"):
            if getattr(glanced, name) != getattr(self.lora, name):
                self.fault("wrong", f"a glance says another {name}: {getattr(glanced, name)!a}"[:300])

    def _right(self) -> None:
        self.check, lora = "delta", self.lora
        for key, delta in lora.deltas.items():
            if not math.isfinite(delta.norm()):
                self.fault("wrong", f"‖ΔW‖ of {key[:80]!a} is {delta.norm()}")
        if self.found.deltas is None:
            for key, (wanted, size) in plain_layers(self.found).items():
                if key in lora.deltas:
                    self._same(lora.deltas[key].dense().double().numpy(), wanted, key, 1e-5 * size)
                elif key not in lora.dense:
                    self.fault("wrong", f"{key} is missing")
            return
        if missing := (self.found.deltas.keys() | self.found.dense) - set(lora.layers):
            self.fault("wrong", f"layers are missing: {sorted(missing)}")
        for key, wanted in self.found.deltas.items():
            if key in lora.deltas:
                self._same(lora.deltas[key].dense().double().numpy(), wanted, key, 1e-4 * np.abs(wanted).max())
            elif key not in self.found.dense:
                self.fault("wrong", f"{key} is left to the host")

    def _same(self, got: np.ndarray, wanted: np.ndarray, key: str, within: float) -> None:
        self.counts["ΔW compared"] += 1
        if got.size != wanted.size or not np.isfinite(got).all():
            self.fault("wrong", f"ΔW of {key}: shape {got.shape} or values")
            return
        error = np.abs(got.reshape(wanted.shape) - wanted).max()
        if not error <= within + 1e-30:
            self.fault("wrong", f"ΔW of {key} is off by {error:.3g} of {np.abs(wanted).max():.3g}")

    def _looked_at(self) -> None:
        view = self.tried("inspect", lambda: {"file": str(self.lora.path), **inspection.inspected(self.lora)})
        if view is not None:
            self._valid("inspect json", [view])
            self._plain("inspect text", lambda: inspection.inspected_text(view))

    def _valid(self, check: str, view: object) -> None:
        text = self.tried(check, lambda: json.dumps(view, indent=2, ensure_ascii=False))
        if text is not None:
            self.tried(check, lambda: json.loads(text, parse_constant=_no_number))

    def _plain(self, check: str, call: Callable[[], str]) -> None:
        text = self.tried(check, call)
        if text is not None and (odd := next((c for c in text if c != "\n" and unprintable(c)), None)):
            self.fault("wrong", f"the text holds {odd!a}")

    def _with_another(self) -> None:
        rng = random.Random(f"other {self.number}")
        other = merged(rng) if rng.random() < 0.3 else right(rng)
        if rng.random() < 0.3:
            rng.choice((_resize, _scale_all, _width, _own_parts, _reshape))(rng, other)
        other.name, other.beside = "other.safetensors", {}
        second = self.tried("read another", lambda: reader.read(lay(other, self.folder)))
        if second is None:
            return
        loras = [self.lora, second]
        view = self.tried("compare", lambda: inspection.compared(loras))
        if view is not None:
            self._valid("compare json", view)
            self._plain("compare text", lambda: inspection.compared_text(view))
        self.tried("pair", lambda: self._paired(loras))

    def _paired(self, loras: Sequence) -> None:
        """What the preflight and the merge make of two LoRAs before any model is there."""
        shapes = pairing.outlines(loras)
        said = pairing.report(loras, [1.0, 0.8], shapes)
        json.loads(json.dumps(said, ensure_ascii=False), parse_constant=_no_number)
        for lora in loras:
            pairing.refuse_unfit(lora, shapes, "model", loras[0].base)
        paired = pairing.pair(loras, [1.0, 0.8], shapes)
        if not all(torch.isfinite(t).all() for stack in paired.stacks.values() for t in (stack.up, stack.down)):
            self.fault("wrong", "stacks that are not finite")

    def _made_into(self, path: Path) -> None:
        rng = random.Random(f"bake {self.number}")
        try:
            n = len(bake.origins(self.lora))
        except BadInput:
            n = 2
            if rng.random() < 0.9:
                return
        weights = [rng.choice((0.0, 1.0, 0.5, -2.0, 1.25)) for _ in range(n)]
        out = self.folder / "baked.safetensors"
        if self.tried("bake", lambda: bake.bake(path, out, weights)):
            self._readable("read baked", out)
            wanted = [(weight, half) for weight, half in zip(weights, self.found.halves)]
            self._saved(out, wanted)
        elif self.found.halves:
            self.fault("wrong", "a merge was not baked")
        if n > 8:
            return
        halves = [self.folder / f"half {i}.safetensors" for i in range(n)]
        if self.tried("split", lambda: bake.split(path, halves)):
            for i, half in enumerate(halves):
                self._readable("read half", half)
                self._saved(half, [(1.0, own) for own in self.found.halves[i : i + 1]])
        elif self.found.halves and all(self.found.halves):
            self.fault("wrong", "a merge was not split")

    def _readable(self, check: str, path: Path) -> None:
        faults = len(self.faults)
        if self.tried(check, lambda: reader.read(path)) is None and len(self.faults) == faults:
            self.fault("wrong", "what was written cannot be read")

    def _saved(self, path: Path, wanted: Sequence[tuple[float, dict[str, np.ndarray]]]) -> None:
        """A written file holds the weighted sum of halves, read with safetensors alone."""
        if not wanted:
            return
        within = {"float16": 2e-3, "bfloat16": 2e-2}.get(self.lora.dtype, 1e-5)
        got = _dense(path)
        for key in {key for _, half in wanted for key in half}:
            parts = [weight * half[key] for weight, half in wanted if key in half]
            largest = max(np.abs(half[key]).max() for _, half in wanted if key in half)
            total = sum(parts)
            if key in got or np.abs(total).max() > 0:
                self._saved_layer(got.get(key), total, key, within * max(largest, np.abs(total).max()))

    def _saved_layer(self, got: np.ndarray | None, wanted: np.ndarray, key: str, within: float) -> None:
        self.counts["ΔW compared"] += 1
        if got is None or not np.abs(got.reshape(wanted.shape) - wanted).max() <= 4 * within:
            self.fault("wrong", f"ΔW of {key} in what was written is another")


def _dense(path: Path) -> dict[str, np.ndarray]:
    tensors, found = load_file(path), {}
    for name in [name for name in tensors if name.endswith(".lora_down.weight")]:
        layer = name.removesuffix(".lora_down.weight")
        up, down = tensors[f"{layer}.lora_up.weight"].double().flatten(1), tensors[name].double()
        alpha = float(tensors[f"{layer}.alpha"]) / len(down)
        found[layer] = (alpha * (up @ down.flatten(1))).reshape(len(up), *down.shape[1:]).numpy()
    return found


def _no_number(token: str) -> None:
    raise AssertionError(f"{token} is no JSON")


def unprintable(letter: str) -> bool:
    """Whether a letter steers a terminal or breaks a line."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or "\u202a" <= letter <= "\u202e"


def refusal_faults(error: BadInput) -> str:
    """What is wrong with a refusal; "" if nothing."""
    text = str(error)
    if len(text) > LONGEST:
        return f"{len(text)} characters"
    if odd := next(filter(unprintable, text), None):
        return f"holds {odd!a}"
    if not error.remedy or error.remedy[:40] not in text:
        return "no remedy"
    return "" if error.file or error.key else "names neither file nor key"


# --- long runs -----------------------------------------------------------------------------------------------------


@contextmanager
def limited(found: Input):
    """No more time and memory than an input may take."""

    def out_of_time(*_):
        raise Hang

    size = len(found.bytes) + sum(len(content) for content in found.beside.values())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES + TIMES * size, before[1]))
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAIT))
    handlers = [signal.signal(name, out_of_time) for name, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (name, timer, _), handler in zip(timers, handlers):
            signal.setitimer(timer, 0)
            signal.signal(name, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def one(seed: int, number: int, room: Path) -> dict:
    """One input in this process: what became of it."""
    found, folder = made(seed, number), room / "input"
    folder.mkdir()
    begun = time.process_time()
    try:
        with limited(found):
            outcome, faults, counts = judged(found, folder, number)
    except Hang:  # between two checks
        outcome, faults, counts = (
            "refused",
            [Fault("hang", "", f"more than {SECONDS} s, or {WAIT} s of waiting")],
            Counter(),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    took = time.process_time() - begun
    said = [{"seed": seed, "number": number, "done": found.done, **vars(fault)} for fault in faults]
    return {"number": number, "outcome": outcome, "faults": said, "counts": counts, "seconds": took}


def _child(seed: int, numbers: range, room: Path, out: int) -> None:
    torch.set_num_threads(1)
    with os.fdopen(out, "w") as pipe:
        for number in numbers:
            print(json.dumps({"begun": number}), file=pipe, flush=True)
            print(json.dumps(one(seed, number, room)), file=pipe, flush=True)


def _batch(seed: int, numbers: range) -> Iterator[dict]:
    """What became of some inputs, in a process of their own; ends with the first that kills or stops it."""
    room = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    back, out = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(back)
            _child(seed, numbers, room, out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(out)
    try:
        yield from _heard(seed, child, back)
    finally:
        os.close(back)
        shutil.rmtree(room, ignore_errors=True)


def _heard(seed: int, child: int, pipe: int) -> Iterator[dict]:
    text, begun, kind = b"", None, "crash"
    while True:
        if not select.select([pipe], [], [], 2 * WAIT)[0]:
            kind = "hang"  # in a library, which the signal does not reach
            os.kill(child, signal.SIGKILL)
            break
        data = os.read(pipe, 1 << 16)
        text += data
        *lines, text = text.split(b"\n")
        for line in map(json.loads, lines):
            begun = line.get("begun")
            if begun is None:
                yield line
        if not data:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if begun is not None:
        fault = {"seed": seed, "number": begun, "kind": kind, "check": "", "said": f"the process ended with {status}"}
        yield {"number": begun, "outcome": "refused", "faults": [fault], "counts": {}, "seconds": 0.0}


def _covered(seed: int, numbers: range) -> list[dict]:
    """What became of some inputs, in as many processes as it takes."""
    lines: list[dict] = []
    while len(lines) < len(numbers):
        more = list(_batch(seed, numbers[len(lines) :]))
        if not more:
            raise RuntimeError("a process ended before its first input")
        lines += more
    return lines


def run(count: int, seed: int = 0, jobs: int = 1, tell: Callable[[str], None] = lambda _: None) -> dict:
    """So many inputs in processes of their own: the counts, and every fault with its seed and number."""
    number, counts, looked, faults, slowest = 0, Counter(), Counter(), [], (0.0, 0)
    torch.einsum("a,b->ab", *torch.empty(2, 2, device="meta"))  # loads what else each process would, for seconds
    begun = time.monotonic()
    batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for line in itertools.chain.from_iterable(pool.imap(partial(_covered, seed), batches)):
            number += 1
            counts["failed" if line["faults"] else line["outcome"]] += 1
            looked.update(line["counts"])
            faults += line["faults"]
            slowest = max(slowest, (line["seconds"], line["number"]))
            for fault in line["faults"]:
                tell(json.dumps(fault, ensure_ascii=True))
            if number % (20 * BATCH) == 0 or number == count:
                tell(f"{number} of {count}: {dict(counts)}, {time.monotonic() - begun:.0f} s")
    return {
        "inputs": number,
        "seed": seed,
        "counts": {name: counts[name] for name in ("read", "refused", "failed")},
        "failed_by_kind": dict(Counter(fault["kind"] for fault in faults).most_common()),
        "checks": dict(sorted(looked.items())),
        "slowest": {"seconds": round(slowest[0], 3), "number": slowest[1]},
        "seconds": round(time.monotonic() - begun),
        "limits": {"seconds": SECONDS, "seconds_waiting": WAIT, "bytes": BYTES, "times_the_size": TIMES},
        "faults": faults[:200],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--only", type=int, metavar="N", help="this input alone, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.only is not None:
        with tempfile.TemporaryDirectory() as room:
            print(json.dumps(one(args.seed, args.only, Path(room)), indent=2))
        return 0
    torch.set_num_threads(1)
    found = run(args.count, args.seed, args.jobs, lambda text: print(text, flush=True))
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {"torch": torch.__version__, "safetensors": safetensors.__version__, "numpy": np.__version__}
    command = "python -m tests.fuzz " + " ".join(sys.argv[1:])
    if args.json:
        report = {"command": command, "machine": machine, "versions": versions, **found}
        args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 1 if found["counts"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
