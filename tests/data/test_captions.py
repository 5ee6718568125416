"""Captions: what the model reads at each use. Their files are in `test_caption_files.py`, wildcards in `test_caption_grammar.py`."""

import random
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from library.data.captions.composing import composed_caption, drawn_caption, every_caption, longest_captions, varying_options
from library.data.options import SubsetOptions


def subset(**options) -> SubsetOptions:
    return SubsetOptions(image_dir=Path("x"), **options)


def compose(caption: str, seed: int = 0, step: int = 0, **options) -> str:
    return composed_caption(caption, subset(**options), random.Random(seed), step)


def draws(caption: str, **options) -> set[str]:
    return {compose(caption, seed, **options) for seed in range(200)}


def test_a_caption_is_left_as_typed_when_nothing_is_asked():
    assert compose("a ,b,,  c {x|y}") == "a ,b,,  c {x|y}"


def test_prefix_and_suffix_are_joined_by_a_space():
    assert compose("a, b", caption_prefix="best,", caption_suffix="end") == "best, a, b end"


def test_prefix_and_suffix_are_on_every_line():
    assert draws("a\nb", caption_prefix="p", caption_suffix="s", enable_wildcard=True) == {"p a s", "p b s"}


def test_shuffling_leaves_the_kept_parts_in_front():
    seen = draws("a, b,c , d", shuffle_caption=True, keep_tokens=2)
    assert seen == {"a, b, c, d", "a, b, d, c"}


def test_parts_are_joined_with_the_separator_and_a_space():
    assert draws("a;b", shuffle_caption=True, caption_separator=";") == {"a; b", "b; a"}


def test_the_keep_mark_holds_both_ends():
    seen = draws("a, b ||| c, d ||| e", shuffle_caption=True, keep_tokens_separator="|||")
    assert seen == {"a, b, c, d, e", "a, b, d, c, e"}


def test_the_keep_mark_never_reaches_the_model():
    assert compose("a ||| b, c", keep_tokens_separator="|||") == "a, b, c"
    assert compose("a ||| b ||| c ||| d", keep_tokens_separator="|||") == "a, b, c, d"


def test_a_separator_that_ends_with_a_space_gets_no_second_one():
    assert draws("a, b", caption_separator=", ", shuffle_caption=True) == {"a, b", "b, a"}
    assert draws("a b", caption_separator=" ", shuffle_caption=True) == {"a b", "b a"}


def test_tag_dropout_leaves_kept_parts():
    assert draws("a, b, c", caption_tag_dropout_rate=1.0, keep_tokens=1) == {"a"}
    assert len(draws("a, b, c", caption_tag_dropout_rate=0.5)) == 8


def test_the_secondary_separator_keeps_its_parts_together_while_shuffling():
    seen = draws("a;b, c", shuffle_caption=True, secondary_separator=";")
    assert seen == {"a,b, c", "c, a,b"}


def test_the_rate_of_dropout_is_what_was_asked():
    options = subset(caption_dropout_rate=0.3)
    empty = sum(drawn_caption("a", options, epoch=0, step=0, draw=random.Random(n)) == "" for n in range(2000))
    assert 0.25 < empty / 2000 < 0.35


def test_every_nth_epoch_is_counted_from_one():
    options = subset(caption_dropout_every_n_epochs=3)
    seen = [drawn_caption("a", options, epoch=epoch, step=0, draw=random.Random(0)) for epoch in range(6)]
    assert seen == ["a", "a", "", "a", "a", ""]


def test_dropout_leaves_neither_prefix_nor_suffix():
    options = subset(caption_dropout_rate=1.0, caption_prefix="p", caption_suffix="s")
    assert drawn_caption("a", options, epoch=0, step=0, draw=random.Random(0)) == ""


# Warm-up


def test_warm_up_adds_free_parts_from_the_first_in_a_straight_line():
    seen = [compose("k, a, b, c, d, e", step=step, keep_tokens=1, token_warmup_step=8, token_warmup_min=1) for step in range(10)]
    assert [len(caption.split(", ")) - 1 for caption in seen] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all("k, a, b, c, d, e".startswith(caption) for caption in seen)


def test_warm_up_chooses_before_shuffling():
    assert {compose("a, b, c", seed, shuffle_caption=True, token_warmup_step=5, token_warmup_min=2) for seed in range(50)} == {
        "a, b",
        "b, a",
    }


def test_warm_up_may_begin_with_no_free_part_and_leaves_short_captions_whole():
    assert compose("a, b", token_warmup_step=5, token_warmup_min=0) == ""
    assert compose("a, b", token_warmup_step=5, token_warmup_min=4) == "a, b"


@given(st.integers(0, 40), st.integers(0, 12), st.integers(1, 100), st.integers(1, 20))
def test_warm_up_never_takes_back_a_part_and_ends_with_all(free, least, steps, stride):
    caption = ", ".join(map(str, range(free)))
    seen = [
        compose(caption, step=step, token_warmup_step=steps, token_warmup_min=least)
        for step in [*range(0, steps, stride), steps, steps + 1]
    ]
    assert all(after.startswith(before) for before, after in pairwise(seen))
    assert seen[-2:] == [caption, caption]


# Every caption


def test_every_caption_is_each_line_with_each_choice_and_all_later_steps():
    options = subset(enable_wildcard=True, caption_prefix="p", secondary_separator=";", keep_tokens_separator="|||")
    assert every_caption("a {b|c;d}\ne ||| f", options, 10) == ["p a b", "p a c,d", "p e, f"]


def test_every_caption_without_wildcards_is_the_one():
    assert every_caption("a {b|c}\nd", subset(caption_suffix="s"), 1) == ["a {b|c} s"]


def test_every_caption_names_each_once():
    assert every_caption("{a|b|a}\n{b|a}", subset(enable_wildcard=True), 2) == ["a", "b"]


def test_more_captions_than_asked_for_are_none():
    assert every_caption("{a|b}\nc", subset(enable_wildcard=True), 2) is None
    assert every_caption("{a|b}" * 1000, subset(enable_wildcard=True), 100) is None


def test_every_caption_leaves_out_what_shuffling_and_dropping_would_draw():
    options = subset(enable_wildcard=True, shuffle_caption=True, caption_tag_dropout_rate=0.5, token_warmup_step=10)
    assert every_caption("a, {b|c}, d", options, 10) == ["a, b, d", "a, c, d"]


def test_the_longest_caption_of_each_line_has_its_longest_choices():
    options = subset(enable_wildcard=True, caption_suffix="s", shuffle_caption=True)
    assert longest_captions("{a|{bb|ccc} d}\n{|ee}" + "{a|b}" * 100, options) == ["ccc d s", "ee" + "a" * 100 + " s"]
    assert longest_captions("{a|bb}\nc", subset()) == ["{a|bb}"]


WILD = st.text("ab{}|,; \n", max_size=24)


@given(WILD, st.integers(0, 1000))
def test_what_is_drawn_is_among_every_caption(text, seed):
    options = subset(enable_wildcard=True, caption_prefix="p", secondary_separator=";")
    known = every_caption(text, options, 5000)
    assert known is not None and composed_caption(text, options, random.Random(seed)) in known


@given(WILD)
def test_every_caption_is_drawn_sooner_or_later(text):
    options = subset(enable_wildcard=True)
    known = every_caption(text, options, 4)
    if known is not None:
        assert {composed_caption(text, options, random.Random(seed)) for seed in range(300)} == set(known)


def test_the_options_that_vary_captions_are_named():
    assert varying_options(subset(token_warmup_step=0.1, caption_dropout_rate=0.5, enable_wildcard=True)) == [
        "token_warmup_step",
        "enable_wildcard",
    ]


# All options


TAGS = st.lists(st.text("abcxyz 0-9", min_size=1, max_size=8).map(str.strip).filter(bool), min_size=1, max_size=12)


@given(TAGS, st.integers(0, 12), st.integers(0, 1000))
def test_shuffling_changes_only_the_order(tags, keep, seed):
    parts = compose(",".join(tags), seed, shuffle_caption=True, keep_tokens=keep).split(", ")
    assert sorted(parts) == sorted(tags)
    assert parts[:keep] == tags[:keep]


@given(st.text(max_size=60), st.booleans(), st.booleans(), st.integers(0, 100))
def test_any_text_can_be_composed_and_the_same_draw_gives_the_same_text(text, shuffle, wildcard, seed):
    options = {"shuffle_caption": shuffle, "enable_wildcard": wildcard, "keep_tokens_separator": "|||", "secondary_separator": ";"}
    assert compose(text, seed, **options) == compose(text, seed, **options)
