"""Tables as text."""

from library.core.text_table import table


def test_numbers_stand_right_and_words_left():
    assert table(["name", "count"], [["a", "1"], ["long name", "1,200"]]) == "name       count\na              1\nlong name  1,200"


def test_a_table_without_rows_is_its_header():
    assert table(["a", "b"], []) == "a  b"
