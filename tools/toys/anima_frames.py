"""The toy Anima's VAE, a video VAE, on single frames, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.toys.training import Network

LATENT_CHANNELS = 16


def moments(vae: Network, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the latents, each (batch, 16, height / 8, width / 8), before normalisation."""
    mean, logvar = vae.quant_conv(vae.encoder(pixels[:, :, None]))[:, :, 0].chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def restore(vae: Network, latents: Tensor) -> Tensor:
    """Pixels (batch, 3, height, width) of latents that are not normalised."""
    return vae.decoder(vae.post_quant_conv(latents[:, :, None]))[:, :, 0]


def latent_constants(vae: Network) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each latent channel, the same for every Anima: constants of the class."""
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


@contextmanager
def one_frame_convolutions() -> Iterator[None]:
    """Within: a causal 3-D convolution over one frame is the 2-D convolution by its last weights, for what comes before is zero."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    original = QwenImageCausalConv3d.forward
    QwenImageCausalConv3d.forward = _forward_one_frame  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        QwenImageCausalConv3d.forward = original


def _forward_one_frame(conv: Network, frames: Tensor) -> Tensor:
    padding = (conv._padding[2], conv._padding[0])
    return F.conv2d(frames[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=padding)[:, :, None]
