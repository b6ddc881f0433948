"""The miniatures' autoencoder: SDXL's structure, factor 8 and four latent channels, for pictures made of two-pixel dots.

The outermost level is worked out by hand: the encoder takes the mean of each dot, the decoder repeats it, exactly. The inner
three levels are trained on pictures of the world (`benchmarks/miniature`).
"""

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL
from torch import Tensor, nn

CHANNELS = (96, 32, 64, 96)
SCALING_FACTOR = 0.13025


def untrained_vae() -> AutoencoderKL:
    """The autoencoder before its training: the outermost level laid by hand, the inner ones random."""
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=CHANNELS, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32,
        sample_size=64, scaling_factor=SCALING_FACTOR, force_upcast=False,
    )  # fmt: skip
    with torch.no_grad():
        lay_outer_level(vae)
    return vae


def laid_by_hand(name: str) -> bool:
    """Whether a tensor of the autoencoder is `lay_outer_level`'s, by its name: those are not trained, and not shipped."""
    outer = (
        "encoder.conv_in",
        "encoder.down_blocks.0",
        "decoder.up_blocks.3",
        "decoder.conv_norm_out",
        "decoder.conv_out",
    )
    return name.startswith(outer) or ".mid_block.resnets." in name


def lay_outer_level(vae: AutoencoderKL) -> None:
    """Pictures of 64 pixels <-> dots of two pixels: the encoder takes means, the decoder repeats, exactly."""
    encoder, decoder = vae.encoder, vae.decoder
    last = decoder.up_blocks[3]
    outer = [encoder.conv_in, encoder.down_blocks[0], last, decoder.conv_out]
    # the two middles keep their attention alone: a third of the weights, and nothing missed without
    for module in (
        m for part in (*outer, *encoder.mid_block.resnets, *decoder.mid_block.resnets) for m in part.modules()
    ):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    repeat = decoder.up_blocks[2].upsamplers[0].conv
    nn.init.zeros_(repeat.bias)
    middle = torch.zeros(3, 3)
    middle[1, 1] = 1.0
    repeat.weight.mul_(middle)
    repeat.weight[3:] = 0.0
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 0.25  # diffusers and sgm pad right and below only: these four taps are exactly the dot
    _carry(encoder.conv_in, middle)
    _carry(encoder.down_blocks[0].downsamplers[0].conv, mean)
    _add_ballast(last.resnets[0].conv_shortcut)
    _read_through_norm(decoder.conv_norm_out, decoder.conv_out)


class InnerLevels(nn.Module):
    """The autoencoder between dots (b, 3, 32, 32) and latents (b, 4, 8, 8): the very modules, without the outer level."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        encoder, decoder = vae.encoder, vae.decoder
        self.width = encoder.conv_in.out_channels
        self.down = nn.ModuleList(encoder.down_blocks[1:])
        self.up = nn.ModuleList([*decoder.up_blocks[:2], *decoder.up_blocks[2].resnets])
        self.middle = nn.ModuleList([*encoder.mid_block.attentions, *decoder.mid_block.attentions])
        self.ends = nn.ModuleList([encoder.conv_norm_out, encoder.conv_out, decoder.conv_in])
        # the next level's upsampler reads the dots' colours from the last trained channels
        self.colours = decoder.up_blocks[2].upsamplers[0].conv

    def encode(self, dots: Tensor) -> Tensor:
        x = F.pad(dots, (0, 0, 0, 0, 0, self.width - 3))
        for block in self.down:
            x = block(x)
        norm, conv_out, _ = self.ends
        return conv_out(F.silu(norm(self.middle[0](x))))[:, :4]

    def decode(self, latent: Tensor) -> Tensor:
        x = self.middle[1](self.ends[2](latent))
        for block in self.up:
            x = block(x, None)
        # only the middle tap of the first three channels is learned: each dot becomes four pixels of one colour
        return F.conv2d(x, self.colours.weight[:3, :, 1:2, 1:2], self.colours.bias[:3])


def standardise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Latents of zero mean and unit variance after SCALING_FACTOR; a certain encoder, whose samples are its mean."""
    gain = 1 / (std * SCALING_FACTOR)
    with torch.no_grad():
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight.zero_()
            conv.bias.zero_()
        vae.quant_conv.weight[:4, :4, 0, 0] = torch.diag(gain)
        vae.quant_conv.bias[:4] = -mean * gain
        vae.quant_conv.bias[4:] = -30.0  # log variance
        vae.post_quant_conv.weight[:, :, 0, 0] = torch.diag(1 / gain)
        vae.post_quant_conv.bias[:] = mean


def _carry(conv: nn.Conv2d, taps: Tensor) -> None:
    """Pass the three colours on in the first channels, spread in space by `taps` (k, k)."""
    conv.weight[:3, :3] = torch.eye(3)[:, :, None, None] * taps


_BALLAST = 20.0


def _add_ballast(shortcut: nn.Conv2d) -> None:
    """Turn the three carried colours into three groups (x, +K, -K) of the 96 channels' 32 groups of three.

    The constants dominate the group's variance, so GroupNorm divides by what is nearly a constant.
    """
    for signal in range(3):
        shortcut.weight[3 * signal, signal] = 1.0
        shortcut.bias[3 * signal + 1] = _BALLAST
        shortcut.bias[3 * signal + 2] = -_BALLAST


def _read_through_norm(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
    """Undo GroupNorm and SiLU for channels made by `_add_ballast`, and give out the three colours.

    GroupNorm takes x to (x - mean(x)/3) / s with s = K * sqrt(2/3), and both constants lose the same mean(x)/3, so
    x/s = x' - ((+K)' + (-K)')/2. All three sit at about +12 before SiLU, where it is the identity.
    """
    spread, lift = 8.0, 12.0
    step = 1.5**0.5  # a constant's value after the norm
    norm.weight.fill_(spread)
    norm.bias.copy_(torch.tensor([lift, lift - spread * step, lift + spread * step]).repeat(32))
    scale = _BALLAST / step / spread
    for signal in range(3):
        conv.weight[signal, 3 * signal : 3 * signal + 3, 1, 1] = torch.tensor([1.0, -0.5, -0.5]) * scale
