"""Captions: made ready at each use as a pure function of text, options, step and draw."""

import random
from collections.abc import Iterable
from dataclasses import replace

from library.data.captions.wildcards import drawn_wording, every_wording, longest_wording
from library.data.options import SubsetOptions


def drawn_caption(caption: str, options: SubsetOptions, *, epoch: int, step: int, draw: random.Random) -> str:
    """What the model reads at one use: empty by dropout, else the caption composed with the draws of `draw`.

    `epoch` and `step` (of the optimizer, for the warm-up) count from 0.
    """
    return "" if is_dropped(options, epoch, draw) else composed_caption(caption, options, draw, step)


def is_dropped(options: SubsetOptions, epoch: int, draw: random.Random) -> bool:
    """Is the whole caption left out at this use? Always takes one draw."""
    every = options.caption_dropout_every_n_epochs
    is_drawn = draw.random() < options.caption_dropout_rate
    return is_drawn or (every > 0 and (epoch + 1) % every == 0)


def composed_caption(caption: str, options: SubsetOptions, draw: random.Random, step: int = 0) -> str:
    """The caption after prefix and suffix, wildcards, warm-up, shuffling, dropping of parts, secondary separator, in this order.

    `step` matters with `token_warmup_step` only.
    """
    lines = _dressed(caption, options)
    text = draw.choice(lines) if options.enable_wildcard and len(lines) > 1 else lines[0]
    if options.enable_wildcard:
        text = drawn_wording(text, draw)
    return _arranged(text, options, draw, step)


def every_caption(caption: str, options: SubsetOptions, most: int) -> list[str] | None:
    """All captions that wildcards alone may give, each once and in the order of lines and choices; None where they are more than `most`.

    Nothing is shuffled, dropped or warmed up: with those options these are what the draws start from.
    """
    lines = list(dict.fromkeys(_dressed(caption, options)))
    wordings = [every_wording(line, most) for line in lines] if options.enable_wildcard else [lines[:1]]
    texts = dict.fromkeys(text for each in wordings for text in each or ())
    if None in wordings or len(texts) > most:
        return None
    return _unmoved(texts, options)


def longest_captions(caption: str, options: SubsetOptions) -> list[str]:
    """Of each line that may be drawn, the caption with the longest choices and all its parts: for counting tokens."""
    lines = _dressed(caption, options)
    return _unmoved(map(longest_wording, lines) if options.enable_wildcard else lines[:1], options)


def fixed_caption(caption: str, options: SubsetOptions) -> str:
    """The caption that every use without dropout reads, where `varying_options` names nothing."""
    assert not varying_options(options), "a caption that varies has no fixed form"
    return composed_caption(caption, options, random.Random(0))


def varying_options(options: SubsetOptions) -> list[str]:
    """The options that make a caption differ from use to use (other than dropout of the whole), by name."""
    names = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step", "enable_wildcard")
    return [name for name in names if getattr(options, name)]


# Steps


def _dressed(caption: str, options: SubsetOptions) -> list[str]:
    """The lines of a caption with prefix and suffix."""
    ends = options.caption_prefix, options.caption_suffix
    return [" ".join(part for part in (ends[0], line, ends[1]) if part) for line in caption.split("\n")]


def _unmoved(texts: Iterable[str], options: SubsetOptions) -> list[str]:
    """The captions of these texts with all their parts in the order as typed, each once."""
    steady, unused = replace(options, shuffle_caption=False, caption_tag_dropout_rate=0.0, token_warmup_step=0.0), random.Random(0)
    return list(dict.fromkeys(_arranged(text, steady, unused, step=0) for text in texts))


def _arranged(text: str, options: SubsetOptions, draw: random.Random, step: int) -> str:
    """The caption with its parts in their places, as typed where no option touches them."""
    moves = options.shuffle_caption or options.caption_tag_dropout_rate > 0 or options.token_warmup_step > 0
    if moves or _is_marked(text, options):
        head, free, tail = _split(text, options)
        text = options.caption_joint.join([*head, *_drawn_parts(free, options, draw, step), *tail])
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.caption_separator)
    return text


def _drawn_parts(free: list[str], options: SubsetOptions, draw: random.Random, step: int) -> list[str]:
    """The free parts that one use keeps, in its order."""
    free = free[: _warmed_up(len(free), options, step)]
    if options.shuffle_caption:
        draw.shuffle(free)
    if options.caption_tag_dropout_rate > 0:
        free = [part for part in free if draw.random() >= options.caption_tag_dropout_rate]
    return free


def _warmed_up(free: int, options: SubsetOptions, step: int) -> int:
    """How many of the free parts are kept at a step: in a straight line from the minimum to all of them."""
    least, steps = options.token_warmup_min, options.token_warmup_step
    if step >= steps or free <= least:
        return free
    return int(step * (free - least) // steps) + least


def _is_marked(text: str, options: SubsetOptions) -> bool:
    return bool(options.keep_tokens_separator) and str(options.keep_tokens_separator) in text


def _split(text: str, options: SubsetOptions) -> tuple[list[str], list[str], list[str]]:
    """The parts that stay at the start, the free ones, and those that stay at the end."""
    if _is_marked(text, options):
        sections = text.split(str(options.keep_tokens_separator))
        head, free, *tails = [[part.strip() for part in section.split(options.caption_separator) if part.strip()] for section in sections]
        return head, free, [part for tail in tails for part in tail]
    parts = [part.strip() for part in text.strip().split(options.caption_separator)]
    return parts[: options.keep_tokens], parts[options.keep_tokens :], []
