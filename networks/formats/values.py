"""The tensors of one layer as tools store them, made ours: alphas, magnitudes, and what cannot be meant is refused by key."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.core.tensor_file import is_finite
from networks.formats.keys import MAGNITUDE
from networks.layers import LayerShape

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
RANKS = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # the first size of the first of these is the rank


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """The tensors of a layer by our names of the parameters, with the keys of the file and what PEFT says beside it."""

    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]
    scale: float | None = None  # what PEFT multiplies the delta by, where its configuration is known
    is_peft: bool = False

    def canonical(self, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors as our algorithms read them. Raises `ValueError` naming every key that is wrong."""
        problems = [problem for name, tensor in self.tensors.items() if (problem := self._problem(name, tensor))]
        if problems:
            raise ValueError("; ".join(problems))
        tensors = {name: tensor.float() if tensor.itemsize < 2 else tensor for name, tensor in self.tensors.items()}
        if MAGNITUDE in tensors:
            if "dora_scale" in tensors:
                raise ValueError(f"{self.keys[MAGNITUDE]}: magnitudes a second time, beside {self.keys['dora_scale']}")
            tensors["dora_scale"] = self._magnitudes(tensors.pop(MAGNITUDE), LayerShape.of(layer))
        if self.is_peft and isinstance(layer, nn.Conv1d) and "lokr_w2" in tensors:
            raise ValueError(
                f"{self.keys['lokr_w2']}: PEFT mixes up the indices of a whole second factor of Conv1d, which no LoKr can mean"
            )
        return self._scaled(tensors) if self.scale is not None and "alpha" not in tensors else tensors

    def _problem(self, name: str, tensor: Tensor) -> str | None:
        if name == "alpha":  # whether it must be finite depends on the algorithm
            is_number = tensor.numel() == 1 and tensor.dtype is not torch.bool and not tensor.is_complex()
            return None if is_number else f"{self.keys[name]}: {tensor.dtype} of shape {list(tensor.shape)}; one number was expected"
        if tensor.dtype not in DTYPES:
            return f"{self.keys[name]}: numbers of {str(tensor.dtype).removeprefix('torch.')}; an adapter has floating point ones"
        if 0 in tensor.shape:
            return f"{self.keys[name]}: empty, of shape {list(tensor.shape)}"
        return None if is_finite(tensor) else f"{self.keys[name]}: holds values that are not finite"

    def _magnitudes(self, magnitude: Tensor, shape: LayerShape) -> Tensor:
        """(out, 1, ...): PEFT and ai-toolkit have a magnitude for each output, stored as (out,) or (1, out, 1, 1)."""
        if magnitude.numel() != shape.out:
            raise ValueError(f"{self.keys[MAGNITUDE]}: {magnitude.numel()} magnitudes for a layer with {shape.out} outputs")
        return magnitude.reshape(shape.out, 1, *(1 for _ in shape.kernel))

    def _scaled(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With PEFT's scale as an alpha; where both factors of a LoKr are whole, which have no alpha, in the first factor."""
        assert self.scale is not None
        factor = next((tensors[name] for name in RANKS if name in tensors), None)
        if factor is not None:
            rank = factor.shape[0] if factor.dim() else 1
            return tensors | {"alpha": torch.tensor(self.scale * rank)}
        if "lokr_w1" in tensors and self.scale != 1:
            return tensors | {"lokr_w1": tensors["lokr_w1"].float() * self.scale}
        return tensors
