"""Stand-ins for the models that fill caches, and what lies on the disk afterwards."""

from pathlib import Path

import torch
from torch import Tensor

from library.data.caches import fill_latents, fill_text
from library.data.dataset import TrainingData

LENGTH = 12  # rows of the text states


class Vae:
    """Means of 8x8 squares; counts the images it sees."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 8)


class TextEncoder:
    """A row for each letter, zeros up to `LENGTH`, and a vector; keeps what it was asked."""

    def __init__(self) -> None:
        self.captions: list[str] = []

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        self.captions += captions
        letters = torch.tensor([[float(ord(letter)) for letter in caption[:LENGTH].ljust(LENGTH, "\0")] for caption in captions])
        pooled = torch.tensor([[float(sum(map(ord, caption))), float(len(caption))] for caption in captions], dtype=torch.bfloat16)
        return {"hidden_states": torch.stack([letters, letters.sqrt()], dim=-1), "mask": (letters > 0).long(), "pooled": pooled}


def encoded_images(data: TrainingData, *, to_disk: bool = True, identity: str = "vae 1", **options) -> int:
    """Fill the cache of latents, and say how many images were encoded."""
    vae = Vae()
    fill_latents(data, vae, identity=identity, to_disk=to_disk, batch_size=2, **options)
    return vae.images


def encoded_captions(data: TrainingData, *, to_disk: bool = True, identity: str = "te 1", **options) -> list[str]:
    """Fill the cache of text, and say which captions were encoded."""
    encoder = TextEncoder()
    fill_text(data, encoder, identity=identity, to_disk=to_disk, batch_size=2, **options)
    return encoder.captions


def entries(folder: Path, kind: str) -> list[Path]:
    """The entries of a kind for the images of a folder."""
    return sorted((folder / ".hadron_cache").glob(f"{kind}-*.safetensors"))
