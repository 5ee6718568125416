"""The starting point of the toy VAE's training: weights that already pass the mean colour of each 8x8 cell through.

With 32 norm groups of one or two channels a norm takes the mean out of flat pictures, and random weights need long to bring it back.
So even channels carry signals and odd ones a reference of large, fixed variance (made by zero padding at the border): in groups of
two the norms are nearly linear. The first signals are the three colours and their negatives, for silu(x) - silu(-x) = x. Residual
branches start at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.toys.sdxl import Network

_COLOURS = 3
_CONSTANT = 13  # the channel that is 1 everywhere
_REFERENCE = 60.0


@torch.no_grad()
def pass_colours_through(vae: Network, pixels: Tensor) -> None:
    """Set the weights in place; the pixels (batch, 3, height, width) calibrate the latents and the output."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            _start_conv(name, module)
        elif name.endswith("to_out.0"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    _calibrate_latents(vae, pixels)
    _calibrate_output(vae, pixels)


def _start_conv(name: str, conv: Network) -> None:
    nn.init.zeros_(conv.bias)
    if name.endswith("quant_conv"):
        conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None])
    elif name.endswith("conv_out"):
        _read_signals(conv)
    elif name.endswith("conv2"):
        nn.init.zeros_(conv.weight)
    elif not name.endswith("conv1"):
        _carry_signals(conv, "downsamplers" in name)


def _carry_signals(conv: Network, halves: bool) -> None:
    """Even channels carry signals, one odd channel a constant, the others the reference."""
    entry = conv.in_channels <= 4
    weight = torch.zeros_like(conv.weight)
    even = slice(None) if entry else slice(0, None, 2)
    mixed = weight[0::2, even]
    mixed.normal_(std=mixed[0].numel() ** -0.5)
    weight[: 4 * _COLOURS : 2] = 0
    for n in range(2 * _COLOURS):
        sign = -1.0 if entry and n >= _COLOURS else 1.0
        _set_taps(weight, 2 * n, n % _COLOURS if entry else 2 * n, sign, halves)
    odd = torch.tensor([n for n in range(1, conv.out_channels, 2) if n != _CONSTANT])
    if conv.kernel_size[0] == 3 and not entry:
        weight[odd, _CONSTANT] = _REFERENCE / 9
        conv.bias[odd] = -_REFERENCE
    elif not entry:
        sources = torch.tensor([n for n in range(1, conv.in_channels, 2) if n != _CONSTANT])
        weight[odd, sources[torch.arange(len(odd)) % len(sources)]] = 1.0
    conv.bias[_CONSTANT] = 1.0
    conv.weight.copy_(weight)


def _set_taps(weight: Tensor, target: int, source: int, value: float, halves: bool) -> None:
    if halves:
        weight[target, source, :2, :2] = value / 4  # the mean of the four pixels that become one
    else:
        middle = weight.shape[-1] // 2
        weight[target, source, middle, middle] = value


def _read_signals(conv: Network) -> None:
    outputs = min(_COLOURS, conv.out_channels)
    conv.weight.mul_(0.1)
    conv.weight[:outputs] = 0
    for n in range(outputs):
        conv.weight[n, 2 * n, 1, 1], conv.weight[n, 2 * (n + _COLOURS), 1, 1] = 1.0, -1.0


def _calibrate_latents(vae: Network, pixels: Tensor) -> None:
    """Latents of deviation 1, with little noise: a logarithm of the variance of -6."""
    mean = vae.encode(pixels).latent_dist.mean
    channels = mean.shape[1]
    scale = 1 / mean.std((0, 2, 3))
    vae.quant_conv.weight[:channels] *= scale[:, None, None, None]
    vae.quant_conv.bias[:channels] = -mean.mean((0, 2, 3)) * scale
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -6.0


def _calibrate_output(vae: Network, pixels: Tensor) -> None:
    """The straight line from the first output to the pixels, for each colour."""
    out = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    x, y = out.transpose(0, 1).flatten(1), pixels.transpose(0, 1).flatten(1)
    slope = ((x - x.mean(1, True)) * (y - y.mean(1, True))).mean(1) / x.var(1)
    vae.decoder.conv_out.weight *= slope[:, None, None, None]
    vae.decoder.conv_out.bias.copy_(y.mean(1) - slope * x.mean(1))
