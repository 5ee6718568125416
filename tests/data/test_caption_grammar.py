"""Wildcards in captions: nested ones, literal braces, braces without their other half."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions.wildcards import drawn_wording, every_wording


def drawn(text: str) -> set[str]:
    return {drawn_wording(text, random.Random(seed)) for seed in range(300)}


@pytest.mark.parametrize(
    ("text", "wordings"),
    [
        ("a {red|blue} {cat|dog}", ["a red cat", "a red dog", "a blue cat", "a blue dog"]),
        ("{a|{b|c} d|}", ["a", "b d", "c d", ""]),
        ("{{a|b} c|d}", ["a c", "b c", "d"]),
        ("{{a|{b|c}}|d}", ["a", "b", "c", "d"]),
        ("{a|{b|{c|d}}}", ["a", "b", "c", "d"]),
        ("{x|{a|b}y}", ["x", "ay", "by"]),
        ("{|a}", ["", "a"]),
        ("{a}", ["a"]),
        ("{a|a|b}", ["a", "b"]),
    ],
)
def test_each_choice_of_each_wildcard_is_drawn(text: str, wordings: list[str]):
    assert every_wording(text, 10) == wordings
    assert drawn(text) == set(wordings)


@pytest.mark.parametrize(
    ("text", "wordings"),
    [
        ("{{a|b}} {c}", ["{a|b} c"]),
        ("{{{a|b}}}", ["{a}", "{b}"]),
        ("{a {{b}}|c}", ["a {b}", "c"]),
        ("{a {{b|c}} d}", ["a {b", "c} d"]),
        ("{x|{y|z {{w}}}}", ["x", "y", "z {w}"]),
        ("{{{a}}|b}", ["{a}", "b"]),
        ("{{{{a}}}}", ["{{a}}"]),
        ("a }} b {{", ["a } b {"]),
    ],
)
def test_doubled_braces_are_literal(text: str, wordings: list[str]):
    assert every_wording(text, 10) == wordings


@pytest.mark.parametrize("text", ["a {b", "a } b", "{}", "a|b", "{a|b", "}{", ":{ smile", "{}|{}"])
def test_a_brace_without_its_other_half_stays_as_typed(text: str):
    assert every_wording(text, 10) == [text]


def test_a_wildcard_that_is_not_closed_leaves_those_in_it():
    assert every_wording("{a|{b|c}", 10) == ["{a|b", "{a|c"]


def test_choices_are_as_likely_as_those_beside_them():
    seen = [drawn_wording("{a|{b|c}}", random.Random(seed)) for seed in range(2000)]
    assert 0.45 < seen.count("a") / 2000 < 0.55
    assert 0.2 < seen.count("b") / 2000 < 0.3


def test_more_wordings_than_asked_for_are_none_without_working_them_out():
    assert every_wording("{a|b}" * 10, 1024) is not None
    assert every_wording("{a|b}" * 10, 1023) is None
    assert every_wording("{a|b}" * 1000 + "{", 1000) is None


def test_thousands_of_nested_wildcards_are_read():
    assert drawn_wording("{a|" * 3000 + "b" + "}" * 3000, random.Random(0)) in {"a", "b"}


TEXT = st.text("ab ,(", max_size=6)
WILDCARD = st.recursive(TEXT, lambda inner: st.lists(inner, min_size=2, max_size=3).map(lambda choices: "{" + "|".join(choices) + "}"))


@given(st.lists(WILDCARD, max_size=4).map(" ".join), st.integers(0, 1000))
def test_what_is_drawn_is_one_of_every_wording_and_holds_no_mark(text: str, seed: int):
    one = drawn_wording(text, random.Random(seed))
    assert not set(one) & set("{|}")
    known = every_wording(text, 2000)
    assert known is None or one in known


@given(st.text("ab{}| ", max_size=30))
def test_text_in_literal_braces_comes_back(text: str):
    literal = text.replace("{", "{{").replace("}", "}}")
    assert drawn_wording(literal, random.Random(0)) == text


@given(st.text(max_size=60), st.integers(0, 100))
def test_any_text_is_read_and_the_same_draw_gives_the_same_wording(text: str, seed: int):
    assert drawn_wording(text, random.Random(seed)) == drawn_wording(text, random.Random(seed))
