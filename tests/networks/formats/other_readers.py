"""What ComfyUI and sd-scripts make of a layer's tensors, restated from what they are documented to do, faults included."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from networks.lokr import factorise


def comfyui(weight: Tensor, tensors: Mapping[str, Tensor], strength: float = 1.0) -> Tensor:
    """The weight that ComfyUI computes with. Raises `RuntimeError` where it fails."""
    if "diff" in tensors:
        return weight + strength * tensors["diff"]
    if "lora_up.weight" in tensors:
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        assert "lora_mid.weight" not in tensors
        delta, rank = up.flatten(1) @ down.flatten(1), down.shape[0]
    elif "hada_w1_a" in tensors:
        assert "hada_t1" not in tensors
        delta = torch.mm(tensors["hada_w1_a"], tensors["hada_w1_b"]) * torch.mm(tensors["hada_w2_a"], tensors["hada_w2_b"])
        rank = tensors["hada_w1_b"].shape[0]
    else:
        delta, rank = _comfyui_lokr(tensors)
    scale = float(tensors["alpha"]) / rank if rank is not None and "alpha" in tensors else 1.0
    delta = delta.reshape(weight.shape) * scale
    if "dora_scale" not in tensors:
        return weight + strength * delta
    magnitude, changed = tensors["dora_scale"], weight + delta
    if magnitude.shape[0] == weight.shape[0]:  # over the outputs: the norm is that of the base
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in weight.shape[1:]))
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in weight.shape[2:]))
    return weight + strength * (changed * (magnitude / (norm + torch.finfo(weight.dtype).eps)) - weight)


def _comfyui_lokr(tensors: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    assert "lokr_t2" not in tensors  # fails on its strides
    rank = None
    w1, w2 = tensors.get("lokr_w1"), tensors.get("lokr_w2")
    if w1 is None:
        rank, w1 = tensors["lokr_w1_b"].shape[0], tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if w2 is None:
        rank, w2 = tensors["lokr_w2_b"].shape[0], tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    if w2.dim() == 4:  # of Conv2d only
        w1 = w1.unsqueeze(2).unsqueeze(2)
    return torch.kron(w1, w2), rank


def sd_scripts(layer: Any, tensors: Mapping[str, Tensor], factor: int = -1, use_tucker: bool = False) -> Tensor:
    """The change of the weight in sd-scripts. Raises `AssertionError` where shapes are not those of its modules."""
    out, inner, *kernel = layer.weight.shape
    is_flat = all(side == 1 for side in kernel)
    alpha = float(tensors["alpha"])
    if "lora_up.weight" in tensors:
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        assert set(tensors) == {"lora_down.weight", "lora_up.weight", "alpha"} and up.dim() == len(kernel) + 2
        return (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape) * alpha / down.shape[0]
    tucker = use_tucker and not is_flat
    if "hada_w1_a" in tensors:
        assert ("hada_t1" in tensors) == tucker
        halves = [_product(tensors, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2)]
        return (halves[0] * halves[1]).reshape(layer.weight.shape) * alpha / tensors["hada_w1_b"].shape[0]
    (a, c), (b, d) = factorise(out, factor), factorise(inner, factor)
    w1, w2 = tensors["lokr_w1"], tensors.get("lokr_w2")
    assert tuple(w1.shape) == (a, b)
    rank = max(w2.shape[:2]) if w2 is not None else tensors["lokr_w2_b"].shape[0]
    assert (rank >= max(c, d) / 2) == (w2 is not None)
    scale = 1.0
    if w2 is None:
        assert ("lokr_t2" in tensors) == tucker
        scale, w2 = alpha / rank, _product(tensors, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    else:
        assert tuple(w2.shape) == ((c, d) if is_flat else (c, d, *kernel))
    w1 = w1.reshape(a, b, *(1 for _ in w2.shape[2:]))
    return torch.kron(w1, w2.contiguous()).reshape(layer.weight.shape) * scale


def _product(tensors: Mapping[str, Tensor], left: str, right: str, core: str) -> Tensor:
    if core not in tensors:
        return tensors[left] @ tensors[right]
    return torch.einsum("ij...,ip,jr->pr...", tensors[core], tensors[left], tensors[right])
