"""The denoisers whose training step is timed, with random weights: SDXL's and Anima's classes at full size, and smaller ones for a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.models.anima.configuration import TRANSFORMER_FACTS, TRANSFORMER_SIZE
from library.models.sdxl.outline import UNET_SIZE

SMALL_UNET = UNET_SIZE | {
    "block_out_channels": (128, 256, 512),
    "transformer_layers_per_block": (1, 1, 3),
    "attention_head_dim": (2, 4, 8),
    "cross_attention_dim": 1024,
}
SMALL_TRANSFORMER = TRANSFORMER_SIZE | {"num_attention_heads": 8, "num_layers": 6, "adaln_lora_dim": 128}
TINY_UNET = UNET_SIZE | {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 1, 1),
    "cross_attention_dim": 64,
}
Call = Callable[[nn.Module, Tensor], Tensor]


@dataclass(kw_only=True)
class Subject:
    """A frozen denoiser with its noisy latents and what it should predict; `call` runs it or a copy of it on latents."""

    title: str
    denoiser: nn.Module
    latents: Tensor  # requires a gradient, so that backward goes through the whole model even if it is frozen
    target: Tensor
    call: Call

    def loss(self, denoiser: nn.Module) -> Tensor:
        """The mean squared error of a prediction."""
        return nn.functional.mse_loss(self.call(denoiser, self.latents).float(), self.target)


def unet_subject(config: dict[str, Any], side: int, batch: int, device: str, dtype: torch.dtype) -> Subject:
    """SDXL's U-Net on latents of `side` x `side`."""
    from diffusers import UNet2DConditionModel

    denoiser = _random(lambda: UNet2DConditionModel(**config), device, dtype)
    latents, target = _latents((batch, 4, side, side), device, dtype)
    sizes = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    text = _numbers((batch, 77, config["cross_attention_dim"]), device, dtype)
    added = {"text_embeds": _numbers((batch, sizes), device, dtype), "time_ids": torch.zeros(batch, 6, device=device, dtype=dtype)}
    steps = torch.full((batch,), 500, device=device)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, steps, text, added_cond_kwargs=added).sample

    return Subject(title=_title("SDXL", denoiser, side, batch), denoiser=denoiser, latents=latents, target=target, call=call)


def transformer_subject(config: dict[str, Any], side: int, batch: int, device: str, dtype: torch.dtype) -> Subject:
    """Anima's diffusion transformer on latents of `side` x `side`, with 512 tokens of text at full size."""
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    denoiser = _random(lambda: CosmosTransformer3DModel(**TRANSFORMER_FACTS, **config), device, dtype)
    latents, target = _latents((batch, config["in_channels"], 1, side, side), device, dtype)
    text = _numbers((batch, 4 * side if side < 128 else 512, config["text_embed_dim"]), device, dtype)
    time = torch.full((batch,), 0.5, device=device, dtype=dtype)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, time, text, return_dict=False)[0]

    wanted = target[:, : config["out_channels"]]
    return Subject(title=_title("Anima", denoiser, side, batch), denoiser=denoiser, latents=latents, target=wanted, call=call)


SUBJECTS: dict[str, dict[str, Callable[[int, str, torch.dtype], Subject]]] = {
    "full": {
        "SDXL": lambda batch, device, dtype: unet_subject(UNET_SIZE, 128, batch, device, dtype),
        "Anima": lambda batch, device, dtype: transformer_subject(TRANSFORMER_SIZE, 128, batch, device, dtype),
    },
    "small": {
        "SDXL": lambda batch, device, dtype: unet_subject(SMALL_UNET, 64, batch, device, dtype),
        "Anima": lambda batch, device, dtype: transformer_subject(SMALL_TRANSFORMER, 48, batch, device, dtype),
    },
    "tiny": {
        "SDXL": lambda batch, device, dtype: unet_subject(TINY_UNET, 8, batch, device, dtype),
    },
}
"""Size -> family -> subject for a batch, a device and a dtype; `tiny` is for tests."""


def _random(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = make().to(dtype)
    return model.requires_grad_(False).train()


def _latents(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _numbers(shape, device, dtype).requires_grad_(), _numbers(shape, device, torch.float32, seed=1)


def _numbers(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _title(family: str, denoiser: nn.Module, side: int, batch: int) -> str:
    count = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    return f"{family}, {count:.0f} M parameters, latents {side} x {side}, batch {batch}"
