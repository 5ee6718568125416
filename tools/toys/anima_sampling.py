"""Pictures sampled from the toy Anima, and the score the reader gives them."""

from __future__ import annotations

from itertools import pairwise

import torch
from PIL import Image

from library.models.anima.vae import decode_latents
from tools.toys.anima import ToyAnima
from tools.toys.anima_denoiser import read_captions, velocity
from tools.toys.pictures import caption
from tools.toys.sdxl_sampling import Score, score, seeded_pictures
from tools.toys.sdxl_vae import to_images


@torch.no_grad()
def sample(models: ToyAnima, captions: list[str], seed: int = 0, steps: int = 25, guidance: float = 4.0) -> list[Image.Image]:
    """One picture for each caption: Euler's steps with classifier-free guidance against the empty caption."""
    rows, bias = read_captions(models, ["", *captions])
    both = torch.cat([torch.zeros(len(captions), dtype=torch.long), torch.arange(1, len(captions) + 1)])
    text = rows[both], bias[both]
    latents = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(times.tolist()):
        without, given = velocity(models, latents.repeat(2, 1, 1, 1), torch.full((len(both),), now), text).chunk(2)
        latents = latents + (then - now) * (without + guidance * (given - without))
    return to_images(decode_latents(models.vae, latents))


def sample_and_score(models: ToyAnima, count: int = 64, seed: int = 1234) -> tuple[Score, list[Image.Image]]:
    """The score of seeded random captions, and the pictures."""
    pictures = seeded_pictures(count, seed)
    images = sample(models, [caption(p) for p in pictures], seed)
    return score(pictures, images), images
