"""Pictures sampled from the toy SDXL, and the score the reader gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image

from tools.toys.pictures import Picture, caption, has_new_look, random_picture, read
from tools.toys.sdxl import Network, ToyModels, encode_text
from tools.toys.sdxl_denoiser import NOISE_SCHEDULE, SIZES
from tools.toys.sdxl_vae import decode


@dataclass(kw_only=True, frozen=True)
class Score:
    """How many sampled pictures show what their captions say."""

    count: int
    colour: int
    shape: int
    background: int
    texture: int
    all_three: int  # colour, shape and background
    new_look: int

    def __str__(self) -> str:
        parts = f"colour {self.colour} shape {self.shape} background {self.background} texture {self.texture} new look {self.new_look}"
        return f"score {self.all_three}/{self.count} ({parts})"


@torch.no_grad()
def sample(models: ToyModels, captions: list[str], seed: int = 0, steps: int = 25, guidance: float = 4.0) -> list[Image.Image]:
    """One picture for each caption: DDIM with classifier-free guidance against the empty caption."""
    scheduler: Network = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    context, pooled = encode_text(models, ["", *captions])
    both = torch.cat([torch.zeros(len(captions), dtype=torch.long), torch.arange(1, len(captions) + 1)])
    conditions = {"text_embeds": pooled[both], "time_ids": torch.tensor([SIZES], dtype=torch.float32).repeat(len(both), 1)}
    latents = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        guess = models.unet(latents.repeat(2, 1, 1, 1), timestep, context[both], added_cond_kwargs=conditions).sample
        without, given = guess.chunk(2)
        latents = scheduler.step(without + guidance * (given - without), timestep, latents).prev_sample
    return decode(models.vae, latents)


def seeded_pictures(count: int, seed: int) -> list[Picture]:
    """What a scoring asks for."""
    rng = np.random.default_rng(seed)
    return [random_picture(rng) for _ in range(count)]


def score(pictures: list[Picture], images: list[Image.Image]) -> Score:
    """Compare what the reader sees with what was asked."""
    readings = [read(image) for image in images]
    pairs = list(zip(pictures, readings, strict=True))
    return Score(
        count=len(pictures),
        colour=sum(p.colour == r.colour for p, r in pairs),
        shape=sum(p.shape == r.shape for p, r in pairs),
        background=sum(p.background == r.background for p, r in pairs),
        texture=sum(p.texture == r.texture for p, r in pairs),
        all_three=sum((p.colour, p.shape, p.background) == (r.colour, r.shape, r.background) for p, r in pairs),
        new_look=sum(has_new_look(image) for image in images),
    )


def sample_and_score(models: ToyModels, count: int = 64, seed: int = 1234) -> tuple[Score, list[Image.Image]]:
    """The score of seeded random captions, and the pictures."""
    pictures = seeded_pictures(count, seed)
    images = sample(models, [caption(p) for p in pictures], seed)
    return score(pictures, images), images


def grid(images: list[Image.Image], columns: int = 8) -> Image.Image:
    """The pictures side by side."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * 66, rows * 66))
    for n, image in enumerate(images):
        sheet.paste(image, (n % columns * 66, n // columns * 66))
    return sheet
