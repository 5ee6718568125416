"""What a person is told of copies: files that are the same, pictures that look alike, and those on both sides of validation."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from library.data.dataset import TrainingData
from library.data.inspection.duplicates import Group, Prints, crossing_pairs, near_groups, same_groups
from library.data.inspection.findings import Finding, finding
from library.data.inspection.looking import Look, Looks

SHOWN = 20
NAMED = 6  # files of one group


class Source(NamedTuple):
    """What is known of a file beside its looks."""

    captions: set[str]
    validates: bool


def sources_of(data: TrainingData) -> dict[Path, Source]:
    """Every file once, those for validation last: of a file in several datasets all captions count."""
    sources: dict[Path, Source] = {}
    for held_out, images in ((False, data.images), (True, data.validation.images if data.validation is not None else ())):
        for image in images:
            sources.setdefault(image.path, Source(set(), held_out)).captions.add(image.caption)
    return sources


def duplicate_findings(looks: Looks, sources: Mapping[Path, Source]) -> Iterator[Finding]:
    """Files that are the same or look alike, and those that are both trained on and validated with."""
    same = same_groups([look.sha256 for look in looks.sound])
    prints = Prints([look.print for look in looks.sound if look.print is not None])
    near = near_groups(prints)
    yield from _leaks(looks.sound, sources, prints, near)
    if same:
        text = f"the same file as another: {_images(same)}"
        yield finding("warning", "duplicates", text, _lines(looks.sound, same, sources))
    alike = [group for group in near if len({looks.sound[position].sha256 for position in group.members}) > 1]
    if alike:
        text = f"nearly the same picture as another: {_images(alike)}"
        yield finding("warning", "near duplicates", text, _lines(looks.sound, alike, sources))


def _leaks(looks: Sequence[Look], sources: Mapping[Path, Source], prints: Prints, near: Sequence[Group]) -> Iterator[Finding]:
    """Images held out for validation that are among the training images under another name, or look like one of them."""
    held_out = {position for position, look in enumerate(looks) if sources[look.path].validates}
    pairs = [pair for group in near for pair in crossing_pairs(prints, group, held_out)]
    if pairs:
        text = (
            f"validation images that are trained on too, or look like one that is: {len(pairs)} of {len(held_out)}; their loss says little"
        )
        yield finding("warning", "leak", text, (_pair_line(looks[one], looks[other]) for one, other in pairs[:SHOWN]))


def _images(groups: Sequence[Group]) -> str:
    return f"{sum(len(group.members) for group in groups)} images, in groups: {len(groups)}"


def _pair_line(one: Look, other: Look) -> str:
    return f"{one.path} {'is the same file as' if one.sha256 == other.sha256 else 'looks like'} {other.path}"


def _lines(looks: Sequence[Look], groups: Sequence[Group], sources: Mapping[Path, Source]) -> Iterator[str]:
    """One line a group, the largest first; different captions are said, as they teach one picture by several texts."""
    for group in sorted(groups, key=lambda each: -len(each.members))[:SHOWN]:
        paths = [looks[position].path for position in group.members]
        captions = {caption for path in paths for caption in sources[path].captions}
        more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
        yield ", ".join(map(str, paths[:NAMED])) + more + (" (with different captions)" if len(captions) > 1 else "")
