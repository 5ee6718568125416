"""A table has columns as wide as their entries, numbers to the right."""

from tools.screen import table


def test_columns_are_aligned_and_numbers_stand_to_the_right():
    assert table(["name", "size"], [["a", "1"], ["longer", "1,234"]]).splitlines() == ["name     size", "a           1", "longer  1,234"]


def test_a_table_without_rows_is_its_header():
    assert table(["name", "size"], []) == "name  size"
