"""What caches would take, which captions a model would cut, and how long reading and encoding take."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from library.core.options import OptionError
from library.data.cacheable import latent_problems, text_problems
from library.data.captions.composing import every_caption
from library.data.dataset import TrainingData
from library.data.entries import ImageEntry
from library.data.inspection.findings import CacheFacts, Finding, TimeFacts, finding
from library.data.order import Sample

FLOAT = 4  # bytes: caches hold float32
MOST_FORMS = 16  # captions of one image that are measured where wildcards make more
SAMPLED = 12  # images that are timed
MEGAPIXELS = 8.0  # encoded in a second: an assumption, and said as such
_WORD = re.compile(r"[A-Za-z]+|\d|[^\W\d_]|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a model says of itself before it is loaded."""

    title: str
    latent_channels: int
    pixels_per_latent: int  # side of the square of pixels behind one latent position
    caption_limit: int | None = None  # tokens that it reads
    over: Callable[[Sequence[str]], list[int]] | None = None  # tokens of each caption beyond the limit, by its own tokenizer
    text_bytes: Callable[[int], int] | None = None  # of the cached states of one caption of so many tokens


class Texts:
    """The captions that uses of images may read, each with an image that has it."""

    def __init__(self, images: Iterable[ImageEntry]) -> None:
        self.images: dict[str, ImageEntry] = {}
        for image in images:
            forms = every_caption(image.caption, image.options, MOST_FORMS)
            for form in image.caption.split("\n") if forms is None else forms:
                self.images.setdefault(form, image)


def cut_captions(texts: Texts, model: ModelFacts) -> list[tuple[int, str]] | None:
    """The captions that the model cuts, with the tokens that it leaves out, the longest first; None where its limit is not known."""
    captions = list(texts.images)
    if model.over is not None:
        excess = model.over(captions)
    elif model.caption_limit is not None:
        excess = [estimated_tokens(caption) - model.caption_limit for caption in captions]
    else:
        return None
    return sorted(((over, caption) for over, caption in zip(excess, captions, strict=True) if over > 0), reverse=True)


def cache_facts(data: TrainingData, model: ModelFacts, cut: int | None) -> CacheFacts:
    """What the caches of one model hold, from shapes alone, without the few 100 bytes of each file's header; `cut` is passed on."""
    sources = [data, *([data.validation] if data.validation is not None else [])]
    pictures, captions = _pictures(data, sources, model), _captions(data, sources)
    return CacheFacts(
        model=model.title,
        latent_entries=None if pictures is None else len(pictures),
        latent_bytes=None if pictures is None else sum(pictures.values()),
        text_entries=None if captions is None else len(captions),
        text_bytes=_text_bytes(captions, model),
        over_long=cut,
        is_estimate=model.over is None,
    )


def length_findings(texts: Texts, model: ModelFacts, cut: Sequence[tuple[int, str]]) -> Iterator[Finding]:
    """The captions that the model would cut."""
    if cut:
        by = "by its tokenizer" if model.over is not None else "by an estimate from words, without its tokenizer"
        limit = f" {model.caption_limit} tokens" if model.caption_limit is not None else ""
        text = f"{model.title}: captions longer than the{limit} it reads, which are cut: {len(cut)} of {len(texts.images)} ({by})"
        yield finding("warning", "length", text, (f"{texts.images[caption].path}: {over} tokens too long" for over, caption in cut[:10]))


def estimated_tokens(caption: str) -> int:
    """About how many tokens a caption has: one for seven letters of a word, and one for a digit, a mark or another script's letter."""
    return sum(ceil(len(word) / 7) for word in _WORD.findall(caption))


def time_facts(data: TrainingData) -> TimeFacts:
    """Reading measured on some of the images, spread over the data; encoding at an assumed speed."""
    step = max(1, len(data.images) // SAMPLED)
    views = [data.view(0, Sample(index, 0)) for index in range(0, len(data.images), step)][:SAMPLED]
    started = time.perf_counter()
    for view in views:
        view.picture()
    each = (time.perf_counter() - started) / max(1, len(views))
    processors = min(max(1, data.options.max_data_loader_n_workers), os.cpu_count() or 1)
    uses = sum(image.repeats for image in data.images)
    pixels = sum(image.placement.bucket[0] * image.placement.bucket[1] * (2 if image.options.flip_aug else 1) for image in data.images)
    return TimeFacts(
        sampled=len(views),
        seconds_an_image=each,
        processors=processors,
        reading_an_epoch=each * uses / processors,
        encoding=max(pixels / 1e6 / MEGAPIXELS, each * len(data.images) / processors),
        assumption=f"the VAE encodes {MEGAPIXELS:g} megapixels a second, as a good graphics card does",
    )


# Sizes and lengths


def _pictures(data: TrainingData, sources: Sequence[TrainingData], model: ModelFacts) -> dict[object, int] | None:
    """The bytes of every entry of a cache of latents; None where options need pixels at each use."""
    if latent_problems(data.datasets):
        return None
    return {
        (image.path, image.placement, image.mask, image.options.alpha_mask, flipped): _latent_bytes(image, model)
        for source in sources
        for image in source.images
        for flipped in ((False, True) if image.options.flip_aug else (False,))
    }


def _latent_bytes(image: ImageEntry, model: ModelFacts) -> int:
    width, height = (side // model.pixels_per_latent for side in image.placement.bucket)
    return (model.latent_channels + image.is_masked) * width * height * FLOAT


def _captions(data: TrainingData, sources: Sequence[TrainingData]) -> list[str] | None:
    """The captions that a text cache would hold; None where the options or wildcards make too many of them."""
    if text_problems(data.datasets, data.options.text_cache_variants):
        return None
    try:
        return list(dict.fromkeys(caption for source in sources for caption in source.captions_to_cache()))
    except OptionError:
        return None


def _text_bytes(captions: Sequence[str] | None, model: ModelFacts) -> int | None:
    if captions is None or model.text_bytes is None:
        return None
    return sum(model.text_bytes(estimated_tokens(caption)) for caption in captions)
