"""Adapter files: tensors with metadata and hashes, in safetensors only."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from library.core.log import get_logger
from library.core.tensor_file import listing, load_tensors, save_tensors

logger = get_logger(__name__)


def read_adapter_file(path: Path | str) -> dict[str, Tensor]:
    """The tensors of an adapter file. Raises `ValueError` naming the file where it is missing, broken or empty."""
    tensors = load_tensors(path)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return tensors


def save_adapter_file(
    path: Path | str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write an adapter file atomically: tensors in `dtype` (their own for None), alphas always float32, hashes added to the metadata.

    Raises `ValueError` for a path that is not .safetensors or cannot be written; values that are not finite are warned of.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: adapters are written as .safetensors only; use --save_model_as safetensors")
    ready = {key: _cast(key, tensor, dtype) for key, tensor in tensors.items()}
    broken = [key for key, tensor in ready.items() if not torch.isfinite(tensor).all()]
    if broken:
        logger.warning("%s: %d tensors hold values that are not finite: %s", path, len(broken), listing(broken))
    described = {key: str(value) for key, value in (metadata or {}).items()}
    save_tensors(path, ready, {**described, **hashes(ready, described)})


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash`, SHA-256 of the bytes after the header, and `sshs_legacy_hash`, 8 hex digits over 64 KiB at 1 MiB.

    Both are of a file that carries only the `ss_` entries, so that editing a title keeps them (sd-scripts' convention).
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = memoryview(safetensors.torch.save(dict(tensors), metadata=kept))
    body = 8 + int.from_bytes(content[:8], "little")
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(content[body:]).hexdigest(), "sshs_legacy_hash": legacy}


def _cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = torch.float32 if key.endswith(".alpha") else dtype or tensor.dtype
    return tensor.detach().to("cpu", wanted).contiguous()
