"""Writes our embedded miniature SD 1.5, or one of SD 2.x, as a checkpoint a real WebUI loads: `X.safetensors` and `X.yaml`.

The WebUI runs SD 1.5 and SD 2.x on ldm, whose UNet and VAE are sgm's, so their names are those of `sgm_miniature`.
`test_sd1.py` beside this file compares the forwards.

Run as a script: `python tests/webui/ldm_miniature.py FOLDER`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run as a script, outside pytest

from sgm_miniature import (
    convert_te2,
    convert_unet,
    convert_vae,
    multiples,
    open_clip_config,
    text_state,
    vae_channels,
    write_json,
    write_te1_folder,
)

from ziplora_lib.hosts import miniature

NAME = "ziplora-miniature-sd1"
SD2_NAME = "ziplora-miniature-sd2"
SD2_ARCH = "ziplora-miniature-sd2-text"


def convert_text(encoder) -> dict[str, torch.Tensor]:
    return {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text_state(encoder).items()}


def build_sd2(seed: int = 0):
    """SD 2.x in small: heads of one width, linear projections, open_clip's text encoder. Its tokens are not open_clip's."""
    pipe = miniature.build_miniature_sd1(seed)
    changes = {"cross_attention_dim": miniature.TEXT_2_WIDTH, "use_linear_projection": True}
    text = miniature._text_config(miniature.TEXT_2_WIDTH, "gelu", pipe.tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config, attention_head_dim=(2, 4, 8, 8), **changes).eval()
        miniature._wake_unet(pipe.unet)
        miniature._open_direct_path(pipe.unet)
        pipe.text_encoder = miniature._wake_text(CLIPTextModelWithProjection(text)).eval()
    return pipe


def ldm_config(unet, vae, text: dict, first: dict) -> dict:
    """The checkpoint's yaml. text: its text encoder; first: what is built before that."""
    u, v = unet.config, vae.config
    ch, ch_mult = vae_channels(vae)
    count = u.attention_head_dim  # diffusers' name for the number of heads
    fixed = isinstance(count, int)
    heads = {"num_heads": count} if fixed else {"num_head_channels": u.block_out_channels[0] // count[0]}
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "parameterization": "eps",
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "num_timesteps_cond": 1,
                "timesteps": 1000,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": 64,
                "channels": v.latent_channels,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "scale_factor": v.scaling_factor,
                "use_ema": False,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "image_size": 32,
                        "in_channels": u.in_channels,
                        "out_channels": u.out_channels,
                        "model_channels": u.block_out_channels[0],
                        "attention_resolutions": [
                            2**i for i, kind in enumerate(u.down_block_types) if "CrossAttn" in kind
                        ],
                        "num_res_blocks": u.layers_per_block,
                        "channel_mult": multiples(list(u.block_out_channels)),
                        **heads,
                        "use_spatial_transformer": True,
                        "use_linear_in_transformer": u.use_linear_projection,
                        "transformer_depth": 1,
                        "context_dim": u.cross_attention_dim,
                        "use_checkpoint": False,
                        "legacy": False,
                    },
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": v.latent_channels,
                        "monitor": "val/rec_loss",
                        "ddconfig": {
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
                        "lossconfig": first,
                    },
                },
                "cond_stage_config": text,
            },
        }
    }


def _write(folder: Path, name: str, pipe, text_state: dict[str, torch.Tensor], text: dict, first: dict) -> Path:
    # the WebUI reads X.yaml with a yaml parser, and JSON is yaml
    write_json(folder / f"{name}.yaml", ldm_config(pipe.unet, pipe.vae, text, first))
    state = {**convert_unet(pipe.unet), **convert_vae(pipe.vae), **text_state}
    path = folder / f"{name}.safetensors"
    save_file({k: v.detach().float().contiguous().clone() for k, v in state.items()}, path)
    return path


def write_ldm_miniature(folder: Path, seed: int = 0) -> Path:
    """Write checkpoint, yaml and what the yaml points at into `folder`; returns the checkpoint."""
    folder = Path(folder).resolve()  # the yaml holds absolute paths: the WebUI's own folder is another
    folder.mkdir(parents=True, exist_ok=True)
    mini = miniature.build_miniature_sd1(seed)
    write_te1_folder(folder / "text", mini.text_encoder, mini.tokenizer)
    target = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    text = {"target": target, "params": {"version": str(folder / "text")}}
    return _write(folder, NAME, mini, convert_text(mini.text_encoder), text, {"target": "torch.nn.Identity"})


def write_sd2_miniature(folder: Path, seed: int = 0) -> Path:
    """As `write_ldm_miniature`, but `build_sd2`."""
    folder = Path(folder).resolve()
    mini = build_sd2(seed)
    write_json(folder / f"{SD2_ARCH}.json", open_clip_config(mini.text_encoder))
    text = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"arch": SD2_ARCH, "version": "", "freeze": True, "layer": "penultimate"},
    }
    # the VAE's loss, which the WebUI never uses, is built before the text encoder: it makes that known to open_clip
    first = {"target": "open_clip.add_model_config", "params": {"path": str(folder / f"{SD2_ARCH}.json")}}
    te2 = convert_te2(mini.text_encoder, mini.tokenizer, None, seed)
    state = {k.replace("conditioner.embedders.1.", "cond_stage_model."): v for k, v in te2.items()}
    return _write(folder, SD2_NAME, mini, state, text, first)


if __name__ == "__main__":
    print(write_ldm_miniature(Path(sys.argv[1])))
