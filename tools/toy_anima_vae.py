"""Training of the toy Anima's VAE: a video VAE that sees one frame, so its causal convolutions are computed as the 2-D ones they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.toy_training import Network, Run, warm_cosine
from tools.toy_vae import drawn, mixed, pixels_of, restoration

LATENT_CHANNELS = 16


@dataclass(kw_only=True, frozen=True)
class AnimaVaeTraining:
    """How the VAE is trained."""

    steps: int = 1300
    batch: int = 8
    learning_rate: float = 1.5e-3
    warm_up: int = 100
    kl_weight: float = 5e-4
    edge_weight: float = 0.5
    seed: int = 11
    log_every: int = 50
    save_every: int = 250


def train_anima_vae(vae: Network, training: AnimaVaeTraining, scratch: Path) -> dict[str, float]:
    """Train in place, resuming from the scratch folder; returns the final loss, PSNR and seconds."""
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(path=scratch / "anima_vae_run.pt", networks=nn.ModuleDict({"vae": vae}), optimizer=optimizer)
    run.resume()
    with one_frame_convolutions():
        if run.step == 0:
            start_with_colours(vae, pixels_of(drawn(300, 0, 32)))
        while run.step < training.steps:
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * warm_cosine(run.step, training.steps, training.warm_up)
            run.note(_step(vae, optimizer, training, run.step))
            if run.step % training.log_every == 0:
                print(f"vae step {run.step}/{training.steps} loss {run.loss:.4f} {run.elapsed():.0f} s", flush=True)
            if run.step % training.save_every == 0 or run.step == training.steps:
                run.save()
                print(f"vae step {run.step} psnr {psnr(vae):.2f} dB, with the new look {psnr(vae, new_look=True):.2f} dB", flush=True)
        return {"steps": run.step, "loss": run.loss, "psnr": psnr(vae), "psnr_new_look": psnr(vae, new_look=True), "seconds": run.elapsed()}


@torch.no_grad()
def fold_scale(vae: Network, pictures: int = 512) -> None:
    """Change `quant_conv` and `post_quant_conv` so that latents of toy pictures have the class's own mean and deviation in each channel."""
    with one_frame_convolutions():
        latents = torch.cat([moments(vae, pixels_of(drawn(100, n, 64)))[0] for n in range(pictures // 64)])
    wanted_mean, wanted_std = latent_constants(vae)
    mean, scale = latents.mean((0, 2, 3)), wanted_std / latents.std((0, 2, 3))
    offset = wanted_mean - mean * scale  # new = old * scale + offset
    into, out_of = vae.quant_conv, vae.post_quant_conv
    into.weight[:LATENT_CHANNELS] *= scale[:, None, None, None, None]
    into.bias[:LATENT_CHANNELS] = into.bias[:LATENT_CHANNELS] * scale + offset
    into.bias[LATENT_CHANNELS:] += 2 * scale.log()
    out_of.weight /= scale[None, :, None, None, None]
    out_of.bias -= (out_of.weight[..., 0, 0, 0] * offset).sum(1)


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


@torch.no_grad()
def psnr(vae: Network, *, new_look: bool = False) -> float:
    """Peak signal-to-noise ratio of reconstructed toy pictures, in dB."""
    pixels = pixels_of(drawn(200, 0, 64, new_look=new_look))
    restored = restore(vae, moments(vae, pixels)[0]).clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(restored, pixels)))


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


def _step(vae: Network, optimizer: torch.optim.Optimizer, training: AnimaVaeTraining, step: int) -> float:
    pixels = pixels_of(mixed(np.random.default_rng((training.seed, step)), training.batch))
    mean, logvar = moments(vae, pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(training.seed * 1_000_000 + step))
    restored = restore(vae, mean + (0.5 * logvar).exp() * noise)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    loss = restoration(restored, pixels, training.edge_weight) + training.kl_weight * kl
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


# ---------------------------------------------------------------- the start: the mean colour of each 8x8 cell passes through

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
