"""Writes our embedded miniature SDXL as a checkpoint a real WebUI loads: `X.safetensors` and `X.yaml`.

The WebUI runs SDXL on sgm, which names the same layers differently. The names below were written
from the two module trees; `test_host.py` beside this file compares the forwards of every part.

One thing is not quite the same on both sides, because it cannot be: in the WebUI the second text encoder
tokenises with open_clip's own 49408 tokens. The words of the miniature's world are one token there too, and keep
their rows; all others are random.

Run as a script: `python tests/webui/sgm_miniature.py FOLDER WEBUI`.
"""

import gzip
import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run as a script, outside pytest

from ziplora_lib.hosts.miniature import build_miniature, vocabulary

NAME = "ziplora-miniature"
OPEN_CLIP_ARCH = "ziplora-miniature-text"  # what the yaml and the JSON file beside it call te2
OPEN_CLIP_VOCABULARY = 49408


# --- UNet -------------------------------------------------------------------------------------------

UNET_STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_key(key: str, layers_per_block: int, levels_with_attention: set[int], levels: int) -> str:
    """The sgm name of one diffusers UNet tensor."""
    module, _, kind = key.rpartition(".")
    if module in UNET_STEM:
        return f"{UNET_STEM[module]}.{kind}"
    parts = key.split(".")
    if parts[0] == "mid_block":
        # resnet, transformer, resnet stand in one row there
        place, rest = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(parts[1:3])], parts[3:]
        return f"middle_block.{place}." + _unet_inner(parts[1], rest)
    level, part, index, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
    place = 1 if part == "attentions" else 0
    if parts[0] == "down_blocks":
        first = 1 + level * (layers_per_block + 1)  # block 0 is conv_in, each level ends in its downsampler
        if part == "downsamplers":
            return f"input_blocks.{first + layers_per_block}.0.op.{rest[-1]}"
        return f"input_blocks.{first + index}.{place}." + _unet_inner(part, rest)
    if parts[0] == "up_blocks":
        first = level * (layers_per_block + 1)
        if part == "upsamplers":
            # it shares the last block of its level, behind the transformer where there is one
            place = 2 if (levels - 1 - level) in levels_with_attention else 1
            return f"output_blocks.{first + layers_per_block}.{place}.conv.{rest[-1]}"
        return f"output_blocks.{first + index}.{place}." + _unet_inner(part, rest)
    raise KeyError(f"no sgm name known for {key}")


def _unet_inner(part: str, rest: list[str]) -> str:
    if part == "attentions":
        return ".".join(rest)  # both sides took these names from the same code
    return ".".join([UNET_RESNET[rest[0]], *rest[1:]])


def convert_unet(unet) -> dict[str, torch.Tensor]:
    config = unet.config
    attention = {i for i, kind in enumerate(config.down_block_types) if "CrossAttn" in kind}
    return {
        "model.diffusion_model." + unet_key(k, config.layers_per_block, attention, len(config.block_out_channels)): v
        for k, v in unet.state_dict().items()
    }


# --- VAE --------------------------------------------------------------------------------------------

VAE_RULES = [
    (r"\bdown_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"\bdown_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"\bup_blocks\.(\d+)\.resnets\.(\d+)\.", r"up.\1.block.\2."),
    (r"\bup_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"\bmid_block\.resnets\.0\.", "mid.block_1."),
    (r"\bmid_block\.resnets\.1\.", "mid.block_2."),
    (r"\bmid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"\bmid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"\bmid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"\bconv_norm_out\.", "norm_out."),
    (r"\bconv_shortcut\.", "nin_shortcut."),
]


def vae_channels(vae) -> tuple[int, list[int]]:
    """sgm's `ch` and `ch_mult` for a VAE's levels."""
    levels = list(vae.config.block_out_channels)
    narrow = math.gcd(*levels)
    return narrow, [width // narrow for width in levels]


def convert_vae(vae) -> dict[str, torch.Tensor]:
    last = len(vae.config.block_out_channels) - 1
    converted = {}
    for key, value in vae.state_dict().items():
        # sgm counts the decoder's levels from the image side, diffusers from the latent side
        name = re.sub(r"\bup_blocks\.(\d+)\.", lambda m: f"up_blocks.{last - int(m[1])}.", key)
        for pattern, new in VAE_RULES:
            name = re.sub(pattern, new, name)
        if ".attn_1." in name and name.endswith(".weight") and value.ndim == 2:
            value = value[:, :, None, None]  # a 1x1 convolution there
        converted["first_stage_model." + name] = value
    ch, multiples = vae_channels(vae)
    if multiples[0] != 1:
        _narrow_encoder_entry(converted, "first_stage_model.encoder.", ch)
    return converted


def _narrow_encoder_entry(state: dict[str, torch.Tensor], prefix: str, ch: int) -> None:
    """sgm's encoder enters with `ch` channels and widens in its first block; diffusers enters at the first level's width.

    Exact as long as the channels that fall away carry nothing and the first block adds nothing; both are checked.
    """
    entry, block = prefix + "conv_in.", prefix + "down.0.block.0."
    width = state[entry + "weight"].shape[0]
    silent = [state[entry + "weight"][ch:], state[entry + "bias"][ch:], state[block + "conv2.weight"]]
    if any(part.any() for part in silent):
        raise ValueError(f"this VAE's encoder uses all {width} channels of its entry; sgm's has only {ch}")
    for key in (entry + "weight", entry + "bias", block + "norm1.weight", block + "norm1.bias"):
        state[key] = state[key][:ch]
    state[block + "conv1.weight"] = state[block + "conv1.weight"][:, :ch]
    state[block + "nin_shortcut.weight"] = torch.eye(width, ch)[:, :, None, None]
    state[block + "nin_shortcut.bias"] = torch.zeros(width)


# --- text encoders ----------------------------------------------------------------------------------


def text_state(encoder) -> dict[str, torch.Tensor]:
    """The encoder's tensors without `text_model.`, which newer transformers leave out for one of the two classes."""
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    return {k: v for k, v in state.items() if not k.endswith("position_ids")}


def convert_te1(encoder) -> dict[str, torch.Tensor]:
    return {f"conditioner.embedders.0.transformer.text_model.{k}": v for k, v in text_state(encoder).items()}


TE2_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_tokens(webui: Path) -> dict[str, int]:
    """The vocabulary of a WebUI's open_clip, token -> id, from the merges that it ships."""
    (merges,) = webui.glob("venv/lib/python*/site-packages/open_clip/bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(merges.read_bytes()).decode().split("\n")[1 : OPEN_CLIP_VOCABULARY - 512 - 2 + 1]
    letters = list(vocabulary()[0])[:256]  # CLIP's own order of the 256 byte characters
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    return {word: at for at, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def convert_te2(encoder, tokenizer, webui: Path | None, seed: int = 0) -> dict[str, torch.Tensor]:
    state = text_state(encoder)
    table = state["embeddings.token_embedding.weight"]
    generator = torch.Generator().manual_seed(seed)
    # as loud as the table it stands in for, or the prompts would weigh differently on the two sides
    tokens = torch.randn(OPEN_CLIP_VOCABULARY, table.shape[1], generator=generator) * table.std()
    known = open_clip_tokens(webui) if webui else {}
    for token, at in tokenizer.get_vocab().items():
        if token in known:
            tokens[known[token]] = table[at]
    out = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": tokens,
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6052),  # unused, but the WebUI would log it as missing
    }
    for i in range(encoder.config.num_hidden_layers):
        source, target = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            fused = [state[f"{source}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{target}attn.in_proj_{kind}"] = torch.cat(fused)
            for old, new in TE2_LAYER.items():
                out[f"{target}{new}.{kind}"] = state[f"{source}{old}.{kind}"]
    return {"conditioner.embedders.1.model." + k: v for k, v in out.items()}


def write_te1_folder(folder: Path, encoder, tokenizer) -> None:
    """A folder that transformers 4.30, the WebUI's own, opens as CLIP's config and slow tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    c = encoder.config
    config = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "projection_dim": c.projection_dim,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "hidden_act": c.hidden_act,
        "layer_norm_eps": c.layer_norm_eps,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", tokenizer.get_vocab())
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special},
    )


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


# --- the two configs --------------------------------------------------------------------------------


def open_clip_config(encoder) -> dict:
    c = encoder.config
    if c.intermediate_size != 4 * c.hidden_size:
        raise ValueError("open_clip's text tower always has an MLP four times as wide as its stream")
    return {
        "embed_dim": c.projection_dim,
        "quick_gelu": c.hidden_act == "quick_gelu",
        # built and thrown away again by sgm
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16},
        "text_cfg": {
            "context_length": c.max_position_embeddings,
            "vocab_size": OPEN_CLIP_VOCABULARY,
            "width": c.hidden_size,
            "heads": c.num_attention_heads,
            "layers": c.num_hidden_layers,
        },
    }


def multiples(channels: list[int]) -> list[int]:
    if any(c % channels[0] for c in channels):
        raise ValueError(f"sgm builds every level as a whole multiple of the first; {channels} is none")
    return [c // channels[0] for c in channels]


def sgm_config(folder: Path, unet, vae, te1, te2) -> dict:
    u, v = unet.config, vae.config
    channels = list(u.block_out_channels)
    attention = [i for i, kind in enumerate(u.down_block_types) if "CrossAttn" in kind]
    depth = u.transformer_layers_per_block
    depth = [depth] * len(channels) if isinstance(depth, int) else list(depth)
    heads = u.attention_head_dim  # diffusers' name for the number of heads
    heads = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    width = {c // h for c, h in zip(channels, heads, strict=True)}
    if len(width) != 1:
        raise ValueError(f"sgm has one head width for all levels, not {sorted(width)}")
    size = u.addition_time_embed_dim
    ch, ch_mult = vae_channels(vae)

    def time_embedder(key: str) -> dict:
        target = "sgm.modules.encoders.modules.ConcatTimestepEmbedderND"
        return {"is_trainable": False, "input_key": key, "target": target, "params": {"outdim": size}}

    text_embedders = [
        {
            "is_trainable": False,
            "input_key": "txt",
            "target": "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {
                "version": str(folder / "te1"),
                "layer": "hidden",
                "layer_idx": te1.config.num_hidden_layers - 1,  # what enters the last layer: the penultimate
            },
        },
        {
            "is_trainable": False,
            "input_key": "txt",
            "target": "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2",
            "params": {
                "arch": OPEN_CLIP_ARCH,
                "version": "",
                "freeze": True,
                "layer": "penultimate",
                "always_return_pooled": True,
                "legacy": False,
            },
        },
    ]
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": "sgm.modules.diffusionmodules.denoiser_weighting.VWeighting"},
        "scaling_config": {"target": "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"},
        "discretization_config": {"target": "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"},
    }
    network = {
        "adm_in_channels": u.projection_class_embeddings_input_dim,
        "num_classes": "sequential",
        "use_checkpoint": False,
        "in_channels": u.in_channels,
        "out_channels": u.out_channels,
        "model_channels": channels[0],
        "attention_resolutions": [2**i for i in reversed(attention)],
        "num_res_blocks": u.layers_per_block,
        "channel_mult": multiples(channels),
        "num_head_channels": width.pop(),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": u.use_linear_projection,
        "transformer_depth": depth,
        "context_dim": u.cross_attention_dim,
        "spatial_transformer_attn_type": "softmax-xformers",
        "legacy": False,
    }
    first_stage = {
        "embed_dim": v.latent_channels,
        "monitor": "val/rec_loss",
        "ddconfig": {
            "attn_type": "vanilla-xformers",
            "double_z": True,
            "z_channels": v.latent_channels,
            "resolution": 256,
            "in_channels": v.in_channels,
            "out_ch": v.out_channels,
            "ch": ch,
            "ch_mult": ch_mult,
            "num_res_blocks": v.layers_per_block,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return {
        "model": {
            "target": "sgm.models.diffusion.DiffusionEngine",
            "params": {
                "scale_factor": v.scaling_factor,
                "disable_first_stage_autocast": True,
                "denoiser_config": {
                    "target": "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser",
                    "params": denoiser,
                },
                # sgm calls whatever stands here before it builds the text encoders, and the WebUI never uses
                # the result (None): so the checkpoint makes its own te2 known to open_clip and needs no extension
                "sampler_config": {
                    "target": "open_clip.add_model_config",
                    "params": {"path": str(folder / f"{OPEN_CLIP_ARCH}.json")},
                },
                "network_config": {
                    "target": "sgm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": network,
                },
                "conditioner_config": {
                    "target": "sgm.modules.GeneralConditioner",
                    "params": {
                        "emb_models": [
                            *text_embedders,
                            time_embedder("original_size_as_tuple"),
                            time_embedder("crop_coords_top_left"),
                            time_embedder("target_size_as_tuple"),
                        ]
                    },
                },
                "first_stage_config": {
                    "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                    "params": first_stage,
                },
            },
        }
    }


# --- all of it --------------------------------------------------------------------------------------


def write_sgm_miniature(folder: Path, webui: Path | None) -> Path:
    """Write checkpoint, yaml and what the yaml points at into `folder`; returns the checkpoint.

    webui: where the tokens' numbers are looked up; without, every word is a random one to the second encoder.
    """
    folder = Path(folder).resolve()  # the yaml holds absolute paths: the WebUI's own folder is another
    folder.mkdir(parents=True, exist_ok=True)
    mini = build_miniature()
    unet, vae, te1, te2 = mini.unet, mini.vae, mini.text_encoder, mini.text_encoder_2
    write_te1_folder(folder / "te1", te1, mini.tokenizer)
    write_json(folder / f"{OPEN_CLIP_ARCH}.json", open_clip_config(te2))
    # the WebUI reads X.yaml with a yaml parser, and JSON is yaml
    write_json(folder / f"{NAME}.yaml", sgm_config(folder, unet, vae, te1, te2))
    state = {**convert_unet(unet), **convert_vae(vae), **convert_te1(te1), **convert_te2(te2, mini.tokenizer_2, webui)}
    path = folder / f"{NAME}.safetensors"
    save_file({k: v.detach().float().contiguous().clone() for k, v in state.items()}, path)
    return path


if __name__ == "__main__":
    print(write_sgm_miniature(*map(Path, sys.argv[1:3])))
