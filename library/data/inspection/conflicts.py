"""Options that do nothing with the captions and images at hand, or do what was hardly meant."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from library.data.entries import ImageEntry
from library.data.images.crops import face_in_name
from library.data.inspection.counts import Part
from library.data.inspection.findings import Finding, finding
from library.data.options import DatasetOptions, SubsetOptions

_SIDES = re.compile(r"\b(left|right|text|letters?|logo|signature|watermark|asymmetr\w+)\b", re.IGNORECASE)
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")


@dataclass(frozen=True)
class Seen:
    """One subset of one dataset, with the images it gives."""

    options: SubsetOptions
    dataset: DatasetOptions
    images: Sequence[ImageEntry]

    def parts(self, image: ImageEntry) -> int:
        """How many parts a caption has."""
        return image.caption.count(self.options.caption_separator) + 1

    def with_text(self, text: str | None) -> int:
        """How many captions hold a text."""
        return sum(text in image.caption for image in self.images) if text else 0


@dataclass(frozen=True)
class Conflict:
    """An option, what shows that it is in conflict with the data (a count, or whether), and what to say then."""

    option: str
    met: Callable[[Seen], int | bool]
    text: str  # {value}: of the option; {count}: of `met`; {images}: how many there are


CONFLICTS = (
    Conflict(
        "shuffle_caption", lambda s: all(s.parts(i) < 3 for i in s.images), "no caption has three parts or more: there is little to shuffle"
    ),
    Conflict(
        "keep_tokens",
        lambda s: sum(s.parts(i) <= s.options.keep_tokens for i in s.images) if _rearranges(s.options) else 0,
        "{count} of {images} captions have no more parts than are kept in place: nothing of them is shuffled or dropped",
    ),
    Conflict(
        "keep_tokens_separator",
        lambda s: s.with_text(s.options.keep_tokens_separator) == 0,
        "no caption holds {value!r}: keep_tokens counts instead",
    ),
    Conflict("secondary_separator", lambda s: s.with_text(s.options.secondary_separator) == 0, "no caption holds {value!r}"),
    Conflict(
        "enable_wildcard",
        lambda s: not any("\n" in i.caption or _CHOICE.search(i.caption) for i in s.images),
        "no caption has choices in braces or several lines",
    ),
    Conflict("caption_dropout_rate", lambda s: s.options.caption_dropout_rate >= 1, "every caption is emptied: no word is learnt"),
    Conflict("caption_dropout_every_n_epochs", lambda s: s.options.caption_dropout_every_n_epochs == 1, "every epoch has empty captions"),
    Conflict("caption_tag_dropout_rate", lambda s: s.options.caption_tag_dropout_rate >= 1, "every free part of every caption is left out"),
    Conflict(
        "flip_aug",
        lambda s: sum(bool(_SIDES.search(i.caption)) for i in s.images),
        "{count} of {images} captions speak of left, right, text or a logo, which mirrored images show the other way round",
    ),
    Conflict("random_crop", lambda s: not any(any(i.placement.slack) for i in s.images), "no image has anything to crop"),
    Conflict(
        "face_crop_aug_range",
        lambda s: not any(face_in_name(i.path, i.size) for i in s.images),
        "no file name ends with the place of a face (_x_y_width_height)",
    ),
)


def conflict_findings(part: Part) -> Iterator[Finding]:
    """The conflicts of every subset of one part."""
    for number, options in enumerate(part.dataset.subsets):
        images = [image for image in part.images if image.subset == number]
        if images and part.role == "training":
            seen = Seen(options, part.dataset.options, images)
            yield from (_said(seen, conflict, count) for conflict in CONFLICTS if (count := _count(seen, conflict)))
            yield from _wildcards_off(seen)


def _count(seen: Seen, conflict: Conflict) -> int:
    return int(conflict.met(seen)) if getattr(seen.options, conflict.option) else 0


def _said(seen: Seen, conflict: Conflict, count: int) -> Finding:
    value = getattr(seen.options, conflict.option)
    text = conflict.text.format(value=value, count=count, images=len(seen.images))
    return finding("warning", "options", f"{seen.options.name}: {conflict.option} = {_written(value)}: {text}")


def _wildcards_off(seen: Seen) -> Iterator[Finding]:
    """Choices in braces that the model would read as they stand."""
    held = [image.name for image in seen.images if _CHOICE.search(image.caption)]
    if held and not seen.options.enable_wildcard:
        text = f"{seen.options.name}: captions with choices in braces, read as they stand without enable_wildcard: {len(held)}"
        yield finding("warning", "options", text, held[:10])


def _rearranges(options: SubsetOptions) -> bool:
    return options.shuffle_caption or options.caption_tag_dropout_rate > 0 or options.token_warmup_step > 0


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
