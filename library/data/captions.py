"""Captions: read from the files beside the images, and made ready at each use as a pure function of text, options and draw."""

import random
import re
from collections.abc import Iterable
from pathlib import Path

from library.data.options import SubsetOptions

_BRACES = {"{{": "\x00", "}}": "\x01"}  # literal braces, hidden while choices are drawn
_CHOICE = re.compile(r"\{([^{}]+)\}")


def caption_file(image: Path, endings: Iterable[str]) -> Path | None:
    """The caption file of an image: its name with the first of the endings that is there."""
    paths = (image.with_name(image.stem + ending) for ending in endings)
    return next((path for path in paths if path.is_file()), None)


def read_caption(path: Path, every_line: bool) -> str:
    """The caption in a file: its first line with text, or all of them where wildcards draw a line.

    Raises `ValueError` that names the file when it is not UTF-8 (a byte-order mark is fine) or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    lines = caption_lines(text)
    if not lines:
        raise ValueError(f"{path}: holds no text; write a caption into it, or delete it to use class_tokens")
    return "\n".join(lines) if every_line else lines[0]


def caption_lines(text: str) -> list[str]:
    """The lines with text, without space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def drawn_caption(caption: str, options: SubsetOptions, *, epoch: int, draw: random.Random) -> str:
    """What the model reads at one use: empty by dropout, else the caption composed with the draws of `draw`.

    `epoch` counts from 0; every n-th epoch for `caption_dropout_every_n_epochs` is counted from 1, as sd-scripts does.
    """
    every = options.caption_dropout_every_n_epochs
    dropped = draw.random() < options.caption_dropout_rate
    if dropped or (every > 0 and (epoch + 1) % every == 0):
        return ""
    return composed_caption(caption, options, draw)


def composed_caption(caption: str, options: SubsetOptions, draw: random.Random) -> str:
    """The caption after prefix and suffix, wildcards, shuffling and dropping of parts, and the secondary separator, in this order."""
    lines = [_dressed(line, options) for line in caption.split("\n")]
    text = draw.choice(lines) if options.enable_wildcard and len(lines) > 1 else lines[0]
    if options.enable_wildcard:
        text = _with_choices(text, draw)
    if options.shuffle_caption or options.caption_tag_dropout_rate > 0 or _is_marked(text, options):
        text = _rearranged(text, options, draw)
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.caption_separator)
    return text


def fixed_caption(caption: str, options: SubsetOptions) -> str:
    """The caption that every use without dropout reads, where `varying_options` names nothing."""
    assert not varying_options(options), "a caption that varies has no fixed form"
    return composed_caption(caption, options, random.Random(0))


def varying_options(options: SubsetOptions) -> list[str]:
    """The options that make a caption differ from use to use (other than dropout of the whole), by name."""
    names = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")
    return [name for name in names if getattr(options, name)]


# Steps


def _dressed(line: str, options: SubsetOptions) -> str:
    return " ".join(part for part in (options.caption_prefix, line, options.caption_suffix) if part)


def _with_choices(text: str, draw: random.Random) -> str:
    """`{a|b|c}` becomes one of a, b, c; doubled braces become single ones."""
    for braces, hidden in _BRACES.items():
        text = text.replace(braces, hidden)
    text = _CHOICE.sub(lambda match: draw.choice(match[1].split("|")), text)
    for braces, hidden in _BRACES.items():
        text = text.replace(hidden, braces[0])
    return text


def _is_marked(text: str, options: SubsetOptions) -> bool:
    return bool(options.keep_tokens_separator) and str(options.keep_tokens_separator) in text


def _rearranged(text: str, options: SubsetOptions, draw: random.Random) -> str:
    """Shuffle and drop the free parts, and join all parts anew."""
    head, free, tail = _split(text, options)
    if options.shuffle_caption:
        draw.shuffle(free)
    if options.caption_tag_dropout_rate > 0:
        free = [part for part in free if draw.random() >= options.caption_tag_dropout_rate]
    return f"{options.caption_separator} ".join([*head, *free, *tail])


def _split(text: str, options: SubsetOptions) -> tuple[list[str], list[str], list[str]]:
    """The parts that stay at the start, the free ones, and those that stay at the end."""
    if _is_marked(text, options):
        sections = text.split(str(options.keep_tokens_separator), 2)
        head, free, *tail = [[part.strip() for part in section.split(options.caption_separator) if part.strip()] for section in sections]
        return head, free, tail[0] if tail else []
    parts = [part.strip() for part in text.strip().split(options.caption_separator)]
    return parts[: options.keep_tokens], parts[options.keep_tokens :], []
