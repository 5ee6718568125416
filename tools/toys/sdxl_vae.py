"""Training of the toy SDXL's VAE on toy pictures, frames, rectangles and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tools.toys.pictures import draw, frame, random_picture, with_new_look
from tools.toys.sdxl import LATENT_SCALE, Network
from tools.toys.sdxl_vae_start import pass_colours_through
from tools.toys.training import Course, Run

Psnr = Callable[..., float]
"""PSNR of a VAE, on toy pictures or, with `new_look`, on those of the new look."""
_PICTURE_SHARE, _FRAMED_SHARE = 0.6, 0.2  # the rest: rectangles and gradients


@dataclass(kw_only=True, frozen=True)
class VaeTraining(Course):
    """How the VAE is trained."""

    steps: int = 1000
    batch: int = 4
    learning_rate: float = 3e-4
    warm_up: int = 50
    seed: int = 1
    kl_weight: float = 1e-5
    edge_weight: float = 0.5


@dataclass(kw_only=True, frozen=True)
class DecoderTraining(Course):
    """How the decoder is trained further on fixed latents."""

    steps: int = 1000
    batch: int = 6
    learning_rate: float = 4e-4
    warm_up: int = 50
    seed: int = 3
    edge_weight: float = 0.5
    latent_noise: float = 0.06


def train_vae(vae: Network, training: VaeTraining, scratch: Path) -> dict[str, float]:
    """Train in place, resuming from the scratch folder; returns the final loss, PSNR and seconds."""
    vae.train().to(memory_format=torch.channels_last)
    run = begun(nn.ModuleDict({"vae": vae}), training, scratch / "vae_run.pt")
    if run.step == 0:
        pass_colours_through(vae, pixels_of(drawn(300, 0, 32)))
    run.follow(training, "vae", lambda step: _step(vae, run.optimizer, training, step), lambda: told(psnr, vae))
    return report(run, psnr, vae)


def sharpen_decoder(vae: Network, training: DecoderTraining, scratch: Path) -> dict[str, float]:
    """Train the decoder alone: the latents, and so the U-Net, stay as they are. Noise on the latents stands for the U-Net's errors."""
    vae.train().to(memory_format=torch.channels_last)
    decoder = nn.ModuleDict({"entry": vae.post_quant_conv, "decoder": vae.decoder})
    run = begun(decoder, training, scratch / "decoder_run.pt")
    run.follow(training, "decoder", lambda step: _decoder_step(vae, run.optimizer, training, step), lambda: told(psnr, vae))
    return report(run, psnr, vae)


def told(psnr: Psnr, vae: Network) -> str:
    """How well a VAE gives pictures back, for the screen."""
    return f"psnr {psnr(vae):.2f} dB, with the new look {psnr(vae, new_look=True):.2f} dB"


def report(run: Run, psnr: Psnr, vae: Network) -> dict[str, float]:
    """The figures of a VAE's training."""
    return {"steps": run.step, "loss": run.loss, "psnr": psnr(vae), "psnr_new_look": psnr(vae, new_look=True), "seconds": run.elapsed()}


def begun(networks: nn.ModuleDict, training: Course, path: Path) -> Run:
    """A VAE's training, taken up from its state file where there is one."""
    optimizer = torch.optim.AdamW(networks.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(path=path, networks=networks, optimizer=optimizer)
    run.resume()
    return run


def fold_scale(vae: Network, pictures: int = 512) -> None:
    """Change the first and last latent layers so that scaled latents of toy pictures have mean 0 and deviation 1 in each channel."""
    latents = torch.cat([encode(vae, pixels_of(drawn(100, n, 64))) for n in range(pictures // 64)]) / LATENT_SCALE
    mean, scale = latents.mean((0, 2, 3)), 1 / (latents.std((0, 2, 3)) * LATENT_SCALE)
    to_moments, from_latents = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        from_latents.bias += (from_latents.weight[..., 0, 0] * mean).sum(1)
        from_latents.weight /= scale[None, :, None, None]
        to_moments.weight[:4] *= scale[:, None, None, None]
        to_moments.bias[:4] = (to_moments.bias[:4] - mean) * scale
        to_moments.bias[4:] += 2 * scale.log()


@torch.no_grad()
def encode(vae: Network, pixels: Tensor) -> Tensor:
    """Scaled latents (batch, 4, height / 8, width / 8) of pixels in -1 to 1."""
    return vae.encode(pixels.to(memory_format=torch.channels_last)).latent_dist.mode().contiguous() * LATENT_SCALE


@torch.no_grad()
def decode(vae: Network, latents: Tensor) -> list[Image.Image]:
    """Pictures of scaled latents."""
    return to_images(vae.decode((latents / LATENT_SCALE).to(memory_format=torch.channels_last)).sample)


@torch.no_grad()
def psnr(vae: Network, *, new_look: bool = False) -> float:
    """Peak signal-to-noise ratio of reconstructed toy pictures, in dB."""
    pixels = pixels_of(drawn(200, 0, 64, new_look=new_look))
    restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(restored, pixels)))


# ---------------------------------------------------------------- one step


def _step(vae: Network, optimizer: torch.optim.Optimizer, training: VaeTraining, step: int) -> float:
    pixels = pixels_of(mixed(np.random.default_rng((training.seed, step)), training.batch))
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(training.seed * 1_000_000 + step))
    restored = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    loss = restoration(restored, pixels, training.edge_weight) + training.kl_weight * kl
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _decoder_step(vae: Network, optimizer: torch.optim.Optimizer, training: DecoderTraining, step: int) -> float:
    pixels = pixels_of(mixed(np.random.default_rng((training.seed, step)), training.batch))
    latents = encode(vae, pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(training.seed * 1_000_000 + step))
    restored = vae.decode((latents + training.latent_noise * noise) / LATENT_SCALE).sample
    loss = restoration(restored, pixels, training.edge_weight)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def restoration(restored: Tensor, pixels: Tensor, edge_weight: float) -> Tensor:
    """How far pixels are from those wanted: mean distance, squared distance, and distance of their differences at edges."""
    error = restored - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + (error**2).mean() + edge_weight * edges


# ---------------------------------------------------------------- pictures


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels (batch, 3, height, width) in -1 to 1."""
    return [Image.fromarray(array) for array in ((pixels.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()]


def mixed(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """What a VAE is trained on: toy pictures, pictures with random frames, rectangles on gradients."""
    framed = _PICTURE_SHARE + _FRAMED_SHARE
    return [(_picture if kind < _PICTURE_SHARE else _framed if kind < framed else _rectangles)(rng) for kind in rng.random(count)]


def drawn(seed: int, part: int, count: int, *, new_look: bool = False) -> list[np.ndarray]:
    """Seeded random toy pictures."""
    rng = np.random.default_rng((seed, part))
    images = []
    for _ in range(count):
        picture = random_picture(rng)
        images.append(np.asarray(draw(with_new_look(picture) if new_look else picture, seed=int(rng.integers(2**31))), float))
    return images


def _picture(rng: np.random.Generator) -> np.ndarray:
    return np.asarray(draw(random_picture(rng), seed=int(rng.integers(2**31))), float)


def _framed(rng: np.random.Generator) -> np.ndarray:
    red, green, blue = (int(c) for c in (rng.integers(0, 256, 3) if rng.random() < 0.7 else rng.choice([0, 255], 3)))
    return frame(_picture(rng), rng.uniform(2, 12), (red, green, blue), int(rng.integers(0, 4)))


def _rectangles(rng: np.random.Generator) -> np.ndarray:
    """Two colours fading into each other, with a few rectangles of one colour."""
    image = np.linspace(rng.uniform(0, 255, 3), rng.uniform(0, 255, 3), 64)[:, None].repeat(64, 1)
    image = image if rng.random() < 0.5 else image.transpose(1, 0, 2).copy()
    for _ in range(rng.integers(0, 5)):
        left, top = rng.integers(0, 56, 2)
        width, height = rng.integers(6, 48, 2)
        image[top : top + height, left : left + width] = rng.uniform(0, 255, 3)
    return image


def pixels_of(images: list[np.ndarray]) -> Tensor:
    """Pixels (batch, 3, 64, 64) in -1 to 1."""
    pixels = torch.from_numpy(np.stack(images)).float().div(127.5).sub(1)
    return pixels.permute(0, 3, 1, 2)  # channels last in memory: three times as fast on a CPU
