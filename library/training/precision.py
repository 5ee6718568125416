"""Precision of a run: dtypes of base weights and adapters, and how the denoiser's weights are stored."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal

import torch
from torch import nn

from library.core.devices import dtype_named, fp8_refusal
from library.core.fp8 import store_as_fp8
from library.core.log import get_logger
from library.core.options import option
from library.core.quantised import FormName, pack_layers, refusal
from library.core.rules import Rule

logger = get_logger(__name__)


@dataclass(kw_only=True, frozen=True)
class PrecisionOptions:
    """Precision."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", help="dtype of the frozen models and of autocast; adapters stay fp32")
    full_bf16: bool = option(False, help="adapters and their gradients in bf16, rounded stochastically after each step")
    fp8_base: bool = option(False, help="keep the denoiser's matrix weights as float8_e4m3fn; needs mixed precision")
    fp8_base_unet: bool = option(False, help="the same as --fp8_base: text encoders are never kept in fp8")
    fp8_scaled: bool = option(False, help="keep the denoiser's large weights as float8_e4m3fn with a scale for each output channel")
    quantize_base: Literal["int8", "nf4"] | None = option(None, help="keep the denoiser's large weights in 8 or 4 bits")
    sdpa: bool = option(False, help="attention through torch's scaled_dot_product_attention; always on, accepted for sd-scripts' commands")
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(option="fp8_base_unet", when=lambda v: v["fp8_base"] and v["fp8_base_unet"], because="--fp8_base means the same"),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: fp8 weights without an autocast dtype to compute in, two ways to store weights, bf16 adapters elsewhere."""
        name = "--fp8_base" if self.fp8_base else "--fp8_base_unet"
        if self.storage == "fp8" and self.mixed_precision == "no":
            yield f"{name}: fp8 weights are only stored; computing needs --mixed_precision bf16 or fp16"
        if self.quantize_base and (self.fp8_base or self.fp8_base_unet or self.fp8_scaled):
            given = "--fp8_scaled" if self.fp8_scaled else name
            yield f"--quantize_base {self.quantize_base} and {given} exclude each other: both say how the denoiser's weights are kept"
        if self.full_bf16 and self.mixed_precision != "bf16":
            yield f"--full_bf16: needs --mixed_precision bf16, not {self.mixed_precision}"

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the frozen models."""
        return dtype_named(self.mixed_precision)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The dtype of what is trained."""
        return torch.bfloat16 if self.full_bf16 else torch.float32

    @property
    def storage(self) -> Literal["fp8"] | FormName | None:
        """How the denoiser's weights are kept, where it is not in `weight_dtype`."""
        if self.quantize_base is not None:
            return self.quantize_base
        return "fp8_scaled" if self.fp8_scaled else "fp8" if self.fp8_base or self.fp8_base_unet else None

    @property
    def storage_option(self) -> str:
        """The option that asks for `storage`, as it was given."""
        plain = "--fp8_base" if self.fp8_base or not self.fp8_base_unet else "--fp8_base_unet"
        return {"fp8": plain, "fp8_scaled": "--fp8_scaled"}.get(self.storage or "", f"--quantize_base {self.quantize_base}")


def refuse_what_the_device_cannot(options: PrecisionOptions, device: torch.device) -> None:
    """Raise `ValueError` for precision options that this device cannot fulfil."""
    if options.storage == "fp8" and (reason := fp8_refusal(device)):
        raise ValueError(f"{options.storage_option}: {reason}; leave it out or use a device that can")
    if options.storage in ("fp8_scaled", "int8", "nf4") and (reason := refusal(options.storage, device)):
        raise ValueError(f"{options.storage_option}: {reason}; leave it out or use a device that can")
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16: training in fp16 needs a GPU (no loss scaling on a CPU); use bf16 or no")


def store_base(denoiser: nn.Module, options: PrecisionOptions, device: torch.device) -> None:
    """Keep the denoiser's weights as the options say, and log how many layers and bytes that concerns.

    To be called after `--base_weights` are merged, for packed weights take no merge, and before the network is made: DoRA measures the
    weights that it will train on. Packing is computed on `device`; the weights stay where they are.
    """
    form = options.storage
    if form is None:
        return
    before = weight_bytes(denoiser)
    if form == "fp8":
        layers, what = store_as_fp8(denoiser), "stored as float8_e4m3fn"
    else:
        layers, what = pack_layers(denoiser, form, device), f"packed as {form}"
    after = weight_bytes(denoiser)
    logger.info(
        "%s: the weights of %d layers of the denoiser are %s; it takes %s instead of %s", form, layers, what, _gb(after), _gb(before)
    )


def narrow_adapters(network: nn.Module, options: PrecisionOptions) -> None:
    """Let a new network's parameters, and so their gradients, be in bf16 where `--full_bf16` asks for it; they stay the same objects."""
    if options.full_bf16:
        network.to(torch.bfloat16)


def weight_bytes(model: nn.Module) -> int:
    """What a model's parameters and buffers take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))


def _gb(count: int) -> str:
    return f"{count / 2**30:.2f} GB"
