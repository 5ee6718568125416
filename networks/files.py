"""Adapter files: tensors with metadata and hashes, written in safetensors only; old pickles and PEFT folders are read too."""

import hashlib
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.core.log import get_logger
from library.core.tensor_file import is_finite, listing, load_tensors, read_header, starts_as_pickle
from library.core.tensor_pack import Packed, pack
from networks.formats.peft_config import METADATA, PeftConfig, read_config, read_metadata

logger = get_logger(__name__)

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
CONFIG, TENSORS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
SINGLE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # diffusers
COMPONENTS = ("unet", "transformer", "text_conditioner", "text_encoder", "text_encoder_2")
WRAPPER = "base_model.model."
NESTED = ("state_dict", "model")  # under which some pickles hold the tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFile:
    """What a file or folder holds: tensors by key, string metadata, and PEFT's configurations by the component they are of."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, PeftConfig] = field(default_factory=dict)  # of the whole file under ""
    path: Path | None = None


def read_adapter_file(path: Path | str) -> AdapterFile:
    """Read a safetensors file, a pickle of tensors (weights-only), or a folder as PEFT and diffusers write them.

    A folder holds `adapter_config.json` and `adapter_model.safetensors` or `.bin`, or one such folder a component (`unet`,
    `text_encoder`, ...), or `pytorch_lora_weights.safetensors`. Raises `ValueError` naming the file where it is missing, broken or empty.
    """
    path = Path(path)
    file = _read_folder(path) if path.is_dir() else _read_single(path)
    if not file.tensors:
        raise ValueError(f"{path}: holds no tensors")
    return file


def save_adapter_file(
    path: Path | str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write an adapter file atomically: tensors in `dtype` (their own for None), alphas always float32, hashes added to the metadata.

    Raises `ValueError` for a path that is not .safetensors or cannot be written; values that are not finite are warned of.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: adapters are written as .safetensors only; use --save_model_as safetensors")
    packed = pack(tensors, lambda key, tensor: torch.float32 if key.endswith(".alpha") else dtype or tensor.dtype)
    broken = [key for key, tensor in packed.tensors().items() if not is_finite(tensor)]
    if broken:
        logger.warning("%s: %d tensors hold values that are not finite: %s", path, len(broken), listing(broken))
    described = {key: str(value) for key, value in (metadata or {}).items()}
    packed.write(path, {**described, **hashes(packed, described)})


def hashes(packed: Packed, metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash`, SHA-256 of the bytes after the header, and `sshs_legacy_hash`, 8 hex digits over 64 KiB at 1 MiB.

    Both are of a file that carries only the `ss_` entries, so that editing a title keeps them (sd-scripts' convention).
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    legacy = hashlib.sha256(packed.part(kept, 0x100000, 0x110000)).hexdigest()[:8]
    return {"sshs_model_hash": packed.body_sha256(), "sshs_legacy_hash": legacy}


# Reading


def _read_single(path: Path) -> AdapterFile:
    if path.is_file() and path.suffix.lower() in PICKLES and _is_pickle(path):
        return AdapterFile(tensors=_unpickled(path), path=path)
    header = read_header(path)
    config = read_metadata(header.metadata[METADATA], f"{path}: {METADATA}") if METADATA in header.metadata else {}
    return AdapterFile(tensors=load_tensors(path, header=header), metadata=header.metadata, config=config, path=path)


def _read_folder(folder: Path) -> AdapterFile:
    """The file of a folder, or the files of its components, whose keys then begin with the component."""
    if (folder / CONFIG).is_file():
        return _read_peft(folder)
    single = next((folder / name for name in SINGLE if (folder / name).is_file()), None)
    if single is not None:
        return _read_single(single)
    found = {name: _read_peft(folder / name) for name in COMPONENTS if (folder / name / CONFIG).is_file()}
    if not found:
        raise ValueError(f"{folder}: a folder without {CONFIG} (PEFT) and without {SINGLE[0]} (diffusers)")
    tensors = {f"{name}.{key.removeprefix(WRAPPER)}": tensor for name, file in found.items() for key, tensor in file.tensors.items()}
    return AdapterFile(tensors=tensors, config={name: file.config[""] for name, file in found.items()}, path=folder)


def _read_peft(folder: Path) -> AdapterFile:
    where = folder / CONFIG
    try:
        config = read_config(where.read_text(encoding="utf-8"), str(where))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text") from error
    path = next((folder / name for name in TENSORS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: has {CONFIG}, but neither {' nor '.join(TENSORS)}")
    file = _read_single(path)
    return AdapterFile(tensors=file.tensors, metadata=file.metadata, config={"": config}, path=folder)


# Pickles


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return starts_as_pickle(file.read(9))


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, which runs no code: anything but tensors and plain containers is refused."""
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated storage classes
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a broken stream leads it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not read: a pickle that is broken or holds more than tensors ({reason:.200})") from error
    tensors = _unnested(content)
    foreign = [repr(key) for key, value in tensors.items() if not isinstance(key, str) or not _is_plain(value)]
    if foreign:
        raise ValueError(f"{path}: not an adapter: a pickle with entries that are not plain tensors: {listing(foreign)}")
    return {key: value.detach().contiguous() for key, value in tensors.items()}


def _check_archive(path: Path) -> None:
    """Raises `ValueError` for an archive that unpacks to more than it is: PyTorch packs nothing."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path}: a broken archive ({error})") from error
        if size > path.stat().st_size:
            raise ValueError(f"{path}: an archive of {path.stat().st_size} bytes that would unpack to {size}")


def _unnested(content: Any) -> dict[Any, Any]:
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    return content if isinstance(content, dict) else {"": content}


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor that is as large as its storage says: strides may claim a terabyte of one number."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
