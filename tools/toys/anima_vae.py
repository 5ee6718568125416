"""Training of the toy Anima's VAE on toy pictures, frames, rectangles and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tools.toys.anima_frames import LATENT_CHANNELS, latent_constants, moments, one_frame_convolutions, restore
from tools.toys.anima_vae_start import start_with_colours
from tools.toys.sdxl_vae import begun, drawn, mixed, pixels_of, report, restoration, told
from tools.toys.training import Course, Network


@dataclass(kw_only=True, frozen=True)
class AnimaVaeTraining(Course):
    """How the VAE is trained."""

    steps: int = 1300
    batch: int = 8
    learning_rate: float = 1.5e-3
    warm_up: int = 100
    seed: int = 11
    save_every: int = 250
    kl_weight: float = 5e-4
    edge_weight: float = 0.5


def train_anima_vae(vae: Network, training: AnimaVaeTraining, scratch: Path) -> dict[str, float]:
    """Train in place, resuming from the scratch folder; returns the final loss, PSNR and seconds."""
    vae.train()
    run = begun(nn.ModuleDict({"vae": vae}), training, scratch / "anima_vae_run.pt")
    with one_frame_convolutions():
        if run.step == 0:
            start_with_colours(vae, pixels_of(drawn(300, 0, 32)))
        run.follow(training, "vae", lambda step: _step(vae, run.optimizer, training, step), lambda: told(psnr, vae))
        return report(run, psnr, vae)


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


@torch.no_grad()
def psnr(vae: Network, *, new_look: bool = False) -> float:
    """Peak signal-to-noise ratio of reconstructed toy pictures, in dB."""
    pixels = pixels_of(drawn(200, 0, 64, new_look=new_look))
    restored = restore(vae, moments(vae, pixels)[0]).clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(restored, pixels)))


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
