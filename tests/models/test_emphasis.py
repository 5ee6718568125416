"""Emphasis in captions: brackets and weights."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.models.emphasis import emphasised


def weighed(caption: str) -> list[tuple[str, float]]:
    return [(text, round(weight, 4)) for text, weight in emphasised(caption)]


@pytest.mark.parametrize(
    ("caption", "stretches"),
    [
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("[a] b", [("a", 0.9091), (" b", 1)]),
        ("(a:1.3), b", [("a", 1.3), (", b", 1)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("((a) b:1.5)", [("a", 1.65), (" b", 1.5)]),
        ("[(a)]", [("a", 1)]),
        ("(re:zero)", [("re:zero", 1.1)]),
    ],
)
def test_brackets_weigh_their_words(caption: str, stretches: list[tuple[str, float]]):
    assert weighed(caption) == stretches


def test_a_bracket_after_a_backslash_is_text():
    assert weighed(r"rem \(re:zero\), \[x\], (a\\)") == [("rem (re:zero), [x], ", 1), ("a\\", 1.1)]


def test_a_backslash_elsewhere_stays():
    assert weighed(r"a\b") == [(r"a\b", 1)]


def test_a_bracket_that_nothing_closes_holds_to_the_end():
    assert weighed("a (b [c, d") == [("a ", 1), ("b ", 1.1), ("c, d", 1)]


@pytest.mark.parametrize("caption", ["a) b] c:1.2)", "1:2", ":)", ""])
def test_what_opens_nothing_is_text(caption: str):
    assert weighed(caption) == [(caption, 1)]


def test_empty_brackets_leave_no_text():
    assert weighed("()") == weighed("(:1.3)") == [("", 1)]


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_escaped_text_comes_back(text: str):
    escaped = "".join("\\" + letter if letter in "\\()[]" else letter for letter in text)
    assert weighed(escaped) == [(text, 1)]


@settings(deadline=None, derandomize=True)
@given(st.text("ab()[]:1.\\ ", max_size=30))
def test_neighbours_differ_in_weight(caption: str):
    weights = [weight for _, weight in emphasised(caption)]
    assert all(one != other for one, other in pairwise(weights))
