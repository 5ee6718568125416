"""The starting point of the toy Anima's VAE: weights that already pass the mean colour of each 8x8 cell through.

The norms divide each position's channels by their length, which a large constant channel keeps nearly the same everywhere. The colours
go with their negatives, for silu(x) - silu(-x) = x. Residual branches start at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.toys.anima_frames import LATENT_CHANNELS, moments, restore
from tools.toys.training import Network

_COLOURS = 3
_CONSTANT = 2 * _COLOURS  # the channel that is the same everywhere; before it the colours and their negatives
_LEVEL = 2.0  # the constant's value: large, so that a norm over the channels changes the colours little


@torch.no_grad()
def start_with_colours(vae: Network, pixels: Tensor) -> None:
    """Set the weights in place: residual branches start at zero, the others carry three colours, their negatives and a constant.

    Weights for earlier frames start at zero, and stay there. The pixels (batch, 3, height, width) calibrate latents and output.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _start(name, module)
    _carry(vae.encoder.conv_in.weight[:, :, -1], vae.encoder.conv_in.bias)
    _calibrate(vae, pixels)


def _start(name: str, conv: Network) -> None:
    """A convolution's weights, by what it does; the last frame alone where it has frames."""
    nn.init.zeros_(conv.bias)
    weight = torch.zeros_like(conv.weight)
    seen = weight[:, :, -1] if weight.ndim == 5 else weight
    if name.endswith("quant_conv"):
        seen.copy_(torch.eye(conv.out_channels)[:, :, None, None])
    elif name.endswith("conv_out"):
        seen.normal_(std=0.3 * seen[0].numel() ** -0.5)
        _read_colours(seen)
    elif name == "decoder.conv_in":
        seen.normal_(std=seen[0].numel() ** -0.5)
        _carry(seen, conv.bias)
    elif not name.endswith(("conv2", "proj", "time_conv")):
        seen.normal_(std=seen[0].numel() ** -0.5)
        if "conv_shortcut" in name or "resample" in name:
            _pass_on(seen, halves="down" in name)
    conv.weight.copy_(weight)


def _pass_on(seen: Tensor, *, halves: bool) -> None:
    """The first channels as they are, or the mean of the four pixels that become one."""
    channels = _CONSTANT + 1
    seen[:channels] = 0
    middle = seen.shape[-1] // 2
    for n in range(channels):
        if halves and seen.shape[-1] == 3:
            seen[n, n, :2, :2] = 0.25
        else:
            seen[n, n, middle, middle] = 1


def _carry(seen: Tensor, bias: Tensor) -> None:
    """Colours from the first three inputs, their negatives and the constant."""
    seen[: _CONSTANT + 1] = 0
    for n in range(_COLOURS):
        seen[n, n, 1, 1], seen[n + _COLOURS, n, 1, 1] = 1, -1
    bias[_CONSTANT] = _LEVEL


def _read_colours(seen: Tensor) -> None:
    """Each colour from its channel and its negative: silu(x) - silu(-x) = x."""
    seen[:_COLOURS] = 0
    for n in range(_COLOURS):
        seen[n, n, 1, 1], seen[n, n + _COLOURS, 1, 1] = 1, -1


def _calibrate(vae: Network, pixels: Tensor) -> None:
    """Latents of deviation 1 with little noise, and outputs on the straight line to the pixels."""
    mean, _ = moments(vae, pixels)
    scale = 1 / mean.std((0, 2, 3))
    vae.quant_conv.weight[:LATENT_CHANNELS] *= scale[:, None, None, None, None]
    vae.quant_conv.bias[:LATENT_CHANNELS] = -mean.mean((0, 2, 3)) * scale
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    out = restore(vae, moments(vae, pixels)[0])
    x, y = out.transpose(0, 1).flatten(1), pixels.transpose(0, 1).flatten(1)
    slope = ((x - x.mean(1, True)) * (y - y.mean(1, True))).mean(1) / x.var(1)
    vae.decoder.conv_out.weight *= slope[:, None, None, None, None]
    vae.decoder.conv_out.bias.copy_(y.mean(1) - slope * x.mean(1))
