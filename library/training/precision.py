"""Precision and memory of a run: dtypes of base weights, fp8 storage, checkpointing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from library.core.devices import dtype_named, fp8_refusal
from library.core.options import option
from library.training.block_swap import swap_refusal


@dataclass(kw_only=True, frozen=True)
class PrecisionOptions:
    """Precision and memory."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", help="dtype of the frozen models and of autocast; adapters stay fp32")
    fp8_base: bool = option(False, help="keep the denoiser's matrix weights as float8_e4m3fn; needs mixed precision")
    gradient_checkpointing: bool = option(False, help="recompute activations in the backward pass: less memory, more time")
    blocks_to_swap: int = option(
        0, help="blocks of the denoiser that wait in main memory and visit the GPU one by one: less memory, more time"
    )
    highvram: bool = option(False, help="keep the VAE and text encoders on the device when they are no longer needed")
    sdpa: bool = option(False, help="attention through torch's scaled_dot_product_attention; always on, accepted for sd-scripts' commands")

    def check(self) -> Iterable[str]:
        """What is wrong: fp8 weights without an autocast dtype to compute in."""
        if self.fp8_base and self.mixed_precision == "no":
            yield "--fp8_base: fp8 weights are only stored; computing needs --mixed_precision bf16 or fp16"
        if self.blocks_to_swap < 0:
            yield f"--blocks_to_swap {self.blocks_to_swap}: must not be negative"

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the frozen models."""
        return dtype_named(self.mixed_precision)


def refuse_what_the_device_cannot(options: PrecisionOptions, device: torch.device) -> None:
    """Raise `ValueError` for precision options that this device cannot fulfil."""
    if options.fp8_base and (reason := fp8_refusal(device)):
        raise ValueError(f"--fp8_base: {reason}; leave it out or use a device that can")
    if options.blocks_to_swap and (reason := swap_refusal(device)):
        raise ValueError(f"--blocks_to_swap: {reason}; leave it out")
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16: training in fp16 needs a GPU (no loss scaling on a CPU); use bf16 or no")


def checkpoint_gradients(denoiser: Any, trained_text_encoders: Iterable[Any]) -> None:
    """Turn on gradient checkpointing in the models' own way (diffusers, transformers)."""
    denoiser.enable_gradient_checkpointing()
    for encoder in trained_text_encoders:
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable  # its older name
        enable({"use_reentrant": False})
        encoder.train()  # transformers checkpoint in training mode only; CLIP and Qwen have no dropout that this would turn on
