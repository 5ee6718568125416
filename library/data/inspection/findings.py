"""What an inspection finds: facts about the data as plain values, and findings that a person should read.

Everything here turns into JSON as it is (`as_json`): numbers, texts, lists; sizes are [width, height] in pixels.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from library.data.options import Size

Level = Literal["error", "warning", "note"]
Role = Literal["training", "validation"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
FORMAT = 1  # of the JSON: raise it when the meaning of an entry changes


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know or to mend: what it is, and the files or names it is about."""

    level: Level
    topic: str  # one word, the same for the same kind of finding: "duplicates", "leak", "captions"
    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BucketFacts:
    """One bucket of one dataset."""

    size: Size
    images: int
    uses: int  # in an epoch
    batches: int
    last_batch: int  # samples in the last batch: the batch size where it is full
    lost: float  # mean share of the pixels of its images, as resized, that the crop leaves out


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """One subset of one dataset."""

    name: str
    images: int
    repeats: int  # as written; regularisation images may be repeated more to match the others
    uses: int
    is_reg: bool


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """One dataset, of training or of validation."""

    number: int  # counted from 1
    role: Role
    resolution: Size
    batch_size: int
    images: int
    uses: int
    reg_uses: int
    batches: int
    partial: int  # batches with fewer samples than the batch size
    buckets: tuple[BucketFacts, ...]
    folders: tuple[FolderFacts, ...]
    lost: float  # mean share of pixels lost by cropping, over images
    worst_crops: tuple[tuple[str, float], ...]  # files, and the share of them that is lost
    enlarged: int  # images that are smaller than their bucket
    most_enlarged: tuple[tuple[str, float], ...]  # files, and the factor


@dataclass(frozen=True, kw_only=True)
class CaptionFacts:
    """What the captions of the images that are trained on hold."""

    images: int
    empty: int
    distinct: int
    are_tags: bool  # short parts between separators, not sentences
    tags: int  # different ones
    frequent: tuple[tuple[str, int], ...]
    once: int  # tags that only one caption has
    likely_typos: tuple[tuple[str, str, int], ...]  # a rare tag, the frequent one that it resembles, and how often that stands
    longest_words: int


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What caches for one model would take on disk or in memory.

    `latent_entries` and `text_entries` are None where the options of the dataset keep them from being cached, other numbers also where
    the model does not say them before it is loaded.
    """

    model: str
    latent_entries: int | None
    latent_bytes: int | None
    text_entries: int | None
    text_bytes: int | None  # about: lengths of captions are estimated for it
    over_long: int | None  # captions that the model would cut
    is_estimate: bool  # was the length of captions estimated, not counted by the model's tokenizer?


@dataclass(frozen=True, kw_only=True)
class TimeFacts:
    """What reading images takes on this machine, and what encoding them would at an assumed speed; seconds."""

    sampled: int  # images that were timed
    seconds_an_image: float  # to decode, resize and crop one, on one processor
    processors: int
    reading_an_epoch: float  # with all of them, where latents are not cached
    encoding: float  # all latents once
    assumption: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a plan says beyond the data, as a table: all rows for files, a digest for a terminal, and the numbers behind them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    digest: tuple[tuple[str, ...], ...] | None = None  # rows for a terminal under the same header; `rows` where absent
    lines: tuple[str, ...] = ()  # sentences below the table
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that an inspection found."""

    findings: tuple[Finding, ...]
    datasets: tuple[DatasetFacts, ...] = ()
    captions: CaptionFacts | None = None
    caches: tuple[CacheFacts, ...] = ()
    time: TimeFacts | None = None
    sections: tuple[Section, ...] = ()  # of a plan: the network, memory
    run: dict[str, int] = field(default_factory=dict)  # batches and steps an epoch, steps of the run where known

    def of_level(self, level: Level) -> list[Finding]:
        """The findings of one level, in their order."""
        return [finding for finding in self.findings if finding.level == level]

    def is_bad(self, *, strict: bool = False) -> bool:
        """Is there an error, or with `strict` a warning?"""
        return bool(self.of_level("error") or (strict and self.of_level("warning")))

    def as_json(self) -> dict[str, Any]:
        """The report as values that JSON can hold."""
        return {"format": FORMAT, **asdict(self)}


def finding(level: Level, topic: str, text: str, details: Iterable[str] = ()) -> Finding:
    """A finding, written short."""
    return Finding(level=level, topic=topic, text=text, details=tuple(details))
