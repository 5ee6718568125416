"""Captions: what is read, and what the model reads at each use."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import composed_caption, drawn_caption, read_caption
from library.data.options import SubsetOptions


def compose(caption: str, seed: int = 0, **options) -> str:
    return composed_caption(caption, SubsetOptions(image_dir=Path("x"), **options), random.Random(seed))


def draws(caption: str, **options) -> set[str]:
    return {compose(caption, seed, **options) for seed in range(200)}


def test_a_caption_is_left_as_typed_when_nothing_is_asked():
    assert compose("a ,b,,  c {x|y}") == "a ,b,,  c {x|y}"


def test_prefix_and_suffix_are_joined_by_a_space():
    assert compose("a, b", caption_prefix="best,", caption_suffix="end") == "best, a, b end"


def test_prefix_and_suffix_are_on_every_line():
    assert draws("a\nb", caption_prefix="p", caption_suffix="s", enable_wildcard=True) == {"p a s", "p b s"}


def test_a_wildcard_draws_each_of_its_choices():
    assert draws("a {red|blue} {cat|dog}", enable_wildcard=True) == {"a red cat", "a red dog", "a blue cat", "a blue dog"}


def test_doubled_braces_are_literal():
    assert draws("{{a|b}} {c}", enable_wildcard=True) == {"{a|b} c"}


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


def test_tag_dropout_leaves_kept_parts():
    assert draws("a, b, c", caption_tag_dropout_rate=1.0, keep_tokens=1) == {"a"}
    assert len(draws("a, b, c", caption_tag_dropout_rate=0.5)) == 8


def test_the_secondary_separator_keeps_its_parts_together_while_shuffling():
    seen = draws("a;b, c", shuffle_caption=True, secondary_separator=";")
    assert seen == {"a,b, c", "c, a,b"}


def test_the_rate_of_dropout_is_what_was_asked():
    options = SubsetOptions(image_dir=Path("x"), caption_dropout_rate=0.3)
    empty = sum(drawn_caption("a", options, epoch=0, draw=random.Random(n)) == "" for n in range(2000))
    assert 0.25 < empty / 2000 < 0.35


def test_every_nth_epoch_is_counted_from_one():
    options = SubsetOptions(image_dir=Path("x"), caption_dropout_every_n_epochs=3)
    seen = [drawn_caption("a", options, epoch=epoch, draw=random.Random(0)) for epoch in range(6)]
    assert seen == ["a", "a", "", "a", "a", ""]


def test_dropout_leaves_neither_prefix_nor_suffix():
    options = SubsetOptions(image_dir=Path("x"), caption_dropout_rate=1.0, caption_prefix="p", caption_suffix="s")
    assert drawn_caption("a", options, epoch=0, draw=random.Random(0)) == ""


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


def test_a_byte_order_mark_is_not_part_of_the_caption(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffcaf\u00e9".encode())
    assert read_caption(tmp_path / "a.txt", every_line=False) == "caf\u00e9"


def test_only_wildcards_read_further_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\n one \n\n two\n")
    assert read_caption(tmp_path / "a.txt", every_line=False) == "one"
    assert read_caption(tmp_path / "a.txt", every_line=True) == "one\ntwo"


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
        read_caption(tmp_path / "a.txt", every_line=False)


def test_an_empty_caption_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: holds no text"):
        read_caption(tmp_path / "a.txt", every_line=False)
