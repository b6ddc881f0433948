"""The embedded miniatures: a small SDXL and a small SD 1.5 from code and a seed, without files and without downloads.

Each keeps its original's structure, so that everything which holds for the original's layer names and conditioning holds
here too: the UNet's block types and numbers (`input_blocks.4.1`, `middle_block.1`, `output_blocks.0.1`, ...) and a VAE of
factor 8 with four latent channels. SDXL: two text encoders whose penultimate states are concatenated, pooled text plus
six sizes as the added condition, heads of width 16, linear projections in the transformers. SD 1.5: one text encoder of
its true width, 768, by which a LoRA's base is told, eight heads at every width, 1x1 convolutions as projections. All other
widths and depths are small. Every part has an exact twin among sgm's and ldm's classes (32 groups in every norm), so its
weights can be carried into a WebUI.

What is random: the UNet and the text encoders. What is not: the VAE is a real (linear) autoencoder whose weights are
worked out by hand, and the UNet has, beside its random paths, one direct path on which "the noise is what came in".
"""

from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_WIDTH = 32
TEXT_2_WIDTH = 64
POOLED_WIDTH = 64
SD1_TEXT_WIDTH = 768
SIZE_WIDTH = 32  # sinusoid width of each of the six sizes (sgm: ConcatTimestepEmbedderND.outdim)
POSITIONS = 77
VAE_CHANNELS = (96, 32, 32, 96)
SCALING_FACTOR = 0.13025

# Words that are one token each; every other word is spelled letter by letter, so that no two words are encoded alike.
WORDS = (
    "a an the of in on at with and by photo picture painting drawing sketch watercolour watercolor oil ink print "
    "style color colour light dark red green blue yellow white black sks szn zwx person man woman dog cat house tree "
    "car cup chair flower mountain sea sky street garden astronaut horse bird portrait landscape close up background"
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
    """SDXL's UNet at a tenth of its width: latents (b, 4, h, w), text (b, 77, 96), pooled (b, 64), sizes (b, 6).

    `attention_head_dim` is the number of heads (diffusers' name for it): 16 wide each, as sgm's num_head_channels.
    """
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 64, 128), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 4, 8), use_linear_projection=True,
        cross_attention_dim=TEXT_WIDTH + TEXT_2_WIDTH, norm_num_groups=32, addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH, projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * SIZE_WIDTH,
    )  # fmt: skip
    _wake_unet(unet)
    _open_direct_path(unet)
    return unet


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


def _vae() -> AutoencoderKL:
    """A linear autoencoder: pictures (batch, 3, 8h, 8w) in -1..1, latents (batch, 4, h, w) of about unit variance.

    Encoding takes the mean of each 8x8 block; decoding repeats it and smooths after every doubling.
    """
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=VAE_CHANNELS, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32,
        sample_size=256, scaling_factor=SCALING_FACTOR, force_upcast=False,
    )  # fmt: skip
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # Zero where nothing is said below: residual branches and the mid attention then add nothing.
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    _lay_encoder(vae)
    _lay_decoder(vae)
    return vae


# Rows: lightness, blue against yellow, red against green, and how much lighter a block's left half is than its right.
# Columns: R, G, B (the last row weighs the difference of the halves). The gains give each latent unit variance on
# photographs after SCALING_FACTOR.
_COLOURS = torch.tensor([[0.299, 0.587, 0.114], [-0.30, -0.59, 0.89], [0.70, -0.59, -0.11]])
_GAINS = torch.tensor([16.0, 30.0, 30.0, 90.0])
# Taken off after the gains, as latents: photographs of people, animals and things are warm on average. The UNet's 32
# channels in 32 groups cannot predict a mean far from zero, so the zero latent has to be an ordinary colour, not grey.
_CENTRE = torch.tensor([-0.25, -1.1, 1.1, 0.0])
_SMOOTH = torch.tensor([0.25, 0.5, 0.25])
_SHARPEN = 0.2  # given back beforehand of what smoothing takes; at the borders it also fills in for the zero padding
_LEFT_RIGHT = 0.4  # how strongly the fourth latent leans its block when decoded; fitted on photographs


def _carry(conv: nn.Conv2d, matrix: torch.Tensor, taps: torch.Tensor | None = None) -> None:
    """Send input channels through `matrix` (out, in) to the first output channels, spread in space by `taps` (k, k)."""
    if taps is None:
        taps = torch.zeros(conv.kernel_size)
        taps[conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1.0
    conv.weight[: matrix.shape[0], : matrix.shape[1]] += matrix[:, :, None, None] * taps


_BALLAST = 20.0


def _add_ballast(shortcut: nn.Conv2d) -> None:
    """Turn four carried channels into four groups (x, +K, -K) of the 96 channels' 32 groups of three.

    The constants dominate the group's variance, so GroupNorm divides by what is nearly a constant.
    """
    for signal in range(4):
        shortcut.weight[3 * signal, signal] = 1.0
        shortcut.bias[3 * signal + 1] = _BALLAST
        shortcut.bias[3 * signal + 2] = -_BALLAST


def _read_through_norm(norm: nn.GroupNorm, conv: nn.Conv2d, matrix: torch.Tensor) -> None:
    """Undo GroupNorm and SiLU for channels made by `_add_ballast`, and send the four signals through `matrix` (out, 4).

    GroupNorm takes x to (x - mean(x)/3) / s with s = K * sqrt(2/3), and both constants lose the same mean(x)/3, so
    x/s = x' - ((+K)' + (-K)')/2. All three sit at about +12 before SiLU, where it is the identity.
    """
    spread, lift = 8.0, 12.0
    step = 1.5**0.5  # a constant's value after the norm
    norm.weight.fill_(spread)
    norm.bias.copy_(torch.tensor([lift, lift - spread * step, lift + spread * step]).repeat(32))
    scale = _BALLAST / step / spread
    for signal in range(4):
        weights = torch.tensor([1.0, -0.5, -0.5]) * scale
        conv.weight[: matrix.shape[0], 3 * signal : 3 * signal + 3, 1, 1] = matrix[:, signal, None] * weights


def _lay_encoder(vae: AutoencoderKL) -> None:
    """Channels 0-2 carry lightness and the two colour differences, channel 3 a block's left half less its right."""
    encoder = vae.encoder
    _carry(encoder.conv_in, _COLOURS)
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 0.25  # diffusers and sgm pad right and below only: these four taps are exactly the block
    lean = torch.zeros(3, 3)
    lean[:2, 0], lean[:2, 1] = 0.25, -0.25
    for block in encoder.down_blocks[:-1]:
        _carry(block.downsamplers[0].conv, torch.eye(3), mean)
    _carry(encoder.down_blocks[2].downsamplers[0].conv, torch.tensor([[0.0], [0.0], [0.0], [1.0]]), lean)
    _carry(encoder.down_blocks[1].resnets[0].conv_shortcut, torch.eye(3))
    _add_ballast(encoder.down_blocks[3].resnets[0].conv_shortcut)
    _read_through_norm(encoder.conv_norm_out, encoder.conv_out, torch.diag(_GAINS))
    encoder.conv_out.bias[:4] = -_CENTRE / SCALING_FACTOR
    encoder.conv_out.bias[4:] = -30.0  # log variance: a certain encoder, whose samples are its mean
    _carry(vae.quant_conv, torch.eye(8))


def _lay_decoder(vae: AutoencoderKL) -> None:
    decoder = vae.decoder
    _carry(vae.post_quant_conv, torch.eye(4))
    sharpen = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]]) * _SHARPEN
    sharpen[1, 1] += 1
    _carry(decoder.conv_in, torch.diag(1 / _GAINS), sharpen)
    _carry(decoder.up_blocks[1].resnets[0].conv_shortcut, torch.eye(4))
    smooth = torch.outer(_SMOOTH, _SMOOTH)
    for block in decoder.up_blocks[:-1]:
        _carry(block.upsamplers[0].conv, torch.eye(4), smooth)
    lean = torch.outer(_SMOOTH, torch.tensor([-1.0, 0.0, 1.0])) * _LEFT_RIGHT
    first = decoder.up_blocks[0].upsamplers[0].conv
    first.weight[3].zero_()  # the fourth latent ends here, in the lightness
    first.weight[0, 3] = lean
    _add_ballast(decoder.up_blocks[3].resnets[0].conv_shortcut)
    colours = torch.zeros(3, 4)
    colours[:, :3] = torch.linalg.inv(_COLOURS.double()).float()
    _read_through_norm(decoder.conv_norm_out, decoder.conv_out, colours)
    decoder.conv_out.bias.copy_(colours @ (_CENTRE / SCALING_FACTOR / _GAINS))


def _scheduler() -> EulerDiscreteScheduler:
    """The schedule of SDXL, and of SD 1.5."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip


def build_miniature(seed: int = 0) -> StableDiffusionXLPipeline:
    """The miniature on the CPU, in fp32 and eval mode; the same seed gives the same weights to the bit.

    The caller's random state is left as it was.
    """
    tokenizer, tokenizer_2 = _tokenizer("<|endoftext|>"), _tokenizer("!")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = {
            "unet": _unet(),
            "text_encoder": _wake_text(CLIPTextModel(_text_config(TEXT_WIDTH, "quick_gelu", tokenizer))),
            "text_encoder_2": _wake_text(CLIPTextModelWithProjection(_text_config(TEXT_2_WIDTH, "gelu", tokenizer_2))),
            "vae": _vae(),
        }
    for part in parts.values():
        part.eval()
    return StableDiffusionXLPipeline(
        **parts, tokenizer=tokenizer, tokenizer_2=tokenizer_2, scheduler=_scheduler(), add_watermarker=False
    )


def build_miniature_sd1(seed: int = 0) -> StableDiffusionPipeline:
    """As `build_miniature`, but SD 1.5."""
    tokenizer = _tokenizer("<|endoftext|>")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = {
            "unet": _sd1_unet(),
            "text_encoder": _wake_text(CLIPTextModel(_sd1_text_config(tokenizer))),
            "vae": _vae(),
        }
    for part in parts.values():
        part.eval()
    return StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


# by the name that the headless host knows them by
MINIATURES = {"miniature": build_miniature, "miniature-sd1": build_miniature_sd1}
