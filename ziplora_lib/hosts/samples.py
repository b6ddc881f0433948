"""Two sample LoRAs for the miniature, trained and written by other people's code: peft trains, diffusers writes.

They stand in for what a user brings: an overtrained subject and an overtrained style, of different rank and alpha, in
kohya's format. Both adapt every kind of UNet layer, 3x3 and 1x1 convolutions among them; the subject adapts both text
encoders too. Their pictures come with scikit-image.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from skimage import data
from skimage.transform import resize
from torch import nn

from ziplora_lib.hosts.miniature import build_miniature

SUBJECT_PROMPT = "a photo of sks cat"
STYLE_PROMPT = "a house in szn style"
PIXELS = 256
STEPS = 100

# Every layer except two: up_blocks.0's upsampler, whose name in diffusers' spelling the WebUI translates wrongly for
# SDXL (to output_blocks_2_1, which is a transformer there), and the embedding of sizes, which it does not translate.
_UNET = (
    r".*\.attentions\..*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)|.*\.attentions\.\d\.proj_(in|out)"
    r"|.*\.resnets\..*\.(conv1|conv2|conv_shortcut|time_emb_proj)|conv_in|conv_out|time_embedding\.linear_[12]"
    r"|down_blocks\..*\.downsamplers\.0\.conv|up_blocks\.1\.upsamplers\.0\.conv"
)
_TEXT = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@dataclass(frozen=True)
class Sample:
    """What one sample LoRA is made from: `picture` names one of scikit-image's photographs."""

    name: str
    picture: str
    prompt: str
    rank: int
    alpha: float
    text_encoders: bool
    lr: float


SUBJECT = Sample("subject", "chelsea", SUBJECT_PROMPT, 8, 4.0, True, 1.4e-2)
STYLE = Sample("style", "retina", STYLE_PROMPT, 4, 8.0, False, 5e-3)


def load_picture(name: str) -> torch.Tensor:
    """The middle square of a photograph that ships inside scikit-image: (1, 3, 256, 256) in -1..1."""
    photo = getattr(data, name)()
    side = min(photo.shape[:2])
    top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
    small = resize(photo[top : top + side, left : left + side], (PIXELS, PIXELS), anti_aliasing=True)
    return torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1))).float()[None] * 2 - 1


def _add_adapters(pipe: StableDiffusionXLPipeline, sample: Sample) -> list[nn.Parameter]:
    """Put peft's layers on the parts that the sample adapts, and return what is to be trained."""
    parts = [(pipe.unet, _UNET)]
    if sample.text_encoders:
        parts += [(pipe.text_encoder, _TEXT), (pipe.text_encoder_2, _TEXT)]
    trained = []
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    for part, layers in parts:
        part.add_adapter(LoraConfig(r=sample.rank, lora_alpha=sample.alpha, target_modules=layers))
        trained += [parameter for parameter in part.parameters() if parameter.requires_grad]
    return trained


def _train(pipe: StableDiffusionXLPipeline, sample: Sample, steps: int, batch: int) -> None:
    """Fit the adapters to one picture, as DreamBooth does, at a rate that overfits it in few steps.

    The noisiest times weigh up to 10 times more: there a picture's layout is decided, by differences that are small
    beside the noise.
    """
    trained = _add_adapters(pipe, sample)
    noiser = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        latents = pipe.vae.encode(load_picture(sample.picture)).latent_dist.mean * pipe.vae.config.scaling_factor
    latents = latents.repeat(batch, 1, 1, 1)
    sizes = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]]).repeat(batch, 1)
    optimizer = torch.optim.AdamW(trained, lr=sample.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sample.lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (batch,))
        states, _, pooled, _ = pipe.encode_prompt(sample.prompt, device="cpu", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled.repeat(batch, 1), "time_ids": sizes}
        noisy = noiser.add_noise(latents, noise, times)
        guess = pipe.unet(noisy, times, states.repeat(batch, 1, 1), added_cond_kwargs=added).sample
        clear = noiser.alphas_cumprod[times]
        weight = ((1 - clear) / clear).clamp(1.0, 10.0)
        loss = (weight * (guess - noise).square().mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def _kohya_layers(pipe: StableDiffusionXLPipeline, sample: Sample) -> dict[str, torch.Tensor]:
    """peft's weights under kohya's names, through diffusers' converter.

    Two things the converter cannot know are put right: it writes the rank as every alpha, and transformers 5 calls the
    first text encoder's layers `encoder.` where kohya's files say `text_model.encoder.`.
    """
    named = {f"unet.{key}": value for key, value in get_peft_model_state_dict(pipe.unet).items()}
    if sample.text_encoders:
        for part in ("text_encoder", "text_encoder_2"):
            for key, value in get_peft_model_state_dict(getattr(pipe, part)).items():
                named[f"{part}.text_model.{key.removeprefix('text_model.')}"] = value
    layers = convert_state_dict_to_kohya(named)
    for key in layers:
        if key.endswith(".alpha"):
            layers[key] = torch.tensor(sample.alpha)
    return {key: value.detach().contiguous() for key, value in layers.items()}


def _metadata(sample: Sample, steps: int) -> dict[str, str]:
    """What kohya's trainer notes in a file, as far as readers look at it."""
    words = {f"1_{sample.name}": {sample.prompt: 1}}
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(sample.rank),
        "ss_network_alpha": str(sample.alpha),
        "ss_output_name": sample.name,
        "ss_tag_frequency": json.dumps(words),
        "ss_resolution": f"({PIXELS}, {PIXELS})",
        "ss_learning_rate": str(sample.lr),
        "ss_max_train_steps": str(steps),
        "ss_num_train_images": "1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": sample.name,
    }


def write_samples(folder: Path, seed: int = 0, steps: int = STEPS, batch: int = 2) -> tuple[Path, Path]:
    """Train both samples on `build_miniature(seed)` and write `subject.safetensors` and `style.safetensors`.

    The same seed, machine and number of threads give the same bytes; the caller's random state is left as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for sample in (SUBJECT, STYLE):
        pipe = build_miniature(seed)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            _train(pipe, sample, steps, batch)
        path = folder / f"{sample.name}.safetensors"
        save_file(_kohya_layers(pipe, sample), path, metadata=_metadata(sample, steps))
        written.append(path)
    return written[0], written[1]
