"""Colour augmentation: a small change of hue or brightness, drawn for each use of an image."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

CHANGED = 0.33  # share of the uses that are changed; of these, half get another hue and half another gamma
MOST_DEGREES = 16.0  # 8 of the 180 steps that OpenCV has for the hue
MOST_GAMMA = 0.05  # away from 1


@dataclass(frozen=True, slots=True)
class ColorChange:
    """A change of an image's colours: its hue turned by `degrees`, its brightness by the exponent `gamma`."""

    degrees: float = 0.0
    gamma: float = 1.0

    def applied(self, pixels: np.ndarray) -> np.ndarray:
        """The changed pixels; both are (height, width, 3) uint8."""
        if self.degrees:
            pixels = _turned(pixels, self.degrees)
        if self.gamma != 1.0:
            curve = np.rint((np.arange(256) / 255.0) ** self.gamma * 255.0).astype(np.uint8)
            pixels = curve[pixels]
        return pixels


def drawn_color(draw: random.Random) -> ColorChange | None:
    """The change of one use, None for most: the same as `color_aug` of sd-scripts, which has it from albumentations."""
    if draw.random() >= CHANGED:
        return None
    if draw.random() < 0.5:
        return ColorChange(degrees=draw.uniform(-MOST_DEGREES, MOST_DEGREES))
    return ColorChange(gamma=draw.uniform(1.0 - MOST_GAMMA, 1.0 + MOST_GAMMA))


def _turned(pixels: np.ndarray, degrees: float) -> np.ndarray:
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    steps = round(degrees * 256 / 360)
    hue = hue.point([(step + steps) % 256 for step in range(256)])
    return np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))
