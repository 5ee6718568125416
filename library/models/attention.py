"""How a denoiser attends: `--attn_mode` and `--split_attn`, for every family whose layers are diffusers' `Attention`.

The kernels of other packages are theirs; the processor here projects, and normalises and rotates where a layer does, for all of them
alike, in the layout (batch, tokens, heads, width of a head). It never needs a mask: the denoisers attend to padded text too.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.core.options import option
from library.core.rules import Rule
from library.core.spelling import unknown

AttentionMode = Literal["torch", "sdpa", "flash", "sageattn", "xformers"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries, keys and values (batch, tokens, heads, width), giving the shape of the queries."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Where the kernel of a mode comes from, and what it cannot do."""

    build: Callable[[], Attend]
    module: str = ""  # empty for torch's own
    package: str = ""  # what to install
    trains: bool = True  # whether it has a backward pass
    is_half_only: bool = False


SDPA_IN_VAIN = Rule(
    option="sdpa",
    when=lambda v: v["sdpa"] and (v["xformers"] or v["attn_mode"] not in (None, "torch", "sdpa")),
    because="another attention is chosen (--attn_mode, --xformers)",
)


@dataclass(kw_only=True, frozen=True)
class AttentionOptions:
    """Attention of the denoiser."""

    attn_mode: AttentionMode | None = option(
        None, help="attention of the denoiser: torch and sdpa are torch's own; the others are packages"
    )
    split_attn: bool = option(False, help="compute attention one sample at a time: less memory with some back-ends")


@dataclass(kw_only=True, frozen=True)
class TrainingAttention(AttentionOptions):
    """Attention of the denoiser in training; a family's `ModelOptions` inherit it."""

    xformers: bool = option(False, help="the same as --attn_mode xformers")

    @property
    def attention(self) -> AttentionMode:
        """The mode that holds."""
        return self.attn_mode or ("xformers" if self.xformers else "torch")

    def attention_problems(self) -> Iterable[str]:
        """What is wrong: two modes, a kernel that cannot train, a package that is not installed."""
        if self.xformers and self.attn_mode not in (None, "xformers"):
            yield f"--xformers and --attn_mode {self.attn_mode} exclude each other"
        if not BACKENDS[self.attention].trains:
            yield no_backward_pass(self.attention)
        elif (problem := missing_package(self.attention)) is not None:
            yield problem


def set_attention(denoiser: nn.Module, mode: str, split: bool = False, *, trains: bool = False) -> None:
    """Make every attention of the denoiser run `mode`; with `split`, one sample of the batch at a time.

    Raises `ValueError` for an unknown mode, a package that is not installed, and a kernel without backward pass where the model `trains`.
    """
    if mode not in BACKENDS:
        raise ValueError(f"--attn_mode: {unknown(mode, BACKENDS, 'attention mode')}")
    backend = BACKENDS[mode]
    if trains and not backend.trains:
        raise ValueError(no_backward_pass(mode))
    try:
        attend = backend.build()
    except ImportError as error:
        raise ValueError(f"--attn_mode {mode}: needs the package {backend.package} (pip install {backend.package}): {error}") from error
    if backend.package:
        attend = _checked(attend, mode, backend)
    processor = Processor(_one_by_one(attend) if split else attend)
    for layer in cast(list[Any], list(denoiser.modules())):
        if hasattr(layer, "set_processor") and hasattr(layer, "norm_q"):  # diffusers' `Attention`; others need masks and stay with torch
            layer.set_processor(processor)


def no_backward_pass(mode: str) -> str:
    """What is wrong with training through a mode that has no backward pass."""
    return f"--attn_mode {mode}: it has no backward pass, so nothing can be trained through it; {_others(True)}"


def missing_package(mode: str) -> str | None:
    """What is wrong with a mode whose package is not installed; None where it is, and for an unknown mode."""
    backend = BACKENDS.get(mode)
    if backend is None or not backend.module or backend.module in sys.modules or importlib.util.find_spec(backend.module) is not None:
        return None
    return f"--attn_mode {mode}: needs the package {backend.package} (pip install {backend.package})"


def kernel_problem(mode: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a mode's kernel from running on a device, or in the dtype of its products; None where nothing does."""
    backend = BACKENDS[mode]
    if backend.module and device.type != "cuda":
        return f"--attn_mode {mode}: {backend.package} runs on CUDA only, not on {device}; {_others(True)}"
    if backend.is_half_only and dtype not in (torch.float16, torch.bfloat16):
        return f"--attn_mode {mode}: {backend.package} computes in bf16 or fp16 only, not in {dtype}"
    return None


def refuse_attention(model_options: object, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` for an attention that cannot train on this device and in this dtype: before anything is loaded."""
    if isinstance(model_options, TrainingAttention):
        problem = kernel_problem(model_options.attention, device, dtype)
        if problem is not None:
            raise ValueError(problem)


class Processor:
    """What diffusers' `Attention` calls: projections, norms and rotation around a kernel."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(batch, tokens, width) of queries from `hidden_states`, and keys and values from `encoder_hidden_states` where given."""
        assert attention_mask is None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = _heads(attn, attn.to_q(hidden_states)), _heads(attn, attn.to_k(source))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        value = _heads(attn, attn.to_v(source))
        if image_rotary_emb is not None:
            cos, sin = (table.unsqueeze(1) for table in image_rotary_emb)
            query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        output = self.attend(query.to(value.dtype), key.to(value.dtype), value)
        return attn.to_out[0](output.flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (batch, tokens, heads, width), in the precision of `cos` and `sin` (tokens, 1, width); dtype of `x`."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin).to(x.dtype)


# Kernels


def _torch() -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

    return attend


def _flash() -> Attend:
    return importlib.import_module("flash_attn").flash_attn_func


def _sage() -> Attend:
    kernel = importlib.import_module("sageattention").sageattn
    return lambda query, key, value: kernel(query, key, value, tensor_layout="NHD")


def _xformers() -> Attend:
    return importlib.import_module("xformers.ops").memory_efficient_attention


BACKENDS: dict[str, Backend] = {
    "torch": Backend(build=_torch),
    "sdpa": Backend(build=_torch),
    "flash": Backend(build=_flash, module="flash_attn", package="flash-attn", is_half_only=True),
    "sageattn": Backend(build=_sage, module="sageattention", package="sageattention", trains=False, is_half_only=True),
    "xformers": Backend(build=_xformers, module="xformers", package="xformers"),
}


def _checked(attend: Attend, mode: str, backend: Backend) -> Attend:
    """A kernel that says what it cannot do instead of failing inside, or giving no gradient."""

    def checked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if (problem := kernel_problem(mode, query.device, value.dtype)) is not None:
            raise ValueError(problem)
        if not backend.trains and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise ValueError(f"--attn_mode {mode}: {backend.package} has no backward pass; {_others(True)}")
        return attend(query, key, value)

    return checked


def _one_by_one(attend: Attend) -> Attend:
    def split(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([attend(*part) for part in parts])

    return split


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1))


def _others(trains: bool) -> str:
    return f"there are: {', '.join(mode for mode, backend in BACKENDS.items() if backend.trains or not trains)}"
