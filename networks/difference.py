"""Differences stored whole: `diff` and `diff_b` of a weight and a bias, `w_norm` and `b_norm` of a norm's (LyCORIS' names).

They are read, applied, merged and saved, not trained. A layer is linear in its weight and bias together, so that the change of its
output is the layer's own output with the differences in their place; that holds for norms as for matrices.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from networks.base import Adapter
from networks.kernels.products import Base
from networks.layers import LayerShape
from networks.stack import ATTRIBUTE

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
WEIGHTS, BIASES = ("diff", "w_norm"), ("diff_b", "b_norm")


@dataclass(frozen=True, kw_only=True)
class NormShape(LayerShape):
    """The shape of a norm: one weight a channel."""

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.out,)


class Difference(Adapter):
    """The change of a weight, of a bias, or of both, element by element."""

    title = "difference"
    signature = (*WEIGHTS, *BIASES)
    boosted = ()
    folds_into = ()
    is_algorithm: ClassVar[bool] = False

    def __init__(self, name: str, layer: nn.Module, *, weight: str | None, bias: str | None) -> None:
        """`weight` and `bias` are the names under which a file has them, None for what it does not change."""
        super().__init__(name, layer, rank=1, alpha=1)
        self.register_buffer("alpha", torch.ones(()), persistent=False)  # no file has it
        self._weight, self._bias = weight, bias
        if weight is not None:
            self.register_parameter(weight, nn.Parameter(torch.empty(self.shape.weight)))
        if bias is not None:
            self.register_parameter(bias, nn.Parameter(torch.empty(self.shape.out)))

    @classmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "Difference":
        weights = [key for key in WEIGHTS if key in tensors]
        biases = [key for key in BIASES if key in tensors]
        if len(weights) > 1 or len(biases) > 1 or not weights + biases:
            raise ValueError(f"{name}: holds {', '.join(weights + biases) or 'nothing'}; one difference of a weight or a bias was expected")
        if biases and getattr(layer, "bias", None) is None:
            raise ValueError(f"{name}.{biases[0]}: changes a bias, and its layer has none")
        adapter = cls(name, layer, weight=weights[0] if weights else None, bias=biases[0] if biases else None)
        adapter.load(tensors)
        return adapter

    @classmethod
    def designed(cls, name: str, layer: nn.Module, rank: int, alpha: float, arguments: Any) -> "Difference":
        """Raises `ValueError`: differences come from files."""
        raise ValueError("a difference is not trained; choose LoRA, LoHa or LoKr")

    def initialise(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def shape_of(layer: nn.Module) -> LayerShape:
        """The shape of a Linear, a Conv or a norm with one weight a channel. Raises `ValueError` for others."""
        weight = getattr(layer, "weight", None)
        is_norm = isinstance(layer, NORMS) or type(layer).__name__.endswith("RMSNorm")
        if is_norm and isinstance(weight, Tensor) and weight.dim() == 1:
            return NormShape(out=weight.shape[0], inner=1)
        return LayerShape.of(layer)

    def formula(self) -> Tensor:
        if self._weight is not None:
            return self.wide(self.get_parameter(self._weight))
        return torch.zeros(self.shape.weight, device=self.alpha.device)

    def delta_bias(self) -> Tensor | None:
        return None if self._bias is None else self.wide(self.get_parameter(self._bias))

    @property
    def is_direct(self) -> bool:
        return False  # a bias is no product, and a norm none either

    def delta(self, x: Tensor, base: Base | None = None) -> Tensor:
        weight, bias = self.formula().to(x.dtype), self.delta_bias()
        if isinstance(self.shape, NormShape):
            return self._run(x, weight, None if bias is None else bias.to(x.dtype))
        y = self.shape.apply(x, weight)
        return self.onto(base, x, y if bias is None else y + self.shape.along_channels(bias.to(x.dtype), y))

    def forward(self, x: Tensor, output: Tensor | None = None) -> Tensor:
        """The change of the output for `x`; dropouts do not act on it, for it is not trained."""
        return self.delta(x if torch.is_autocast_enabled(x.device.type) else x.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def stored_alpha(self, alpha: Tensor | None) -> float:
        return 1.0

    @torch.no_grad()
    def shrink(self, ratio: float) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own computation with this weight and bias, past any adapters of the layer."""
        twin = copy.copy(self.layer)
        twin.__dict__ = {key: value for key, value in self.layer.__dict__.items() if key not in ("forward", ATTRIBUTE)}
        names = self.layer._parameters
        twin._parameters = {**names, "weight": nn.Parameter(weight), **({"bias": bias} if "bias" in names else {})}  # pyright: ignore[reportAttributeAccessIssue]
        return twin(x)
