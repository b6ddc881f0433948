"""The embedded miniatures: a trained small SDXL and an untrained small SD 1.5, without downloads.

Each keeps its original's structure, so that everything which holds for the original's layer names and conditioning holds
here too: the UNet's block types and numbers (`input_blocks.4.1`, `middle_block.1`, `output_blocks.0.1`, ...) and a VAE of
factor 8 with four latent channels. SDXL: two text encoders whose penultimate states are concatenated, pooled text plus
six sizes as the added condition, heads of one width, linear projections in the transformers. SD 1.5: one text encoder of
its true width, 768, by which a LoRA's base is told, eight heads at every width, 1x1 convolutions as projections. All other
widths and depths are small. Every part has an exact twin among sgm's and ldm's classes (32 groups in every norm), so its
weights can be carried into a WebUI.

The SDXL was trained on pictures of 64 pixels of a world drawn by code (`world.py`; `make miniature` trains it again), with
velocity as its prediction; its weights ship beside this file. The SD 1.5 has random weights from a seed, but for that VAE,
and beside its random paths one direct path on which "the noise is what came in".
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ziplora_lib.hosts.autoencoder import laid_by_hand, untrained_vae

WIDTHS = (64, 64, 64)
HEAD_WIDTH = 32
TEXT_WIDTH = 32
TEXT_2_WIDTH = 64
POOLED_WIDTH = 64
SD1_TEXT_WIDTH = 768
SIZE_WIDTH = 32  # sinusoid width of each of the six sizes (sgm: ConcatTimestepEmbedderND.outdim)
POSITIONS = 77
# what build_miniature reads and make miniature writes
WEIGHTS = Path(__file__).with_name("miniature.safetensors")
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")

# Words that are one token each; every other word is spelled letter by letter, so that no two words are encoded alike.
WORDS = (
    "a an the of in on at with and by photo picture painting drawing sketch watercolour watercolor oil ink print "
    "style color colour light dark red green blue yellow white black sks szn zwx person man woman dog cat house tree "
    "car cup chair flower mountain sea sky street garden astronaut horse bird portrait landscape close up background "
    "ohwx ball box cone funnel gem cross ring glass arch ladder moon roof horns bulb hat flag night mint rose sand neon news "
    "framed grounded checked lined barred plaid inked glowing comic poster fresco gothic pastel retro mosaic stencil enamel "
    "vintage arcade folk deco zine"
)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's kind of vocabulary in small: (token -> id, merges in order of rank).

    As in CLIP, the 256 byte characters come first ("!" is 0, SDXL's padding for its second encoder), then the same
    ending a word, then the merges, then start and end of text. The end has the highest id, so both ways of finding the
    pooled state (by id, or by largest id) find it.
    """
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in letters] + [chr(256 + n) for n in range(256 - len(letters))]
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        # A new merge ranks behind all earlier ones, so the words before it stay one token.
        pieces = _merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _merged(pieces: list[str], merges: Iterable[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        at = 0
        while at < len(pieces) - 1:
            if (pieces[at], pieces[at + 1]) == (left, right):
                pieces[at : at + 2] = [left + right]
            at += 1
    return pieces


def _tokenizer(pad_token: str) -> CLIPTokenizer:
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=POSITIONS)


def _text_config(width: int, activation: str, tokenizer: CLIPTokenizer, **other) -> CLIPTextConfig:
    sizes = {"intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": width // 16, **other}
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, projection_dim=POOLED_WIDTH, max_position_embeddings=POSITIONS,
        hidden_act=activation, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip


def _sd1_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    # as wide as the original but shallow: 6 of its 123 million parameters
    few = {"intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 12}
    return _text_config(SD1_TEXT_WIDTH, "quick_gelu", tokenizer, **few)


def _wake_text(encoder: nn.Module) -> nn.Module:
    """Scale CLIP's timid init (embeddings of 0.02) up to states of unit order: (batch, 77, width), and no zero biases.

    The penultimate state, which SDXL uses, has no norm behind it, so its size is that of the embeddings.
    """
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(parameter, std=1.0)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return encoder


def _unet() -> UNet2DConditionModel:
    """SDXL's UNet, narrow: latents (b, 4, h, w), text (b, 77, 96), pooled (b, 64), sizes (b, 6).

    `attention_head_dim` is the number of heads (diffusers' name for it): 32 wide each, as sgm's num_head_channels.
    """
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=WIDTHS, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=tuple(width // HEAD_WIDTH for width in WIDTHS),
        use_linear_projection=True, cross_attention_dim=TEXT_WIDTH + TEXT_2_WIDTH, norm_num_groups=32,
        addition_embed_type="text_time", addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * SIZE_WIDTH,
    )  # fmt: skip


def _sd1_unet() -> UNet2DConditionModel:
    """SD 1.5's UNet at a tenth of its width: latents (b, 4, h, w), text (b, 77, 768).

    `attention_head_dim` is the number of heads here too: eight at every width, as ldm's num_heads.
    """
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 64, 128, 128), layers_per_block=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        attention_head_dim=8, cross_attention_dim=SD1_TEXT_WIDTH, norm_num_groups=32,
    )  # fmt: skip
    _wake_unet(unet)
    _open_direct_path(unet)
    return unet


def _wake_unet(unet: UNet2DConditionModel) -> None:
    """No parameter at zero, and a cross-attention that tells words apart instead of averaging all 77."""
    for name, parameter in unet.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        elif "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.mul_(2.0)


def _open_direct_path(unet: UNet2DConditionModel) -> None:
    """Lay "the noise is what came in" over the random weights: an honest first guess at high noise.

    Of the 32 outermost channels, half are reserved: latent channel i enters as +x in 8i, 8i+1 and as -x in 8i+2, 8i+3,
    rides the outermost skip connection through the last block's shortcut, and is read back after norm and SiLU:
    silu(x) - silu(-x) = x, exactly. With one channel in a group no other channel disturbs it there. The other half
    stays random, read softly. Without such a path no LoRA of small rank could teach a random UNet what its input is.
    """
    ride = torch.kron(torch.eye(4), torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [0.0], [0.0], [0.0], [0.0]]))  # (32, 4)
    reserved = ride.abs().sum(1) > 0
    last = unet.up_blocks[-1].resnets[-1]
    layers = [unet.conv_in, last.conv_shortcut, last.conv2]
    if hasattr(unet.up_blocks[-1], "attentions"):  # SD 1.5 has a transformer behind the last resnet
        layers.append(unet.up_blocks[-1].attentions[-1].proj_out)
    for layer in layers:
        layer.weight[reserved] *= 0.02
        layer.bias[reserved] *= 0.02
    unet.conv_in.weight[:, :, 1, 1] += ride
    last.conv_shortcut.weight[reserved, 32:, 0, 0] += torch.eye(32)[reserved]
    unet.conv_out.weight[:, reserved] *= 0.02
    unet.conv_out.weight[:, ~reserved] *= 0.5
    unet.conv_out.bias.mul_(0.1)
    unet.conv_out.weight[:, :, 1, 1] += ride.T / 2
    unet.conv_norm_out.weight.fill_(1.0).add_(torch.randn(32), alpha=0.02)


def _scheduler(prediction: str) -> EulerDiscreteScheduler:
    """The schedule of SDXL, and of SD 1.5."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction, timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip


def build_miniature() -> StableDiffusionXLPipeline:
    """The trained miniature on the CPU, in fp32 and eval mode. The caller's random state is left as it was."""
    pipe = untrained_miniature()
    load_trained(pipe, WEIGHTS)
    for name in PARTS:
        getattr(pipe, name).eval()
    return pipe


def untrained_miniature(seed: int = 0) -> StableDiffusionXLPipeline:
    """The miniature before its training, in fp32; the same seed gives the same weights to the bit."""
    tokenizer, tokenizer_2 = _tokenizer("<|endoftext|>"), _tokenizer("!")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = {
            "unet": _unet(),
            "text_encoder": _wake_text(CLIPTextModel(_text_config(TEXT_WIDTH, "quick_gelu", tokenizer))),
            "text_encoder_2": _wake_text(CLIPTextModelWithProjection(_text_config(TEXT_2_WIDTH, "gelu", tokenizer_2))),
            "vae": untrained_vae(),
        }
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=_scheduler("v_prediction"),
        add_watermarker=False,
    )


def save_trained(pipe: StableDiffusionXLPipeline, path: Path) -> None:
    """Writes what `build_miniature` reads: all that was trained, in fp16."""
    tensors = {
        f"{name}.{key}": value.half().contiguous()
        for name in PARTS
        for key, value in getattr(pipe, name).state_dict().items()
        if not (name == "vae" and laid_by_hand(key)) and value.is_floating_point()
    }
    save_file(tensors, path)


def load_trained(
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, path: Path, parts: Sequence[str] = PARTS
) -> None:
    """Puts what `save_trained` wrote into these parts, in fp32; the autoencoder's outermost level is laid by hand."""
    tensors = load_file(path)
    for name in parts:
        own = {key.partition(".")[2]: value.float() for key, value in tensors.items() if key.startswith(f"{name}.")}
        missing, unexpected = getattr(pipe, name).load_state_dict(own, strict=False)
        if unexpected or any(name != "vae" or not laid_by_hand(key) for key in missing):
            raise RuntimeError(f"{path.name} does not fit the miniature's {name}: {[*missing, *unexpected][:3]}")


def build_miniature_sd1(seed: int = 0) -> StableDiffusionPipeline:
    """As `build_miniature`, but SD 1.5, and untrained but for the autoencoder: the same seed gives the same weights."""
    tokenizer = _tokenizer("<|endoftext|>")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = {
            "unet": _sd1_unet(),
            "text_encoder": _wake_text(CLIPTextModel(_sd1_text_config(tokenizer))),
            "vae": untrained_vae(),
        }
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=_scheduler("epsilon"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    load_trained(pipe, WEIGHTS, ["vae"])
    for part in parts.values():
        part.eval()
    return pipe


# by the name that the headless host knows them by
MINIATURES = {"miniature": build_miniature, "miniature-sd1": build_miniature_sd1}
