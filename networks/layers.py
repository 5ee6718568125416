"""The layers an adapter can change, seen as one kind: a weight (out, inner, *kernel) and how it is applied."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What an adapter knows of its layer: the shape of the weight and, for convolutions, how it slides."""

    out: int
    inner: int  # input features, or input channels of one group
    kernel: tuple[int, ...] = ()  # empty for Linear
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: str | tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    edges: tuple[int, ...] = ()  # F.pad's form of the padding, for padding modes other than zeros

    @classmethod
    def of(cls, layer: nn.Module) -> "LayerShape":
        """The shape of a Linear or Conv1d/2d/3d layer or a subclass. Raises `ValueError` for any other module."""
        if isinstance(layer, nn.Linear):  # from its attributes: the weight of a quantised layer may be packed
            return cls(out=layer.out_features, inner=layer.in_features)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return cls(
                out=layer.out_channels,
                inner=layer.in_channels // layer.groups,
                kernel=tuple(layer.kernel_size),
                groups=layer.groups,
                stride=tuple(layer.stride),
                padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
                dilation=tuple(layer.dilation),
                padding_mode=layer.padding_mode,
                edges=tuple(layer._reversed_padding_repeated_twice),
            )
        raise ValueError(f"a {type(layer).__name__} has no adapter; Linear and Conv layers have")

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the layer's weight."""
        return (self.out, self.inner, *self.kernel)

    @property
    def fan_in(self) -> int:
        """The columns of the weight as a matrix: inner times the kernel's positions."""
        return self.inner * math.prod(self.kernel)

    @property
    def is_pointwise(self) -> bool:
        """Whether the layer sees one position at a time: Linear, or a convolution with kernel 1."""
        return math.prod(self.kernel) == 1

    @property
    def ungrouped(self) -> "LayerShape":
        """The same slide in one group."""
        return self if self.groups == 1 else replace(self, groups=1)

    @property
    def channel(self) -> int:
        """The dimension of features or channels in inputs and outputs, from the end."""
        return -1 - len(self.kernel)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` through `weight` (any rows, the layer's inner and kernel), sliding as the layer does."""
        if not self.kernel:
            return F.linear(x, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.edges, mode=self.padding_mode), 0
        return CONVOLUTIONS[len(self.kernel)](x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def mix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The channels of `x` mixed by `matrix` (rows, channels) at every position."""
        if not self.kernel:
            return F.linear(x, matrix)
        return CONVOLUTIONS[len(self.kernel)](x, self._pointwise(matrix))

    def padded(self, x: Tensor) -> tuple[Tensor, "LayerShape"]:
        """`x` padded where the layer pads by anything but a number of zeros on both sides, and the shape that remains to slide."""
        if not self.kernel or (self.padding_mode == "zeros" and not isinstance(self.padding, str)):
            return x, self
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self.edges, mode=mode), replace(self, padding=(0,) * len(self.kernel), padding_mode="zeros")

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, *, needs_x: bool = True, needs_weight: bool = True) -> tuple[Any, Any]:
        """Gradients of `apply(x, weight)` for a batch, as `padded` leaves a shape: of `x` and of `weight`, None where not needed."""
        return self._slid_back(grad, x, weight, self.stride, self.padding, self.dilation, self.groups, needs_x, needs_weight)

    def mix_gradients(self, grad: Tensor, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `mix(x, matrix)` for convolutions: of `x`, and of `matrix` in its shape."""
        ones = (1,) * len(self.kernel)
        grad_x, grad_matrix = self._slid_back(grad, x, self._pointwise(matrix), ones, (0,) * len(ones), ones, 1, True, True)
        return grad_x, grad_matrix.view(matrix.shape)

    def _pointwise(self, matrix: Tensor) -> Tensor:
        """A matrix as the weight of a 1x1 convolution."""
        return matrix.reshape(*matrix.shape[:2], *(1 for _ in self.kernel))

    def _slid_back(
        self, grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, *needs: bool
    ) -> Any:
        no_shift = (0,) * len(self.kernel)  # output_padding, of transposed convolutions only
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, no_shift, groups, (*needs, False)
        )
        return found[:2]

    def along_channels(self, values: Tensor, x: Tensor) -> Tensor:
        """`values` (channels,) or (batch, channels), shaped to multiply the channels of `x` (batch, ..., channels, *positions)."""
        shape = [1] * x.dim()
        shape[self.channel] = values.shape[-1]
        if values.dim() == 2:
            shape[0] = values.shape[0]
        return values.reshape(shape)

    def batch_of(self, x: Tensor) -> tuple[int, ...]:
        """(batch,) of an input, or () where it has no batch dimension."""
        return (x.shape[0],) if x.dim() > -self.channel else ()


def fold_core(core: Tensor, inner: Tensor) -> Tensor:
    """A Tucker core (r, r, *kernel) and its input factor (r, inner) as one flat factor (r, inner * kernel) of the same rank.

    sum_n core[m, n, k] inner[n, i]: the second axis of the core belongs to the input side, as LyCORIS has it.
    """
    with torch.autocast(core.device.type, enabled=False):  # a product of parameters: small, and rounded once with the result
        return torch.einsum("mnk,ni->mik", core.reshape(*core.shape[:2], -1), inner.flatten(1)).flatten(1)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer in plain floats, whatever it is packed in (by the layer's own `dense_weight()`, torchao, quanto, bitsandbytes).

    Raises `ValueError` where it cannot be unpacked or is not loaded (meta).
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        raise ValueError(f"the weights of this {type(layer).__name__} are not loaded")
    if unpacks_itself(layer):
        return layer.dense_weight()  # pyright: ignore[reportCallIssue]
    if is_plain(weight):
        return weight.detach()
    quant_state = getattr(weight, "quant_state", None)  # bitsandbytes' 4 bits
    if quant_state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, quant_state)
    scales = getattr(weight, "SCB", None)
    scales = getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales
    if weight.dtype == torch.int8 and scales is not None:
        return weight.data.float() * (scales.float().unsqueeze(1) / 127)  # bitsandbytes' LLM.int8(): every row scaled to +-127
    if type(weight.data) is not Tensor and hasattr(weight, "dequantize"):
        return weight.dequantize()
    raise ValueError(f"the weight of this {type(layer).__name__} is packed in a way that is not understood ({weight.dtype})")


def unpacks_itself(layer: nn.Module) -> bool:
    """Whether a layer holds a packed weight that only it understands, as those of `library.core.quantised` do."""
    return hasattr(layer, "dense_weight")


def is_plain(weight: Tensor) -> bool:
    """Whether a weight holds its own floats, of any width, rather than a packed form of them."""
    return type(weight.data) is Tensor and weight.is_floating_point()


def is_product(layer: nn.Module) -> bool:
    """Whether a layer's forward is torch's own for a Linear or a convolution, and not that of a subclass."""
    kind = type(layer)
    if kind.forward is nn.Linear.forward:
        return True
    return any(
        kind.forward is own.forward and kind._conv_forward is own._conv_forward  # pyright: ignore[reportAttributeAccessIssue]
        for own in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )


def fitted(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """`tensor` in `shape`, where only the writing differs: (r, i*k*k) or (r, i, k, k), with or without trailing ones.

    Raises `ValueError` naming both shapes otherwise.
    """
    if tensor.numel() == 1 == math.prod(shape):
        return tensor.reshape(shape)
    is_flat = min(tensor.dim(), len(shape)) < 3  # else every dimension has its place, but for those of size 1
    is_same = is_flat or [side for side in tensor.shape if side > 1] == [side for side in shape if side > 1]
    if tensor.dim() == 0 or tensor.shape[0] != shape[0] or tensor.numel() != math.prod(shape) or not is_same:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}; {list(shape)} was expected")
    return tensor.reshape(shape)
