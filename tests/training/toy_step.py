"""A family of one linear layer and one adapter: everything a step touches, small enough to compute by hand."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import networks
from library.data.batch import Batch, Sizes, TextStates
from library.diffusion.ddpm import DDPMProcess
from library.diffusion.loss import LossOptions
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture
from library.training.model import TrainingModel
from library.training.step import StepContext

CHANNELS, SIDE = 4, 6


class ToyFamily:
    """The answers that a training model asks of a family; it keeps every noisy input and timestep that its denoiser was given."""

    text_keys = ("states",)

    def __init__(self, checkpoints: bool = False) -> None:
        self.checkpoints = checkpoints
        self.seen: list[tuple[Tensor, Tensor]] = []

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: TextStates, sizes: Sizes) -> Tensor:
        """The layer over the channels, plus the text."""
        self.seen += zip(noisy, timesteps, strict=True)
        x = noisy.movedim(1, -1) + text["states"][:, None, None]
        y = checkpoint(denoiser, x, use_reentrant=False) if self.checkpoints else denoiser(x)
        assert isinstance(y, Tensor)
        return y.movedim(-1, 1)

    def encode_images(self, vae: nn.Module, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Every eighth pixel."""
        return pixels[:, :1, ::8, ::8].repeat(1, CHANNELS, 1, 1)


def toy_context(process: NoiseProcess | None = None, *, checkpoints: bool = False, seed: int = 5) -> StepContext:
    """A context whose network does something: its adapter is no longer at zero."""
    torch.manual_seed(0)
    denoiser = nn.Sequential(nn.Linear(CHANNELS, CHANNELS)).requires_grad_(False)
    network = networks.create_network(denoiser, "lora", rank=2, target_modules=["0"])
    network.attach()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    family = cast(Architecture, ToyFamily(checkpoints))
    return StepContext(
        arch=family, process=process or DDPMProcess(), model=TrainingModel(family, denoiser, [], network, trains_text_encoders=False),
        vae=None, tokenizers=[], model_options=None, loss=LossOptions(), seed=seed, device=torch.device("cpu"),
    )  # fmt: skip


def toy_batch(uses: Sequence[tuple[int, int]], *, epoch: int = 0, position: int = 0, **others: Any) -> Batch:
    """A batch of uses (image, repeat); latents and text are a function of the image."""
    generators = [torch.Generator().manual_seed(image) for image, _ in uses]
    latents = torch.stack([torch.randn(CHANNELS, SIDE, SIDE, generator=generator) for generator in generators])
    pairs = torch.zeros(len(uses), 2, dtype=torch.int64)
    return Batch(
        images=[f"{image}.png" for image, _ in uses], captions=[""] * len(uses), sizes=Sizes(original=pairs, crop=pairs, target=pairs),
        loss_weights=torch.ones(len(uses)), draws=list(uses), latents=latents,
        text={"states": torch.tensor([[0.1 * image] * CHANNELS for image, _ in uses])}, epoch=epoch, position=position, **others,
    )  # fmt: skip


def seen_by(context: StepContext) -> list[tuple[Tensor, Tensor]]:
    """Noisy latents and timestep of every sample that the denoiser was given so far."""
    return cast(ToyFamily, context.arch).seen
