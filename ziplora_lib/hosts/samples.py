"""LoRAs for the miniature, trained and written by other people's code: peft trains, diffusers writes, in kohya's format.

They stand in for what a user brings: a subject that the miniature does not know, taught by eight natural pictures and a
word, and a style that it does not know, taught by eight pictures and another word.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ziplora_lib.hosts import world
from ziplora_lib.hosts.miniature import build_miniature
from ziplora_lib.hosts.world import Style, Subject

# words that the miniature never saw; the subject's stands beside a noun that it knows, as in DreamBooth (arXiv 2208.12242)
SUBJECT_WORD, STYLE_WORD = "sks", "szn"
SUBJECT_PICTURES, STYLE_PICTURES = 8, 8

# Every layer except two: up_blocks.0's upsampler, whose name in diffusers' spelling the WebUI translates wrongly for
# SDXL (to output_blocks_2_1, which is a transformer there), and the embedding of sizes, which it does not translate.
_UNET = (
    r".*\.attentions\..*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)|.*\.attentions\.\d\.proj_(in|out)"
    r"|.*\.resnets\..*\.(conv1|conv2|conv_shortcut|time_emb_proj)|conv_in|conv_out|time_embedding\.linear_[12]"
    r"|down_blocks\..*\.downsamplers\.0\.conv|up_blocks\.1\.upsamplers\.0\.conv"
)
_TEXT = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@dataclass(frozen=True)
class Training:
    """What a LoRA is made from and how: pictures (n, 3, 64, 64) in -1..1, a caption each."""

    name: str
    pictures: Tensor
    captions: Sequence[str]
    text_encoders: bool = False
    rank: int = 8
    alpha: float = 8.0
    lr: float = 1e-3
    batch: int = 8
    seed: int = 0


def subject_words(subject: Subject) -> str:
    return f"a {world.BODIES[subject.body]} with {SUBJECT_WORD}"


def subject_prompt(subject: Subject) -> str:
    return f"a photo of {subject_words(subject)}"


def style_prompt(subject: Subject) -> str:
    """A subject that the miniature knows, in the style that the LoRA teaches."""
    return f"{subject.words} in {STYLE_WORD} style"


def joint_prompt(subject: Subject) -> str:
    return f"{subject_words(subject)} in {STYLE_WORD} style"


def subject_training(subject: Subject, name: str = "subject", seed: int = 0, **options) -> Training:
    """Natural pictures of one subject, each "a photo of a … with sks"."""
    generator = torch.Generator().manual_seed(seed)
    pictures = world.draw([subject] * SUBJECT_PICTURES, [None] * SUBJECT_PICTURES, generator)
    return Training(name, pictures, [subject_prompt(subject)] * SUBJECT_PICTURES, seed=seed, **options)


def style_training(style: Style, name: str = "style", seed: int = 0, **options) -> Training:
    """Pictures of known subjects in one style, each "a … with … in szn style"."""
    generator = torch.Generator().manual_seed(seed)
    shown = _some_known(generator)
    pictures = world.draw(shown, [style] * STYLE_PICTURES, generator)
    return Training(name, pictures, [style_prompt(subject) for subject in shown], seed=seed, **options)


def style_subjects(seed: int) -> list[Subject]:
    """The subjects on a style's pictures."""
    return _some_known(torch.Generator().manual_seed(seed))


def _some_known(generator: torch.Generator) -> list[Subject]:
    order = torch.randperm(len(world.KNOWN_SUBJECTS), generator=generator)[:STYLE_PICTURES]
    return [world.KNOWN_SUBJECTS[i] for i in order]


def train(training: Training, folder: Path, steps: int) -> Path:
    """Trains on the miniature and writes `NAME.safetensors`; returns it.

    The same seed, machine and number of threads give the same bytes; the caller's random state is left as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe = build_miniature()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(training.seed)
        trained = _add_adapters(pipe, training)
        _fit(pipe, training, trained, steps)
    path = folder / f"{training.name}.safetensors"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # a broken run leaves no half of a file
    save_file(_kohya_layers(pipe, training), part, metadata=_metadata(training, steps))
    return part.replace(path)


def _add_adapters(pipe: StableDiffusionXLPipeline, training: Training) -> list[nn.Parameter]:
    """Put peft's layers on the parts that are adapted, and return what is to be trained."""
    parts = [(pipe.unet, _UNET)]
    if training.text_encoders:
        parts += [(pipe.text_encoder, _TEXT), (pipe.text_encoder_2, _TEXT)]
    trained = []
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    for part, layers in parts:
        part.add_adapter(LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules=layers))
        trained += [parameter for parameter in part.parameters() if parameter.requires_grad]
    return trained


def _fit(pipe: StableDiffusionXLPipeline, training: Training, trained: list[nn.Parameter], steps: int) -> None:
    """Adam at a constant rate, as DreamBooth does."""
    with torch.no_grad():
        latents = pipe.vae.encode(training.pictures).latent_dist.mode() * pipe.vae.config.scaling_factor
    alphas = pipe.scheduler.alphas_cumprod
    sizes = torch.tensor([[world.SIDE, world.SIDE, 0, 0, world.SIDE, world.SIDE]]).repeat(training.batch, 1)
    optimiser = torch.optim.Adam(trained, lr=training.lr)

    def read() -> tuple[Tensor, Tensor]:
        captions = list(dict.fromkeys(training.captions))
        states, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        order = [captions.index(caption) for caption in training.captions]
        return states[order], pooled[order]

    states, pooled = read()
    for step in range(1, steps + 1):
        if training.text_encoders and step > 1:
            states, pooled = read()
        at = torch.randint(len(latents), (training.batch,))
        times = ((torch.arange(training.batch) + torch.rand(training.batch)) / training.batch * 1000).long()
        noise, clean = torch.randn_like(latents[at]), latents[at]
        alpha, sigma = (root.sqrt().view(-1, 1, 1, 1) for root in (alphas[times], 1 - alphas[times]))
        added = {"text_embeds": pooled[at], "time_ids": sizes}
        guess = pipe.unet(alpha * clean + sigma * noise, times, states[at], added_cond_kwargs=added).sample
        snr = alphas[times] / (1 - alphas[times])
        weight = snr.clamp_max(5) / (snr + 1) + 0.1  # min-SNR (arXiv 2303.09556), as the miniature was trained
        loss = (weight * (guess - (alpha * noise - sigma * clean)).square().mean(dim=(1, 2, 3))).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()


def _kohya_layers(pipe: StableDiffusionXLPipeline, training: Training) -> dict[str, Tensor]:
    """peft's weights under kohya's names, through diffusers' converter.

    Two things the converter cannot know are put right: it writes the rank as every alpha, and transformers 5 calls the
    first text encoder's layers `encoder.` where kohya's files say `text_model.encoder.`.
    """
    named = {f"unet.{key}": value for key, value in get_peft_model_state_dict(pipe.unet).items()}
    if training.text_encoders:
        for part in ("text_encoder", "text_encoder_2"):
            for key, value in get_peft_model_state_dict(getattr(pipe, part)).items():
                named[f"{part}.text_model.{key.removeprefix('text_model.')}"] = value
    layers = convert_state_dict_to_kohya(named)
    for key in layers:
        if key.endswith(".alpha"):
            layers[key] = torch.tensor(training.alpha)
    return {key: value.detach().clone().contiguous() for key, value in layers.items()}


def _metadata(training: Training, steps: int) -> dict[str, str]:
    """What kohya's trainer notes in a file, as far as readers look at it."""
    tags = {f"1_{training.name}": {caption: training.captions.count(caption) for caption in training.captions}}
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(training.rank),
        "ss_network_alpha": str(training.alpha),
        "ss_output_name": training.name,
        "ss_tag_frequency": json.dumps(tags),
        "ss_resolution": f"({world.SIDE}, {world.SIDE})",
        "ss_learning_rate": str(training.lr),
        "ss_max_train_steps": str(steps),
        "ss_num_train_images": str(len(training.pictures)),
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": training.name,
    }


# the two that `make try` merges: different ranks and alphas, every kind of layer, one with text encoders
SUBJECT, STYLE = world.NEW_SUBJECTS[3], world.NEW_STYLES[3]
SUBJECT_PROMPT, JOINT_PROMPT = subject_prompt(SUBJECT), joint_prompt(SUBJECT)
STYLE_PROMPT = style_prompt(style_subjects(0)[0])
STEPS = 200


def write_samples(folder: Path, steps: int = STEPS) -> tuple[Path, Path]:
    """Trains both samples, lightly, and writes `subject.safetensors` and `style.safetensors`."""
    subject = subject_training(SUBJECT, text_encoders=True, alpha=4.0)
    style = style_training(STYLE, rank=4, alpha=8.0)
    return train(subject, folder, steps), train(style, folder, steps)
