"""Which timesteps a run would draw and how much each counts, drawn before anything is loaded."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from library.core.atomic import staged
from library.core.command_line import OptionSet
from library.core.keyed_random import keyed_generator
from library.core.log import get_logger
from library.core.options import option
from library.core.rules import Rule
from library.core.text_table import table
from library.diffusion.loss import LossOptions, huber_thresholds
from library.diffusion.noise import STEPS
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture
from library.training.length import RunOptions
from library.training.save import SaveOptions

logger = get_logger(__name__)
DRAWS, BANDS, COLUMNS, BAR = 100_000, 20, 100, 40  # timesteps drawn; bands of the text and of the picture; longest bar in letters
FILE = "timesteps.png"
PANEL, GAP = (800, 240), 40  # of the picture, in pixels
INK, PAPER, COLOURS = (40, 40, 40), (255, 255, 255), ((66, 113, 174), (192, 108, 60), (100, 140, 80))


@dataclass(kw_only=True, frozen=True)
class TimestepViewOptions:
    """Timesteps shown."""

    show_timesteps: Literal["console", "image"] | None = option(
        None, help=f"show which timesteps the run would draw and how much each counts, as text or as {FILE} in the output folder, and end"
    )
    show_timesteps_resolution: str = option("1024", help="size of the picture for --show_timesteps: one side, or width,height")

    RULES: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(option=name, when=lambda v: v["show_timesteps"] is not None, because="--show_timesteps is answered instead")
            for name in ("plan", "plan_file", "debug_dataset")
        ),
        Rule(option="show_timesteps_resolution", when=lambda v: v["show_timesteps"] is None, because="it is for --show_timesteps"),
        Rule(
            option="show_timesteps_resolution",
            when=lambda v: v["show_timesteps"] is not None and v.get("timestep_sampling") != "flux_shift",
            because="timesteps depend on the size of a picture with --timestep_sampling flux_shift only",
        ),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: a size that is not one side or two."""
        if self.size is None:
            yield f"--show_timesteps_resolution {self.show_timesteps_resolution}: write one side or width,height, as 1024 or 832,1216"

    @property
    def is_asked(self) -> bool:
        """Shall timesteps be shown and nothing trained?"""
        return self.show_timesteps is not None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height, or None where the text says no size."""
        parts = [part.strip() for part in self.show_timesteps_resolution.split(",")]
        sides = [int(part) for part in parts if part.isascii() and part.isdigit() and int(part) > 0]
        return (sides[0], sides[-1]) if len(sides) == len(parts) <= 2 else None


@dataclass(frozen=True, kw_only=True)
class Band:
    """Timesteps from `low` to below `high`, out of 1000: their share of all draws, and means over those draws; None without a draw."""

    low: int
    high: int
    share: float
    weight: float | None
    threshold: float | None  # of a robust loss


def show_timesteps(arch: Architecture, options: OptionSet) -> Path | None:
    """Draw timesteps with a run's options and write what came to standard output, or to a picture, whose path is returned."""
    view, loss = options[TimestepViewOptions], options[LossOptions]
    process = arch.noise_process(options[arch.NoiseOptions], options[arch.ModelOptions])
    width, height = view.size or (arch.default_resolution, arch.default_resolution)
    shape = (DRAWS, arch.latent_channels, height // arch.pixels_per_latent, width // arch.pixels_per_latent)
    timesteps = process.timesteps(shape, keyed_generator(options[RunOptions].seed or 0, "shown timesteps"))
    about = f"{DRAWS} timesteps of {arch.title} at {width}x{height}"
    if view.show_timesteps == "console":
        sys.stdout.write(as_text(bands(process, timesteps, loss, BANDS), about))
        return None
    path = Path(options[SaveOptions].output_dir) / FILE
    with staged(path) as beside, beside.open("wb") as file:
        as_picture(bands(process, timesteps, loss, COLUMNS), about).save(file, format="PNG")
    logger.info("wrote %s: %s", path, about)
    return path


def bands(process: NoiseProcess, timesteps: Tensor, loss: LossOptions, count: int) -> list[Band]:
    """The drawn timesteps (draws,) in `count` bands of equal width."""
    places = (process.counted(timesteps) * count / STEPS).long().clamp(0, count - 1)
    draws = torch.bincount(places, minlength=count)
    weights = _means(process.loss_weights(timesteps), places, draws)
    thresholds = huber_thresholds(process, timesteps, loss)
    robust = [None] * count if thresholds is None else _means(thresholds, places, draws)
    edges = [round(index * STEPS / count) for index in range(count + 1)]
    return [
        Band(low=low, high=high, share=int(number) / len(timesteps), weight=weight, threshold=threshold)
        for low, high, number, weight, threshold in zip(edges, edges[1:], draws, weights, robust, strict=False)
    ]


def as_text(found: Sequence[Band], about: str) -> str:
    """A histogram in letters, with the mean loss weight of each band."""
    has_thresholds = any(band.threshold is not None for band in found)
    most = max(band.share for band in found)
    header = ["timesteps", "share", "", "loss weight", *(["threshold"] if has_thresholds else [])]
    rows = [
        [
            f"{band.low:4d} - {band.high:4d}", f"{band.share:.2%}", "#" * round(BAR * band.share / most), _number(band.weight),
            *([_number(band.threshold)] if has_thresholds else []),
        ]
        for band in found
    ]  # fmt: skip
    return f"{about}\n\n{table(header, rows)}\n"


def as_picture(found: Sequence[Band], about: str) -> Image.Image:
    """A histogram and, below it, the mean loss weights (and thresholds) as bars."""
    panels = [("share of the draws", [band.share for band in found]), ("mean loss weight", [band.weight or 0.0 for band in found])]
    if any(band.threshold is not None for band in found):
        panels.append(("mean threshold of the loss", [band.threshold or 0.0 for band in found]))
    step = PANEL[1] + 2 * GAP
    picture = Image.new("RGB", (PANEL[0] + 2 * GAP, GAP + step * len(panels)), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, GAP // 3), about, fill=INK)
    for row, ((title, values), colour) in enumerate(zip(panels, COLOURS, strict=False)):
        _bars(pen, 2 * GAP + step * row, values, title, colour)
    return picture


# The parts


def _means(values: Tensor, places: Tensor, draws: Tensor) -> list[float | None]:
    sums = torch.zeros(len(draws), dtype=torch.float64).index_add(0, places, values.double())
    return [float(total / count) if count else None for total, count in zip(sums, draws, strict=True)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _bars(pen: ImageDraw.ImageDraw, top: int, values: Sequence[float], title: str, colour: tuple[int, int, int]) -> None:
    """Bars over an axis from 0 to 1000, below their title and largest value; an infinite value has none."""
    values = [value if math.isfinite(value) else 0.0 for value in values]
    (width, height), left, most = PANEL, GAP, max(max(values), 1e-12)
    pen.text((left, top - GAP // 2), f"{title}, up to {most:.4g}", fill=INK)
    for index, value in enumerate(values):
        edges = [left + width * place // len(values) for place in (index, index + 1)]
        pen.rectangle((edges[0], top + height - round(height * value / most), edges[1] - 2, top + height), fill=colour)
    pen.line((left, top + height, left + width, top + height), fill=INK)
    for timestep in range(0, STEPS + 1, 100):
        pen.text((left + width * timestep // STEPS - 6, top + height + 4), str(timestep), fill=INK)
