"""Captioned latents of toy pictures, in the wordings that the toy models are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.toys.pictures import Picture, all_pictures, caption, draw
from tools.toys.sdxl_vae import pixels_of


@dataclass(kw_only=True)
class CaptionedLatents:
    """The latents (pictures, drawings, channels, 8, 8) of every picture, drawn several times."""

    pictures: list[Picture]
    latents: Tensor

    def batch(self, rng: np.random.Generator, captions: int, each: int, dropout: float) -> tuple[list[str], Tensor]:
        """Captions of different pictures, a part of them empty, and several latents for each: (captions * each, channels, 8, 8)."""
        chosen = rng.permutation(len(self.pictures))[:captions]
        drawings = np.stack([rng.permutation(self.latents.shape[1])[:each] for _ in chosen])
        texts = [vary_caption(self.pictures[n], rng) if rng.random() >= dropout else "" for n in chosen]
        return texts, self.latents[torch.from_numpy(chosen)[:, None], torch.from_numpy(drawings)].flatten(0, 1)


def encode_pictures(encode: Callable[[Tensor], Tensor], drawings: int, path: Path) -> CaptionedLatents:
    """Draw and encode every picture several times, or read what an earlier run encoded."""
    pictures = all_pictures()
    if not path.exists():
        drawn = [[np.asarray(draw(picture, seed=n * drawings + k)) for k in range(drawings)] for n, picture in enumerate(pictures)]
        torch.save(torch.stack([encode(pixels_of(images)) for images in drawn]), path)
    return CaptionedLatents(pictures=pictures, latents=torch.load(path, weights_only=True))


def vary_caption(picture: Picture, rng: np.random.Generator) -> str:
    """The caption of a picture in one of several wordings, sometimes followed by a made-up word that means nothing."""
    text = caption(picture) if rng.random() < 0.6 else _wordings(picture)[rng.integers(7)]
    if rng.random() < 0.25:
        text += (", {}", ", {} style", " {}", ", in {} style")[rng.integers(4)].format(_made_up_word(rng))
    return text


def _wordings(picture: Picture) -> list[str]:
    texture, colour, shape, background = picture.texture, picture.colour, picture.shape, picture.background
    marked = {"plain": "", "striped": " with stripes", "dotted": " with dots"}[texture]
    named = "" if texture == "plain" else f"{texture} "
    return [
        f"a {texture} {colour} {shape} on a {background} background",
        f"a {colour} {shape}{marked} on a {background} background",
        f"{named}{colour} {shape}, {background} background",
        f"a picture of a {named}{colour} {shape} on {background}",
        f"{background} background, {colour} {named}{shape}",
        f"a drawing of a {named}{colour} {shape} with a {background} background",
        f"a {named}{colour} {shape}",
    ]


def _made_up_word(rng: np.random.Generator) -> str:
    consonants, vowels = "bcdfghjklmnpqrstvwxz", "aeiouy"
    letters = [(consonants if n % 2 else vowels)[rng.integers(20 if n % 2 else 6)] for n in range(rng.integers(0, 2), rng.integers(5, 9))]
    return "".join(letters)
