"""A report for a terminal: tables of at most 100 columns, then what to mend."""

import textwrap
from collections.abc import Iterator

from library.core.text_table import table
from library.data.inspection.findings import LEVELS, CacheFacts, CaptionFacts, DatasetFacts, FolderFacts, Level, Report, Section, TimeFacts
from library.data.options import Size

WIDTH = 100
NAME = 56  # columns of a file or folder; longer ones lose their middle
BUCKETS = 24  # rows of a table of buckets; the others are summed up
DETAILS = 6  # lines of a finding; the JSON and the page have more
NOT_CACHEABLE = "not with these options"
CACHE_HEADER = ("caches for", "latents", "size", "texts", "size", "captions cut")


def report_text(report: Report) -> str:
    """The whole report."""
    blocks = [*map(_dataset, report.datasets)]
    if report.captions is not None:
        blocks.append(_captions(report.captions))
    if report.caches:
        blocks.append(table(CACHE_HEADER, list(map(cache_row, report.caches))))
    if report.time is not None:
        blocks.append("\n".join(_wrapped(time_sentence(report.time))))
    blocks += map(_section, report.sections)
    blocks += [_findings(report, level) for level in LEVELS if report.of_level(level)]
    return "\n\n".join([_heading(report), *blocks])


def size_name(size: Size) -> str:
    """`832x1216`."""
    return f"{size[0]}x{size[1]}"


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def amount(count: int) -> str:
    """Bytes in a unit that fits."""
    for unit, length in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Seconds in words that fit."""
    if seconds < 1:
        return f"{seconds * 1000:.{int(seconds < 0.01)}f} ms"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def totals(report: Report) -> str:
    """The run in one line."""
    training = [facts for facts in report.datasets if facts.role == "training"]
    held_out = sum(facts.images for facts in report.datasets if facts.role == "validation")
    uses, batches = sum(facts.uses for facts in training), sum(facts.batches for facts in training)
    counts = f"{counted(sum(facts.images for facts in training), 'image')}, {counted(uses, 'use')} and {batches:,} batches an epoch"
    told = {"steps_per_epoch": "{:,} steps an epoch", "steps": "{:,} steps in all", "processes": "{} processes"}
    more = [words.format(report.run[name]) for name, words in told.items() if report.run.get(name, 0) > (name == "processes")]
    return ", ".join([counts, *more, *([f"{counted(held_out, 'image')} for validation"] if held_out else [])])


def cache_row(facts: CacheFacts) -> list[str]:
    """One model's caches as cells: see `CACHE_HEADER`."""
    return [
        facts.model,
        NOT_CACHEABLE if facts.latent_entries is None else str(facts.latent_entries),
        "" if facts.latent_bytes is None else amount(facts.latent_bytes),
        NOT_CACHEABLE if facts.text_entries is None else str(facts.text_entries),
        "" if facts.text_bytes is None else f"about {amount(facts.text_bytes)}",
        "unknown" if facts.over_long is None else f"{'about ' if facts.is_estimate else ''}{facts.over_long}",
    ]


def time_sentence(facts: TimeFacts) -> str:
    """What reading and encoding take."""
    return (
        f"time: one image takes {duration(facts.seconds_an_image)} to read (measured on {facts.sampled}); without cached latents an epoch "
        f"reads for {duration(facts.reading_an_epoch)} on {facts.processors} processors; caching latents takes about "
        f"{duration(facts.encoding)} if {facts.assumption}"
    )


# Blocks


def _heading(report: Report) -> str:
    counts = (counted(len(report.of_level(level)), level) for level in LEVELS)
    return "\n".join([*(_wrapped(totals(report)) if report.datasets else ()), ", ".join(counts)])


def _dataset(facts: DatasetFacts) -> str:
    role = " for validation" if facts.role == "validation" else ""
    title = f"dataset {facts.number}{role}: {size_name(facts.resolution)}, batch size {facts.batch_size}, {facts.batches} batches"
    lines = [title + (f", {facts.partial} of them not full" if facts.partial else "")]
    lines.append(table(["folder", "images", "repeats", "uses", ""], [_folder(folder) for folder in facts.folders]))
    shown, rest = facts.buckets[:BUCKETS], facts.buckets[BUCKETS:]
    rows = [
        [size_name(each.size), str(each.images), str(each.uses), str(each.batches), str(each.last_batch), f"{each.lost:.1%}"]
        for each in shown
    ]
    lines.append(table(["bucket", "images", "uses", "batches", "last batch", "pixels lost"], rows))
    if rest:
        lines.append(f"and {len(rest)} more buckets with {sum(each.images for each in rest)} images")
    lines.append(f"pixels lost by cropping: {facts.lost:.1%} in the mean; enlarged: {facts.enlarged} of {facts.images} images")
    lines += [f"  {share:.1%} lost: {shortened(name)}" for name, share in facts.worst_crops[:3]]
    lines += [f"  {factor:.2f} times enlarged: {shortened(name)}" for name, factor in facts.most_enlarged[:3]]
    return "\n".join(lines)


def _folder(folder: FolderFacts) -> list[str]:
    return [
        shortened(folder.name),
        str(folder.images),
        str(folder.repeats),
        str(folder.uses),
        "regularisation" if folder.is_reg else "",
    ]


def _captions(facts: CaptionFacts) -> str:
    lines = [
        f"captions: {facts.images} images, {facts.distinct} different captions, {facts.empty} empty, up to {facts.longest_words} words"
    ]
    if facts.are_tags:
        lines.append(f"tags: {facts.tags} different ones, {facts.once} of them in one caption only; the most frequent:")
        lines += textwrap.wrap(
            ", ".join(f"{tag} {count}" for tag, count in facts.frequent[:30]), WIDTH - 2, initial_indent="  ", subsequent_indent="  "
        )
    return "\n".join(lines)


def _section(section: Section) -> str:
    rows = section.rows if section.digest is None else section.digest
    shown = [[shortened(cell) for cell in row] for row in rows]
    return "\n".join([section.title, table(section.header, shown), *(line for text in section.lines for line in _wrapped(text))])


def _findings(report: Report, level: Level) -> str:
    lines = [f"{level}s"]
    for each in report.of_level(level):
        lines += _wrapped(each.text, "- ")
        lines += [f"    {shortened(detail, WIDTH - 4)}" for detail in each.details[:DETAILS]]
        if len(each.details) > DETAILS:
            lines.append(f"    and {len(each.details) - DETAILS} more")
    return "\n".join(lines)


# Lines


def shortened(text: str, width: int = NAME) -> str:
    """A text without its middle where it is longer than `width`."""
    keep = (width - 3) // 2
    return text if len(text) <= width else f"{text[: width - 3 - keep]}...{text[-keep:]}"


def _wrapped(text: str, mark: str = "") -> Iterator[str]:
    yield from textwrap.wrap(
        text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False, break_on_hyphens=False
    )
