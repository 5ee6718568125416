"""Training of the toy SDXL's U-Net and text encoders, together and from scratch, on the latents of captioned toy pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from tools.toys.captions import CaptionedLatents
from tools.toys.sdxl import POSITIONS, Network, ToyModels, encode_text
from tools.toys.training import Average, Run, warm_cosine

NOISE_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SIZES = (64, 64, 0, 0, 64, 64)  # original height and width, crop top and left, target height and width


@dataclass(kw_only=True, frozen=True)
class DenoiserTraining:
    """How the U-Net and the text encoders are trained."""

    steps: int = 1900
    captions: int = 24
    latents_per_caption: int = 2
    learning_rate: float = 8e-4
    text_learning_rate: float = 5e-4
    warm_up: int = 100
    ema: float = 0.997
    short_length: int = 28  # tokens kept in the first part of the training; causal encoders give the same states, in a third of the time
    short_share: float = 0.75
    caption_dropout: float = 0.1
    drawings: int = 8
    seed: int = 2
    log_every: int = 50
    save_every: int = 300


def start_gently(models: ToyModels) -> None:
    """Let every residual branch of the U-Net start at zero, as SDXL's own training code does."""
    for name, module in models.unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def train_denoiser(
    models: ToyModels, data: CaptionedLatents, training: DenoiserTraining, scratch: Path, judge: Callable[[ToyModels], str]
) -> dict[str, float]:
    """Train in place, resuming from the scratch folder, and leave the averaged weights in the models; returns steps, loss and seconds."""
    trained = nn.ModuleDict({"unet": models.unet, "te1": models.text_1, "te2": models.text_2}).train()
    models.unet.to(memory_format=torch.channels_last)
    average = Average(trained, training.ema)
    image, text = list(models.unet.parameters()), [*models.text_1.parameters(), *models.text_2.parameters()]
    groups = [{"params": image, "top": training.learning_rate}, {"params": text, "top": training.text_learning_rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    run = Run(path=scratch / "denoiser_run.pt", networks=nn.ModuleDict({"trained": trained, "average": average}), optimizer=optimizer)
    run.resume()
    while run.step < training.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * warm_cosine(run.step, training.steps, training.warm_up)
        loss = _step(models, data, training, optimizer, run.step)
        average.follow(trained, run.step)
        run.note(loss)
        if run.step % training.log_every == 0:
            print(f"denoiser step {run.step}/{training.steps} loss {run.loss:.4f} {run.elapsed():.0f} s", flush=True)
        if run.step % training.save_every == 0 or run.step == training.steps:
            run.save()
            with average.standing_in(trained):
                print(f"denoiser step {run.step} {judge(models)}", flush=True)
    average.put_into(trained)
    return {"steps": run.step, "loss": run.loss, "seconds": run.elapsed()}


# ---------------------------------------------------------------- one step


def _step(models: ToyModels, data: CaptionedLatents, training: DenoiserTraining, optimizer: torch.optim.Optimizer, step: int) -> float:
    rng = np.random.default_rng((training.seed, step))
    length = training.short_length if step < training.short_share * training.steps else POSITIONS
    captions, latents = data.batch(rng, training.captions, training.latents_per_caption, training.caption_dropout)
    context, pooled = (x.repeat_interleave(training.latents_per_caption, 0) for x in encode_text(models, captions, length))
    loss = noise_loss(models, latents, context, pooled, rng)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def noise_loss(models: ToyModels, latents: Tensor, context: Tensor, pooled: Tensor, rng: np.random.Generator) -> Tensor:
    """The mean squared error of the predicted noise, at timesteps spread evenly over the batch."""
    count = len(latents)
    spread = (rng.permutation(count) + rng.random(count)) / count * NOISE_SCHEDULE["num_train_timesteps"]
    timesteps = torch.from_numpy(spread.astype(np.int64))
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    scheduler: Network = DDPMScheduler(**NOISE_SCHEDULE)
    noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    conditions = {"text_embeds": pooled, "time_ids": torch.from_numpy(np.stack([_sizes(rng) for _ in range(count)])).float()}
    return F.mse_loss(models.unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample, noise)


def _sizes(rng: np.random.Generator) -> np.ndarray:
    """Mostly the true sizes; sometimes others, so that the model does not lean on them."""
    if rng.random() < 0.85:
        return np.asarray(SIZES)
    return np.asarray((*rng.integers(48, 257, 2), *rng.integers(0, 33, 2), 64, 64))
