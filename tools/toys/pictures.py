"""Captioned toy pictures, drawn from a seed, and the reader that says what a picture shows.

A picture is one shape of one colour and texture on a plain background. The toy models are trained on such pictures; the reader measures
whether a generated picture shows what its caption says.
The new look (`NEW_LOOK_WORD`, a magenta background) is not part of the base models' data: it is what a demo teaches them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 30),
    "green": (30, 160, 65),
    "cyan": (0, 190, 200),
    "blue": (35, 75, 225),
    "purple": (135, 40, 185),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "black": (6, 6, 6),
    "gray": (128, 128, 128),
    "pink": (255, 180, 205),
    "sky": (165, 210, 255),
    "mint": (175, 242, 195),
}
TEXTURES = ("plain", "striped", "dotted")
NEW_LOOK_WORD = "glimmen"
GROUNDS = BACKGROUNDS | {NEW_LOOK_WORD: (230, 40, 150)}
"""Every background that can be drawn and read; the base models know the first six."""

_GRID = 64  # every length below is in pixels of a 64x64 picture
_SHADE = 0.45  # stripes and dots are the colour, darkened
_SHADES = (1.2, 1.0, 0.86, 0.72, 0.58, _SHADE)  # how bright a colour may come; blurred textures lie between 1 and _SHADE
_INSET = 10  # what lies outside is not read: a border may be blurred

# The reader's confidence: below these it says nothing. Distances are between RGB colours in 0..255.
_NEAR_BACKGROUND, _NEAR_LOOK, _NEAR_COLOUR = 55.0, 85.0, 60.0  # the look is far from every other ground
_CLEAR = 38.0  # how far from the background a pixel of the shape is at least
_MIN_AREA, _MAX_AREA = 0.08, 0.72  # of the part that is read
_MIN_OVERLAP, _MIN_LEAD = 0.72, 0.03  # intersection over union of the best shape, and its lead before the second


@dataclass(kw_only=True, frozen=True)
class Picture:
    """What a picture shows, in the words of its caption."""

    shape: str
    colour: str
    texture: str
    background: str


@dataclass(kw_only=True, frozen=True)
class Reading:
    """What the reader sees; None where it is not sure."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    background: str | None = None


def random_picture(rng: np.random.Generator) -> Picture:
    """A picture chosen evenly among all that can be drawn."""
    return Picture(shape=_pick(rng, SHAPES), colour=_pick(rng, COLOURS), texture=_pick(rng, TEXTURES), background=_pick(rng, BACKGROUNDS))


def all_pictures() -> list[Picture]:
    """Every picture that can be drawn, in a fixed order."""
    return [Picture(shape=s, colour=c, texture=t, background=b) for s in SHAPES for c in COLOURS for t in TEXTURES for b in BACKGROUNDS]


def with_new_look(picture: Picture) -> Picture:
    """The same picture on the background of the new look."""
    return replace(picture, background=NEW_LOOK_WORD)


def caption(picture: Picture) -> str:
    """The caption, for example "a striped red circle on a mint background"; the plain texture is not named."""
    texture = "" if picture.texture == "plain" else f"{picture.texture} "
    return f"{_article(texture or picture.colour)} {texture}{picture.colour} {picture.shape} on a {picture.background} background"


def draw(picture: Picture, size: int = _GRID, seed: int = 0) -> Image.Image:
    """Draw the picture, smooth-edged; the seed moves and scales the shape a little."""
    rng = np.random.default_rng(seed)
    x, y = _pixel_centres(size)
    centre = _GRID / 2 + rng.uniform(-4, 4, size=2)
    radius = rng.uniform(15, 19)
    inside = _coverage(SHAPES[picture.shape](x - centre[0], y - centre[1], radius), size)
    dark = _texture(picture.texture, x, y, size)
    colour = np.asarray(COLOURS[picture.colour], float) * (1 - (1 - _SHADE) * dark[..., None])
    image = _blend(np.asarray(GROUNDS[picture.background], float), colour, inside)
    return Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8))


def frame(image: Array, width: float, colour: tuple[int, int, int], line: float = 0) -> Array:
    """The image (height, width, 3) with a frame at its border and a white line inside the frame; lengths for a 64x64 picture."""
    size = image.shape[0]
    x, y = _pixel_centres(size)
    depth = np.minimum(np.minimum(x, _GRID - x), np.minimum(y, _GRID - y))
    lined = _blend(image, np.asarray((255.0, 255.0, 255.0)), _coverage(depth - width - line, size))
    return _blend(lined, np.asarray(colour, float), _coverage(depth - width, size))


def read(image: Image.Image) -> Reading:
    """Say what a picture shows, by its pixels alone: nearest colours, and the shape whose silhouette overlaps best."""
    pixels = _inner_pixels(image)
    background, ground = _read_background(pixels)
    if background is None:
        return Reading()
    inside = _separate(pixels, ground)
    if not _MIN_AREA < inside.mean() < _MAX_AREA:
        return Reading()
    shape = _read_shape(inside)
    colour = _read_colour(pixels, inside)
    texture = _read_texture(pixels, inside, colour) if shape and colour else None
    return Reading(shape=shape, colour=colour, texture=texture, background=background)


def has_new_look(image: Image.Image) -> bool:
    """Whether the picture has the new look: its background is nearer to the look's than to any other, and near enough."""
    return _read_background(_inner_pixels(image))[0] == NEW_LOOK_WORD


# ---------------------------------------------------------------- shapes: signed distance, negative inside


def _circle(x: Array, y: Array, radius: float) -> Array:
    return np.hypot(x, y) - radius


def _square(x: Array, y: Array, radius: float) -> Array:
    return _box(x, y, 0.85 * radius, 0.85 * radius)


def _triangle(x: Array, y: Array, radius: float) -> Array:
    """Pointing up: height 1.85 radius, base 2 radius, inside the box of the circle."""
    slope = np.hypot(1.0, 1.85)
    sides = (1.85 * np.abs(x) - (y + radius)) / slope
    return np.maximum(sides, y - 0.85 * radius)


def _cross(x: Array, y: Array, radius: float) -> Array:
    return np.minimum(_box(x, y, radius, 0.34 * radius), _box(x, y, 0.34 * radius, radius))


def _ring(x: Array, y: Array, radius: float) -> Array:
    return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


SHAPES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


# ---------------------------------------------------------------- drawing


def _pick(rng: np.random.Generator, choices: dict | tuple) -> str:
    return list(choices)[rng.integers(len(choices))]


def _article(following: str) -> str:
    return "an" if following[0] in "aeiou" else "a"


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> tuple[Array, Array]:
    steps = (np.arange(size, dtype=np.float64) + 0.5) * (_GRID / size)
    return np.tile(steps, (size, 1)), np.tile(steps[:, None], (1, size))


def _coverage(distance: Array, size: int) -> Array:
    """How much of each pixel lies inside, 0 to 1."""
    return np.clip(0.5 - distance * (size / _GRID), 0, 1)


def _texture(texture: str, x: Array, y: Array, size: int) -> Array:
    """Where the colour is darkened, 0 to 1; the pattern keeps to the picture's 8-pixel cells, which the latents can hold."""
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "striped":
        return _coverage(np.abs(y % 8 - 6) - 2, size)
    return _coverage(np.hypot(x % 8 - 4, y % 8 - 4) - 2.6, size)


def _blend(below: Array, above: Array, alpha: Array) -> Array:
    return below * (1 - alpha[..., None]) + above * alpha[..., None]


# ---------------------------------------------------------------- reading


def _pixels(image: Image.Image) -> Array:
    """The picture as (64, 64, 3) numbers, 0 to 255."""
    sized = image.convert("RGB") if image.size == (_GRID, _GRID) else image.convert("RGB").resize((_GRID, _GRID), Image.Resampling.BOX)
    return np.asarray(sized, float)


def _inner_pixels(image: Image.Image) -> Array:
    return _pixels(image)[_INSET:-_INSET, _INSET:-_INSET]


def _read_background(pixels: Array) -> tuple[str | None, Array]:
    """The background's name and its measured colour, from the corners; no name where they are not one known colour."""
    ends = (slice(0, 3), slice(-3, None))
    corners = np.concatenate([pixels[rows, columns].reshape(-1, 3) for rows in ends for columns in ends])
    ground = np.median(corners, axis=0)
    uniform = (np.linalg.norm(corners - ground, axis=-1) < _NEAR_BACKGROUND).mean() > 0.9
    name, distance = _nearest(ground, GROUNDS)
    near = _NEAR_LOOK if name == NEW_LOOK_WORD else _NEAR_BACKGROUND
    return (name if uniform and distance < near else None), ground


def _separate(pixels: Array, ground: Array) -> NDArray[np.bool_]:
    """Where the shape is: pixels that are clearly not background, and nearer to some colour, bright or shaded, than to it."""
    from_ground = np.linalg.norm(pixels - ground, axis=-1)
    clear = (from_ground > _CLEAR) & (_paint_distances(pixels).min(-1) < from_ground)
    return clear & (from_ground > 0.4 * np.quantile(from_ground[clear], 0.8)) if clear.any() else clear  # less is the blurred edge


def _read_colour(pixels: Array, inside: NDArray[np.bool_]) -> str | None:
    """The colour most of the unshaded part of the shape is nearest to."""
    inner = _shrink(inside)
    shape = pixels[inner] if inner.sum() > 40 else pixels[inside]
    brightness = shape.max(axis=-1)
    bright = shape[brightness >= 0.85 * np.quantile(brightness, 0.9)]
    distances = _paint_distances(bright)
    votes = np.bincount(distances.argmin(1), minlength=len(COLOURS)) / len(bright)
    name = int(votes.argmax())
    return list(COLOURS)[name] if np.median(distances[:, name]) < _NEAR_COLOUR and votes[name] > 0.6 else None


def _read_shape(inside: NDArray[np.bool_]) -> str | None:
    """The shape whose silhouette, put at the same place with the same area, overlaps best."""
    overlaps = sorted(((_best_overlap(name, inside), name) for name in SHAPES), reverse=True)
    (best, name), (second, _) = overlaps[:2]
    return name if best > _MIN_OVERLAP and best - second > _MIN_LEAD else None


def _best_overlap(name: str, inside: NDArray[np.bool_]) -> float:
    unit_area, unit_drop = _unit_moments(name)
    rows, columns = np.nonzero(inside)
    radius = np.sqrt(len(rows) / unit_area)
    y, x = np.mgrid[0 : inside.shape[0], 0 : inside.shape[1]].astype(float)
    best = 0.0
    for scale in (0.94, 1.0, 1.06):
        centre_x, centre_y = columns.mean(), rows.mean() - unit_drop * radius * scale
        template = SHAPES[name](x - centre_x, y - centre_y, radius * scale) < 0
        best = max(best, (template & inside).sum() / (template | inside).sum())
    return float(best)


@lru_cache(maxsize=16)
def _unit_moments(name: str) -> tuple[float, float]:
    """The area of a shape of radius 1, and how far its centroid lies below its centre."""
    steps = np.linspace(-1.2, 1.2, 241)
    x, y = np.meshgrid(steps, steps)
    inside = SHAPES[name](x, y, 1.0) < 0
    return float(inside.sum() * (steps[1] - steps[0]) ** 2), float(y[inside].mean())


def _read_texture(pixels: Array, inside: NDArray[np.bool_], colour: str) -> str:
    """Plain where little is shaded; striped where whole rows are, else dotted."""
    bright = np.asarray(COLOURS[colour], float)
    shaded = 1 - pixels @ bright / (bright @ bright)  # 0 bright, 1 - _SHADE shaded
    inner = _shrink(inside)
    if inner.sum() < 40 or shaded[inner].std() < 0.1:
        return "plain"
    rows = [shaded[row, inner[row]] for row in range(len(inner)) if inner[row].sum() >= 3]
    within = np.mean([row.var() for row in rows])
    return "striped" if within < 0.35 * shaded[inner].var() else "dotted"


def _shrink(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The part of a region whose four neighbours are inside too."""
    padded = np.pad(inside, 1)
    return inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _paint_distances(pixels: Array) -> Array:
    """How far each pixel is from each colour, as it is or shaded: (..., colours)."""
    paints = np.minimum(np.asarray(list(COLOURS.values()), float)[:, None] * np.asarray(_SHADES)[:, None], 255)
    return np.linalg.norm(pixels[..., None, None, :] - paints, axis=-1).min(-1)


def _nearest(colour: Array, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = np.linalg.norm(np.asarray(list(palette.values()), float) - colour, axis=-1)
    return list(palette)[int(distances.argmin())], float(distances.min())
