"""What the captions say: how many there are, tags and how often they stand, tags that may be misspelt."""

from collections import Counter
from collections.abc import Iterator, Sequence

from library.core.spelling import nearest
from library.data.entries import ImageEntry
from library.data.inspection.findings import CaptionFacts, Finding, finding

FREQUENT = 50  # tags that are listed
TYPOS = 40  # likely misspellings that are listed
SHORTEST = 5  # letters of a tag whose spelling is judged: short words have too many neighbours
TIMES = 5  # how much more often the right spelling stands
TAG_WORDS = 4.0  # parts of captions with more words in the mean are sentences
SHOWN = 10


def caption_facts(images: Sequence[ImageEntry]) -> CaptionFacts:
    """Facts about the captions as they stand in the files, each image once for all datasets."""
    own = {image.path: image for image in images}.values()
    captions = [image.caption for image in own]
    tags: Counter[str] = Counter()
    for image in own:
        tags.update(set(tags_of(image)))
    words = [len(tag.split()) for tag in tags.elements()]
    are_tags = bool(words) and sum(words) / len(words) <= TAG_WORDS
    return CaptionFacts(
        images=len(captions),
        empty=sum(not caption for caption in captions),
        distinct=len({caption for caption in captions if caption}),
        are_tags=are_tags,
        tags=len(tags),
        frequent=tuple(tags.most_common(FREQUENT)),
        once=sum(count == 1 for count in tags.values()),
        likely_typos=tuple(likely_typos(tags)[:TYPOS]) if are_tags else (),
        longest_words=max((len(line.split()) for caption in captions for line in caption.split("\n")), default=0),
    )


def tags_of(image: ImageEntry) -> Iterator[str]:
    """The parts of all lines of a caption in lower case, without marks that never reach the model."""
    separator, mark = image.options.caption_separator, image.options.keep_tokens_separator
    for line in image.caption.split("\n"):
        text = line.replace(mark, separator) if mark else line
        yield from (tag for part in text.split(separator) if (tag := part.strip().lower()))


def likely_typos(tags: Counter[str]) -> list[tuple[str, str, int]]:
    """Rare tags one letter away from a tag that stands at least `TIMES` as often, with that tag and its count; most frequent first."""
    by_letters: dict[str, set[str]] = {}
    for tag, count in tags.items():
        if count >= TIMES:
            for shorter in _without_a_letter(tag):
                by_letters.setdefault(shorter, set()).add(tag)
    found = []
    for tag, count in tags.items():
        if len(tag) >= SHORTEST:
            close = {other for shorter in _without_a_letter(tag) for other in by_letters.get(shorter, ()) if _is_slip(tag, other)}
            often = [other for other in close if tags[other] >= TIMES * count]
            meant = nearest(tag, often)
            if meant is not None:
                found.append((tag, meant, tags[meant]))
    return sorted(found, key=lambda each: (-each[2], each[0]))


def caption_findings(images: Sequence[ImageEntry], facts: CaptionFacts) -> Iterator[Finding]:
    """What a person should know about the captions."""
    own = list({image.path: image for image in images}.values())
    empty = [str(image.path) for image in own if not image.caption]
    if empty:
        text = f"empty captions: {len(empty)} of {len(own)}; these images teach the look of the data without a word for it"
        yield finding("warning", "captions", text, empty[:SHOWN])
    groups: dict[str, list[str]] = {}
    for image in own:
        if image.caption and image.caption != image.options.class_tokens:
            groups.setdefault(image.caption, []).append(image.name)
    shared = sorted(((caption, names) for caption, names in groups.items() if len(names) > 1), key=lambda each: -len(each[1]))
    if shared:
        count = sum(len(names) for _, names in shared)
        text = f"captions that several images share: {len(shared)}, of {count} images"
        yield finding("note", "captions", text, (f"{len(names)} x {caption!r:.80}" for caption, names in shared[:SHOWN]))
    if facts.likely_typos:
        details = (f"{tag!r}: {other!r} stands {count} times" for tag, other, count in facts.likely_typos[:SHOWN])
        yield finding("note", "spelling", f"rare tags that look like slips of frequent ones: {len(facts.likely_typos)}", details)


# One letter away


def _without_a_letter(tag: str) -> Iterator[str]:
    """The tag, and the tag without each of its letters: two words one slip apart share one of these."""
    yield tag
    yield from (tag[:n] + tag[n + 1 :] for n in range(len(tag)))


def _is_slip(tag: str, other: str) -> bool:
    """Is it one letter more, less or another, or two letters changed over, and neither a digit nor a plural?"""
    if tag == other or [c for c in tag if c.isdigit()] != [c for c in other if c.isdigit()]:
        return False
    short, long = sorted((tag, other), key=len)
    if len(short) == len(long):
        places = [n for n, (a, b) in enumerate(zip(tag, other, strict=True)) if a != b]
        first, last = places[0], places[-1]
        return first == last or (last == first + 1 and tag[first] == other[last] and tag[last] == other[first])
    return len(long) == len(short) + 1 and short in _without_a_letter(long) and long not in (f"{short}s", f"{short}.")
