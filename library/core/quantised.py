"""Frozen weights in 8 or 4 bits, unpacked for each use: `--fp8_scaled` and `--quantize_base`.

    form        codes            scales                                     bytes a weight
    fp8_scaled  float8_e4m3fn    largest value of a row / 448, float32      1
    int8        int8             largest value of a row / 127, float32      1
    nf4         4 bits           largest value of 64 weights, float32       0.5625

A row is what makes one output channel. NF4 is the code of Dettmers et al. 2023 ("QLoRA"), packed and unpacked by bitsandbytes; int8 is
packed by bitsandbytes. Products are computed in the dtype of the input or of autocast, as if the layer held the unpacked weight; the
backward pass unpacks it again, so nothing but the codes is kept.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.core.devices import autocast_dtype

FormName = Literal["fp8_scaled", "int8", "nf4"]
FP8_LARGEST = 448.0
INT8_LARGEST = 127.0
NF4_BLOCK = 64
SMALLEST = 2**18
"""Weights with fewer elements stay as they are: all together they are little, and a model's first and last layers are among them."""


def pack_layers(model: nn.Module, form: FormName, device: torch.device | None = None, *, smallest: int = SMALLEST) -> int:
    """Put packed layers in the place of a model's large Linear and Conv2d layers, whose names stay; returns how many layers.

    Weights are packed on `device`, one after another, and stay where they were. Raises `ImportError` where the library is missing.
    """
    packed: dict[int, Packed] = {}
    for parent, name, layer in list(packable(model, smallest)):
        if id(layer) not in packed:  # a layer may stand in two places
            packed[id(layer)] = PackedConv2d(layer, form, device) if isinstance(layer, nn.Conv2d) else PackedLinear(layer, form, device)
        setattr(parent, name, packed[id(layer)])
    return len(packed)


def packable(model: nn.Module, smallest: int = SMALLEST) -> Iterator[tuple[nn.Module, str, Any]]:
    """The layers that `pack_layers` packs, each with its parent and its name there."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if _is_understood(layer) and cast(Any, layer).weight.numel() >= smallest:
                yield parent, name, layer


def packed_bytes(form: FormName, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of this shape when it is packed."""
    count = math.prod(shape)
    return -(-count // 2) + 4 * -(-count // NF4_BLOCK) if form == "nf4" else count + 4 * shape[0]


def refusal(form: FormName, device: torch.device) -> str | None:
    """Why weights cannot be packed like this on a device, or None where they can (tried, not guessed)."""
    try:
        codes, scales = _pack(torch.ones(2, NF4_BLOCK, device=device), form)
        Layout(form=form, shape=(2, NF4_BLOCK)).unpack(codes, scales, torch.bfloat16)
    except (ImportError, RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        return f"weights cannot be packed on the device {device} ({str(error).strip().splitlines()[0]})"
    return None


@dataclass(frozen=True)
class Layout:
    """What the codes of a layer mean, and how its weight is applied: all of it constant."""

    form: FormName
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()  # of convolutions, as all that follows
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: products of codes and scales in float32, rounded once."""
        if self.form != "nf4":
            return codes.to(dtype).mul_(scales).view(self.shape)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        wide = dtype if dtype.itemsize <= 4 else torch.float32
        row = torch.Size((1, math.prod(self.shape)))  # not the weight's own shape: on CPUs rows of odd length take another, slow way
        state = QuantState(scales, shape=row, dtype=wide, blocksize=NF4_BLOCK, quant_type="nf4")
        return dequantize_4bit(codes, state).to(dtype).view(self.shape)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        if not self.stride:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, grad: Tensor, weight: Tensor, x_shape: tuple[int, ...]) -> Tensor:
        """The gradient of the layer's input."""
        if not self.stride:
            return grad @ weight
        slide = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        x = grad.new_empty(1).expand(x_shape)  # asked for its sizes only
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *slide, (True, False, False))[0]


class _Product(torch.autograd.Function):
    """A layer's output from packed weights, of which the backward pass needs the codes only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.layout, ctx.x_shape = layout, x.shape
        with _as_given(x):
            return layout.apply(x, layout.unpack(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        codes, scales = ctx.saved_tensors
        with _as_given(grad):
            return ctx.layout.input_gradient(grad, ctx.layout.unpack(codes, scales, grad.dtype), ctx.x_shape), None, None, None, None


class Packed(nn.Module):
    """A layer whose frozen weight is packed. `dense_weight()` is what it stands for."""

    weight: Any  # the codes, a parameter
    scales: Tensor  # float32, whatever the model is cast to
    layout: Layout
    bias: Any

    def _take(self, layer: Any, form: FormName, device: torch.device | None, **convolution: Any) -> None:
        weight = layer.weight.detach()
        codes, scales = _pack(weight.to(device or weight.device), form)
        self.layout = Layout(form, tuple(weight.shape), **convolution)
        self.weight = nn.Parameter(codes.to(weight.device), requires_grad=False)
        self.register_buffer("scales", scales.to(weight.device))
        self.bias = layer.bias
        self.keeps_dtype = bool(getattr(layer, "keeps_dtype", False))

    def forward(self, input: Tensor) -> Tensor:  # torch's layers name it so, and callers may
        """The output in autocast's dtype or the input's."""
        is_cast = not (self.keeps_dtype or input.dtype == torch.float64)
        dtype = (autocast_dtype(input.device) if is_cast else None) or input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return cast(Tensor, _Product.apply(input.to(dtype), bias, self.weight, self.scales, self.layout))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in plain floats."""
        return self.layout.unpack(self.weight.detach(), self.scales, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "Packed":
        """`.to(...)`, `.half()`, `.cuda()`: codes and scales follow the device and keep their dtypes."""
        codes, scales = self.weight.data, self.scales
        super()._apply(fn, recurse)
        self.weight.data, self.scales = codes.to(self.weight.device), scales.to(self.scales.device)
        return self


class PackedLinear(Packed, nn.Linear):
    """A Linear of packed weights."""

    def __init__(self, layer: nn.Linear, form: FormName, device: torch.device | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._take(layer, form, device)


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution of packed weights, whose padding is of zeros."""

    def __init__(self, layer: nn.Conv2d, form: FormName, device: torch.device | None = None) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(layer, name))
        slide = {name: tuple(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
        self._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
        self._take(layer, form, device, **slide, groups=layer.groups)


# Codes and scales


def _pack(weight: Tensor, form: FormName) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a weight (out, ...)."""
    rows = weight.flatten(1)
    if form == "fp8_scaled":
        scales = (rows.float().abs().amax(1, keepdim=True) / FP8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        return (rows / scales).to(torch.float8_e4m3fn), scales
    if form == "int8":
        from bitsandbytes.functional import int8_vectorwise_quant

        half = rows.to(torch.float16) if rows.is_cuda else rows.float()  # its kernel for GPUs takes float16 only
        codes, largest, _ = int8_vectorwise_quant(half.contiguous())
        return codes, largest.float().unsqueeze(1) / INT8_LARGEST
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return codes, state.absmax


def _is_understood(layer: nn.Module) -> bool:
    """Whether a layer's output is its weight's product and its bias, in its input's dtype or in autocast's."""
    if isinstance(layer, nn.Conv2d):
        return type(layer).forward is nn.Conv2d.forward and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear) and (type(layer).forward is nn.Linear.forward or getattr(layer, "keeps_dtype", False))


def _as_given(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False)
