"""Contact sheets: the first pictures of every bucket as the model sees them in the first epoch, cropped, mirrored, masked."""

import base64
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from library.data.dataset import TrainingData
from library.data.images.pictures import Picture
from library.data.options import Size
from library.data.order import Sample
from library.data.views import View

SIDE = 256  # longest side of a picture on the page
MOST = 2000  # pictures on a page: about 30 MB
DIM = 0.2  # what is left of the light where a mask leaves out everything


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a sheet."""

    file: str
    caption: str  # as the model reads it
    written: str  # as it stands in the file
    marks: tuple[str, ...]  # what was done to the picture, in words
    repeats: int
    jpeg: str | None  # in base64; None where the image cannot be decoded
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The pictures of one bucket of one dataset."""

    dataset: int  # counted from 1
    role: str
    size: Size
    images: int  # in the bucket
    shots: tuple[Shot, ...]


def contact_sheets(data: TrainingData, samples: int) -> Iterator[Sheet]:
    """A sheet for every bucket of every dataset, with at most `samples` pictures each, and fewer where there are many buckets."""
    groups: dict[tuple[str, int, Size], list[int]] = {}
    sources = {"training": data} | ({"validation": data.validation} if data.validation is not None else {})
    for role, source in sources.items():
        for index, image in enumerate(source.images):
            groups.setdefault((role, image.dataset, image.placement.bucket), []).append(index)
    most = min(samples, max(1, MOST // max(1, len(groups))))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (role, dataset, size), indices in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], item[0][2])):
            views = [sources[role].view(0, Sample(index, 0)) for index in indices[:most]]
            yield Sheet(dataset=dataset + 1, role=role, size=size, images=len(indices), shots=tuple(pool.map(shot_of, views)))


def shot_of(view: View) -> Shot:
    """One view as a small picture with its caption; an image that cannot be decoded becomes a shot with its problem."""
    jpeg, problem = None, ""
    try:
        jpeg = base64.b64encode(small_jpeg(view.picture())).decode("ascii")
    except ValueError as error:
        problem = str(error)
    image = view.image
    return Shot(
        file=str(image.path), caption=view.caption, written=image.caption, marks=tuple(_marks(view)), repeats=image.repeats, jpeg=jpeg,
        problem=problem,
    )  # fmt: skip


def small_jpeg(picture: Picture) -> bytes:
    """The picture as a small JPEG, dimmed where its mask keeps the loss away."""
    pixels = picture.pixels.add(1).mul_(127.5)
    if picture.mask is not None:
        pixels = pixels * (DIM + (1 - DIM) * picture.mask)
    image = Image.fromarray(pixels.round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82)
    return stream.getvalue()


def _marks(view: View) -> Iterator[str]:
    """What was done to the picture."""
    image, crop = view.image, view.crop
    yield f"{image.size[0]}x{image.size[1]} resized to {crop.resized[0]}x{crop.resized[1]}"
    if crop.resized != crop.size:
        kept = crop.size[0] * crop.size[1] / (crop.resized[0] * crop.resized[1])
        yield f"cropped at {crop.corner[0]}, {crop.corner[1]} ({1 - kept:.0%} lost)"
    if (factor := max(new / old for new, old in zip(crop.resized, image.size, strict=True))) > 1:
        yield f"enlarged {factor:.2f} times"
    facts = {
        "mirrored": crop.flipped,
        "colours changed": view.color is not None,
        "masked": image.is_masked,
        "regularisation": image.options.is_reg,
    }
    yield from (name for name, holds in facts.items() if holds)
