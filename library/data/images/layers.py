"""The layers of an image: 8-bit RGB colours, and transparency where there is some, from every mode that files have."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from library.data.images.profiles import in_srgb

_ORIENTATION = 0x0112  # EXIF tag; see CIPA DC-008, section 4.6.4
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Layers(NamedTuple):
    """An upright image: its colours as stored (mode RGB), and what of them is seen (mode L, 255 is all), None for all."""

    rgb: Image.Image
    alpha: Image.Image | None

    def on_white(self) -> Image.Image:
        """The image without transparency (mode RGB): laid on white."""
        if self.alpha is None:
            return self.rgb
        layer = self.rgb.copy()
        layer.putalpha(self.alpha)
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")

    def seen_red(self) -> Image.Image:
        """The red channel (mode L) laid on black, which is how an image is a mask."""
        red = self.rgb.getchannel("R")
        return red if self.alpha is None else Image.composite(red, Image.new("L", red.size), self.alpha)


def layers_of(image: Image.Image, path: Path, *, as_srgb: bool = True) -> Layers:
    """The layers of an opened image: upright, in sRGB by its colour profile unless its numbers are wanted. `path` is for warnings."""
    turn = _UPRIGHT.get(orientation(image))
    image.load()
    colors, alpha = _colors_and_alpha(image)
    rgb = in_srgb(colors, image.info.get("icc_profile") if as_srgb else None, path)
    return Layers(rgb, alpha) if turn is None else Layers(rgb.transpose(turn), alpha and alpha.transpose(turn))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as shown."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none; read without decoding, which PNG's own `getexif` would do."""
    found = Image.Image.getexif(image).get(_ORIENTATION)
    return found if isinstance(found, int) else 1


def _colors_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours of mode L, RGB or CMYK, and transparency of mode L."""
    is_grey = image.mode in ("1", "L", "LA")
    if image.mode.startswith("I"):
        return _colors_and_alpha_of_16_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return layer.getchannel("R") if is_grey else layer.convert("RGB"), layer.getchannel("A")
    if image.mode == "CMYK":
        return image, None
    return image.convert("L" if is_grey else "RGB"), None


def _colors_and_alpha_of_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Greys of 16 bits as 8 bits, which Pillow's own conversion would clip at 255."""
    stored = np.asarray(image)
    grey = Image.fromarray(np.rint(stored.astype(np.float32) / 257.0).clip(0, 255).astype(np.uint8))
    unseen = image.info.get("transparency")
    return grey, None if unseen is None else Image.fromarray(np.where(stored == unseen, 0, 255).astype(np.uint8))
