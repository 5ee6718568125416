"""Runs of the minimal script on a tiny random Anima, for the tests beside this file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from library.inference.minimal.script import main
from library.models.architecture import architecture_named
from networks import loha, lokr, lora

ANIMA = architecture_named("anima")
MODULES: dict[str, Any] = {"lora": lora, "loha": loha, "lokr": lokr}


@dataclass(frozen=True)
class Run:
    """A model, and the folder of the files that it draws."""

    files: Any
    folder: Path

    def __call__(self, *extra: str, folder: str = "out") -> list[Path]:
        """Draw at 32x48 in two steps; returns the files."""
        drawing = [] if "--latent_path" in extra else ["--image_size", "48", "32", "--infer_steps", "2", "--seed", "1"]
        return main("anima", [*self.models(), "--save_path", str(self.folder / folder), "--device", "cpu", *drawing, *extra])

    def models(self) -> list[str]:
        """The options that name the model's files."""
        return ["--dit", str(self.files.dit), "--text_encoder", str(self.files.qwen3), "--vae", str(self.files.vae)]


def write_adapter(files: Any, path: Path, algorithm: str, *, with_text: bool = True) -> Path:
    """An adapter file with a large random delta of the denoiser and, `with_text`, of the text encoder."""
    options = ANIMA.ModelOptions(pretrained_model_name_or_path=str(files.dit), qwen3=str(files.qwen3), vae=str(files.vae))
    models = ANIMA.load(options, device=torch.device("cpu"), dtype=torch.float32)
    encoders = models.text_encoders if with_text else []
    network = MODULES[algorithm].create_network(1.0, 2, 2.0, None, encoders, models.denoiser)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    network.save_weights(path)
    return path


def levels(path: Path) -> torch.Tensor:
    """The pixels of a picture as whole numbers."""
    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def distance(first: Path, second: Path) -> int:
    """The largest difference of two pictures' pixels."""
    return int((levels(first) - levels(second)).abs().max())
