"""A throw-away family: a denoiser of two Linears over 2x2 pixels and a sum of letters as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.core.options import option
from library.data.batch import Sizes, TextStates
from library.diffusion.ddpm import DDPMOptions, DDPMProcess
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture, Models, Tokens
from library.models.minute.names import MinuteNaming  # pyright: ignore[reportMissingImports]

LETTERS, WIDTH, CHANNELS = 16, 8, 3


class Mixer(nn.Module):
    """The denoiser: each pixel, its text and its time through two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(CHANNELS + WIDTH + 1, 16), nn.Linear(16, CHANNELS)

    def forward(self, x: Tensor, times: Tensor, text: Tensor) -> Tensor:
        beside = torch.cat([text, times[:, None].float() / 1000], dim=1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.outer(functional.silu(self.inner(torch.cat([x, beside], dim=1).movedim(1, -1)))).movedim(-1, 1)


class Words(nn.Module):
    """The text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.project = nn.Embedding(256, LETTERS), nn.Linear(LETTERS, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.letters(ids).mean(dim=1))


class Halves(nn.Module):
    """The VAE: means of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


@dataclass(kw_only=True, frozen=True)
class ModelOptions:
    """The seed that stands for a checkpoint."""

    model_seed: int = option(0, help="seed of the weights")


@dataclass(kw_only=True, frozen=True)
class GenerationFiles:
    """The same."""

    model_seed: int = option(0, help="seed of the weights")

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def model_options(self) -> ModelOptions:
        """The options as training names them."""
        return ModelOptions(model_seed=self.model_seed)


class Minute(MinuteNaming, Architecture):
    """All that a family must answer."""

    base_model_version: ClassVar[str] = "minute"
    modelspec_architecture: ClassVar[str] = "minute"
    modelspec_implementation: ClassVar[str] = "none"
    latent_channels: ClassVar[int] = CHANNELS
    pixels_per_latent: ClassVar[int] = 2
    resolution_step: ClassVar[int] = 2
    default_resolution: ClassVar[int] = 8
    text_keys: ClassVar[tuple[str, ...]] = ("states",)
    ModelOptions: ClassVar[type] = ModelOptions
    NoiseOptions: ClassVar[type] = DDPMOptions
    GenerationFiles: ClassVar[type] = GenerationFiles

    def load(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Models:
        torch.manual_seed(options.model_seed)
        models = [module.to(device, dtype).eval().requires_grad_(False) for module in (Mixer(), Words(), Halves())]
        return Models(denoiser=models[0], text_encoders=[models[1]], tokenizers=[None], vae=models[2])

    def noise_process(self, options: Any = None, model_options: Any = None) -> NoiseProcess:
        return DDPMProcess(options)

    def encode_images(self, vae: nn.Module, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        return functional.avg_pool2d(pixels, 2)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return functional.interpolate(latents, scale_factor=2).clamp(-1, 1)

    def tokenize(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> Tokens:
        return {"ids": torch.tensor([list(caption.encode("utf-8")[:LETTERS].ljust(LETTERS)) for caption in captions])}

    def overlong(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> list[int]:
        return [max(0, len(caption.encode("utf-8")) - LETTERS) for caption in captions]

    def encode_text(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> TextStates:
        return {"states": text_encoders[0](tokens["ids"])}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: TextStates, sizes: Sizes) -> Tensor:
        return denoiser(noisy, timesteps, text["states"])

    def latents_identity(self, options: Any) -> str:
        return f"minute {options.model_seed}"

    def text_identity(self, options: Any) -> str:
        return f"minute {options.model_seed}"

    def metadata(self, options: Any) -> dict[str, str]:
        return {"ss_base_model_version": self.base_model_version}


ARCHITECTURE = Minute()
