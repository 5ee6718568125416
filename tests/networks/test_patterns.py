"""Patterns and the forms that tables of them are written in."""

import json
from pathlib import Path
from typing import Any

import pytest

from networks.patterns import Patterns, pattern_list, pattern_table

HARD = "a{1,2}=b"  # a comma and an equals sign inside


def read(patterns: Patterns) -> list[tuple[str, float]]:
    assert patterns.problems == []
    return [(entry.regex.pattern, entry.value) for entry in patterns.entries]


def test_a_table_of_patterns_may_hold_commas_and_equals_signs():
    assert read(pattern_table("a{1,2}=8, (?=b)b.*=1e-4", "here")) == [("a{1,2}", 8.0), ("(?=b)b.*", 1e-4)]


@pytest.mark.parametrize(
    "value",
    [
        {HARD: 8, r"b\.c": 4},
        '{"a{1,2}=b": 8, "b\\\\.c": 4}',
        r"{'a{1,2}=b' = 8, 'b\.c' = 4}",
        r"{'a{1,2}=b': 8, r'b\.c': 4}",
    ],
    ids=["dict", "json", "toml", "python"],
)
def test_a_table_is_read_in_every_notation(value: Any):
    assert read(pattern_table(value, "here")) == [(HARD, 8.0), (r"b\.c", 4.0)]


def test_a_table_is_read_from_a_file_in_its_order(tmp_path: Path):
    json_file, toml_file = tmp_path / "ranks.json", tmp_path / "RANKS.TOML"
    json_file.write_text(json.dumps({"z.*": 1, HARD: 8}), encoding="utf-8")
    toml_file.write_text(f"'z.*' = 1\n'{HARD}' = 8\n", encoding="utf-8")
    for file in (json_file, toml_file):
        assert read(pattern_table(str(file), "here")) == [("z.*", 1.0), (HARD, 8.0)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no/such/table.json", "here 'no/such/table.json': there is no such file"),
        ("{'a': 8", "here '{'a': 8': is no table in the notation of JSON, TOML or Python"),
        ("{[]: 8}", "is no table in the notation"),
        ("a=8,b=2,a=4", "a regex is given twice"),
        ("a=8,b", "must be of the form regex=number,regex=number"),
        ({"a": True}, "here 'a': True is not a number"),
        ({"a": "nan"}, "here 'a': 'nan' is not a number"),
        ({"a": {"b": 8}}, "put quotes around a regex that holds dots"),
        ({" ": 8}, "a regular expression is needed, and it must not be empty"),
        ({"a(": 8}, "here 'a(': not a regular expression"),
        ({"a": None}, "here 'a': None is not a number"),
    ],
)
def test_a_table_that_makes_no_sense_says_where(value: Any, words: str):
    assert words in "\n".join(pattern_table(value, "here").problems)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path):
    (tmp_path / "a.json").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "b.toml").write_text("input_blocks.4 = 8", encoding="utf-8")
    assert "the file holds no table" in pattern_table(str(tmp_path / "a.json"), "here").problems[0]
    assert "put quotes around a regex that holds dots" in pattern_table(str(tmp_path / "b.toml"), "here").problems[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("['.*a', r'b\\.c']", [".*a", r"b\.c"]),
        (".*a, b.*", [".*a", "b.*"]),
        ("x{1,2}", ["x{1,2}"]),
        ("[ab]x{1,2}", ["[ab]x{1,2}"]),
        ("  ", []),
        ((), []),
    ],
)
def test_a_list_is_read_in_every_notation(value: Any, expected: list[str]):
    assert [text for text, _ in read(pattern_list(value, "here"))] == expected


@pytest.mark.parametrize("value", ["['a', 1]", "['a', '']", ["a", None]])
def test_a_list_holds_texts_only(value: Any):
    assert "a regular expression is needed" in pattern_list(value, "here").problems[0]


def test_a_blank_table_is_empty():
    assert read(pattern_table("  ", "here")) == read(pattern_table(None, "here")) == read(pattern_table({}, "here")) == []


def test_a_module_path_is_a_second_spelling():
    (entry,) = pattern_list("down_blocks.1.*", "here").entries
    assert entry.matches("input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in")
    assert not entry.matches("input_blocks.1.1.proj_in", "down_blocks.0.attentions.0.proj_in")


def test_all_but_some_is_said_of_canonical_names_only():
    (entry,) = pattern_list("(?!input_blocks).*", "here").entries
    assert not entry.matches("input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in")
    assert entry.matches("output_blocks.4.1.proj_in", "up_blocks.1.attentions.0.proj_in")


def test_the_first_match_counts():
    patterns = pattern_table("a.*=1,.*=2", "here")
    assert [entry.value for entry in (patterns.first("ab"), patterns.first("b")) if entry] == [1.0, 2.0]
