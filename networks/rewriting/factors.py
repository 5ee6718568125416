"""The canonical tensors of a layer as the factors that `networks.rewriting.algebra` works on, and factors as canonical tensors.

Canonical names and shapes: docs/adapters.md and the algorithms' own files. Read factors are float32 or better, without the scale; a
learned scalar must have been folded in (`Adapter.file_tensors`). Tucker cores are multiplied into flat factors of the same rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from networks.layers import LayerShape
from networks.rewriting.algebra import LowRank, flat_tucker

Tensors = Mapping[str, Tensor]


def read_lora(tensors: Tensors, shape: LayerShape) -> LowRank:
    """up @ down of a LoRA's tensors."""
    up, down = (wide(tensors[key]).flatten(1) for key in ("lora_up.weight", "lora_down.weight"))
    if "lora_mid.weight" in tensors:
        return flat_tucker(wide(tensors["lora_mid.weight"]), up.mT, down)
    return LowRank(up, with_kernel(down, shape))


def read_loha(tensors: Tensors, shape: LayerShape) -> tuple[LowRank, LowRank]:
    """The two products of a LoHa's tensors."""
    first, second = (_half_of_loha(tensors, number, shape) for number in ("1", "2"))
    return first, second


def read_lokr(tensors: Tensors, shape: LayerShape) -> tuple[Tensor | LowRank, Tensor | LowRank]:
    """w1 and w2 of a LoKr's tensors, each as a product where it is stored as one."""
    w1 = wide(tensors["lokr_w1"]) if "lokr_w1" in tensors else LowRank(wide(tensors["lokr_w1_a"]), wide(tensors["lokr_w1_b"]))
    if "lokr_w2" in tensors:
        return w1, with_kernel(wide(tensors["lokr_w2"]), shape)
    left, right = wide(tensors["lokr_w2_a"]), wide(tensors["lokr_w2_b"])
    if "lokr_t2" in tensors:
        return w1, flat_tucker(wide(tensors["lokr_t2"]), left, right)
    return w1, LowRank(left, with_kernel(right, shape))


def write_lora(product: LowRank, scale: float = 1.0) -> dict[str, Tensor]:
    """A LoRA of scale * up @ down; its alpha is scale * rank."""
    ones = (1,) * (product.down.dim() - 2)
    return {
        "lora_down.weight": product.down,
        "lora_up.weight": product.up.reshape(*product.up.shape, *ones),
        "alpha": _alpha(scale * product.rank),
    }


def write_loha(first: LowRank, second: LowRank, scale: float = 1.0) -> dict[str, Tensor]:
    """A LoHa of scale * first * second, which have the same rank; its alpha is scale * rank."""
    return {
        "hada_w1_a": first.up,
        "hada_w1_b": first.down.flatten(1),
        "hada_w2_a": second.up,
        "hada_w2_b": second.down.flatten(1),
        "alpha": _alpha(scale * first.rank),
    }


def write_lokr(w1: Tensor | LowRank, w2: Tensor | LowRank, scale: float = 1.0) -> dict[str, Tensor]:
    """A LoKr of scale * w1 (x) w2. Where both are whole no reader applies a scale: it is multiplied into w1, and alpha is a rank."""
    if isinstance(w1, Tensor) and isinstance(w2, Tensor):
        return {"lokr_w1": w1 * scale, "lokr_w2": w2, "alpha": _alpha(max(w2.shape[:2]))}
    tensors: dict[str, Tensor] = {}
    rank = 0
    for name, factor in (("lokr_w1", w1), ("lokr_w2", w2)):
        if isinstance(factor, LowRank):
            tensors |= {f"{name}_a": factor.up, f"{name}_b": factor.down.flatten(1)}
            rank = factor.rank  # w2's, where both have one
        else:
            tensors[name] = factor
    return tensors | {"alpha": _alpha(scale * rank)}


def parameters(tensors: Tensors) -> int:
    """How many numbers a layer's tensors hold, alpha not counted."""
    return sum(tensor.numel() for name, tensor in tensors.items() if name != "alpha")


def wide(tensor: Tensor) -> Tensor:
    """A detached tensor in at least float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def with_kernel(matrix: Tensor, shape: LayerShape) -> Tensor:
    """A factor whose columns are inner channels and kernel, however flattened, as (rows, channels, *kernel)."""
    return matrix.reshape(matrix.shape[0], -1, *shape.kernel)


def _half_of_loha(tensors: Tensors, number: str, shape: LayerShape) -> LowRank:
    left, right = (wide(tensors[f"hada_w{number}_{side}"]).flatten(1) for side in "ab")
    if f"hada_t{number}" in tensors:
        return flat_tucker(wide(tensors[f"hada_t{number}"]), left, right)
    return LowRank(left, with_kernel(right, shape))


def _alpha(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
