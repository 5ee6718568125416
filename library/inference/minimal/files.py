"""The files of the minimal scripts: pictures and latents under names that are never used twice, and latents read back."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from PIL import Image
from torch import Tensor

from library.core.tensor_file import is_finite, load_tensors, read_header, save_tensors
from library.inference.images import free_path, save_png
from library.models.architecture import Architecture

LATENT = "latent"  # the name of the tensor in a file, (1, channels, 1 frame, height/8, width/8) as sd-scripts writes it
LATENT_KEYS = {
    "seed": "seeds", "prompt": "prompt", "height": "height", "width": "width", "steps": "infer_steps", "scale": "guidance_scale",
    "negative-prompt": "negative_prompt", "flow-shift": "flow_shift", "sampler": "sampler", "networks": "networks",
}  # fmt: skip
"""A picture's parameters by their names in a PNG -> their names in a file of latents."""


class PictureFolder:
    """A folder of `<date>-<time>_<seed>.png` and `<date>-<time>_<seed>_latent.safetensors`."""

    def __init__(self, path: Path, *, with_metadata: bool) -> None:
        self._path, self._with_metadata = path, with_metadata

    def save_image(self, image: Image.Image, parameters: Mapping[str, str], ending: str = "") -> Path:
        """Write a PNG with its parameters as text entries; `ending` stands at the end of its name."""
        path = self._free(parameters, f"{ending}.png")
        save_png(image, path, parameters if self._with_metadata else {})
        return path

    def save_latents(self, latents: Tensor, parameters: Mapping[str, str]) -> Path:
        """Write latents (channels, height, width) with their parameters as metadata."""
        path = self._free(parameters, "_latent.safetensors")
        metadata = {LATENT_KEYS[name]: value for name, value in parameters.items() if name in LATENT_KEYS}
        save_tensors(path, {LATENT: latents[None, :, None]}, metadata if self._with_metadata else None)
        return path

    def _free(self, parameters: Mapping[str, str], suffix: str) -> Path:
        stem = f"{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3] + f"_{parameters.get('seed', 'unknown')}"
        return free_path(self._path, stem, suffix)


def read_latents(path: Path, arch: Architecture) -> tuple[Tensor, dict[str, str]]:
    """Latents (channels, height, width) in float32, and the parameters that made them as far as the file says.

    Raises `ValueError` for a file that is broken, or holds no latents of one picture that the family can decode.
    """
    header = read_header(path)
    if LATENT not in header.tensors:
        raise ValueError(f"{path}: not a file of latents: it has no tensor '{LATENT}'")
    shape = header.tensors[LATENT].shape
    *others, channels, height, width = _without_frame(shape, arch.latent_channels)
    if channels != arch.latent_channels or any(size != 1 for size in others) or not height * width:
        wanted = f"(1, {arch.latent_channels}, 1, height/{arch.pixels_per_latent}, width/{arch.pixels_per_latent})"
        raise ValueError(f"{path}: latents of shape {shape} are not one picture of {arch.title}, which is {wanted}")
    latents = load_tensors(path, [LATENT], header=header)[LATENT].reshape(channels, height, width).float()
    if not is_finite(latents):
        raise ValueError(f"{path}: its latents are not finite")
    return latents, {name: header.metadata[key] for name, key in LATENT_KEYS.items() if key in header.metadata}


def _without_frame(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """The shape without the axis of a single frame before height and width; of at least three axes."""
    if len(shape) > 3 and shape[-3] == 1 and shape[-4] == channels:
        shape = shape[:-3] + shape[-2:]
    return (0,) * (3 - len(shape)) + shape
