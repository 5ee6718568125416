"""Metadata files: how images are found, how captions and tags become one text, and what is said of mistakes."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from library.core.options import OptionError
from library.data.captions.metadata_files import Described, read_metadata_file
from library.data.options import SubsetOptions


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Files of an image folder; only their names matter here."""
    for name in ("a.png", "b.jpg", "c.d.webp", "more/e.png", "more/f.png", "other/f.png", "g.png", "g.jpg", "h.gif", "i.txt"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "pictures"


def read(pictures: Path | None, content: object, folder: Path | None = None, **options) -> list[Described]:
    """Read content: an object as .json, a list as .jsonl, a text as it is."""
    path = (folder or pictures or Path()).parent / ("meta.jsonl" if isinstance(content, list) else "meta.json")
    lines = "\n".join(map(json.dumps, content)) if isinstance(content, list) else json.dumps(content)
    path.write_text(content if isinstance(content, str) else lines, encoding="utf-8")
    return read_metadata_file(path, pictures, SubsetOptions(image_dir=pictures, **options))


def problems(pictures: Path, content: object, **options) -> list[str]:
    with pytest.raises(OptionError) as error:
        read(pictures, content, **options)
    return [problem.split(": ", 1)[1] for problem in error.value.problems]


def caption(pictures: Path, values: Mapping[str, object], **options) -> str:
    return read(pictures, {"a": values}, **options)[0].caption


# Finding images


@pytest.mark.parametrize("key", ["a.png", "b", "c.d", "c.d.webp", "more/e.png", "more/e", "e", "e.png"])
def test_an_image_is_found_by_path_or_by_name(pictures: Path, key: str):
    (found,) = read(pictures, {key: {"caption": "x"}})
    assert found.path.is_file() and found.path.name.startswith(Path(key).name)


def test_absolute_paths_need_no_image_dir(pictures: Path):
    (found,) = read(None, {str(pictures / "a.png"): {"caption": "x"}}, folder=pictures)
    assert found.path == pictures / "a.png"


def test_paths_from_the_working_directory_are_found(pictures: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(pictures.parent)
    assert read(None, {"pictures/a.png": {"caption": "x"}}, folder=pictures)[0].path == Path("pictures/a.png")
    assert read(pictures, {"pictures/b": {"caption": "x"}})[0].path == Path("pictures/b.jpg")


def test_images_keep_the_order_of_the_file(pictures: Path):
    assert [found.path.stem for found in read(pictures, {key: {"caption": "x"} for key in ("b", "e", "a")})] == ["b", "e", "a"]


def test_images_that_are_missing_ambiguous_doubled_or_unread_are_all_named(pictures: Path):
    said = problems(pictures, {key: {"caption": "x"} for key in ("z", "g", "f", "h.gif", "i.txt", "a", "a.png", "x" * 400)})
    assert said[0] == f"'z': is no image in {pictures}"
    assert said[1].startswith("'g': may be each of ") and "g.jpg" in said[1] and "g.png" in said[1]
    assert "more/f.png" in said[2] and "other/f.png" in said[2]
    assert said[3] == "'h.gif': is of a kind that is not read (convert them to .png)"
    assert said[4] == "'i.txt': is of a kind that is not read (no image)"
    assert said[5] == "'a.png': is given already by 'a'"
    assert said[6].endswith(f"is no image in {pictures}")


def test_a_missing_image_dir_is_named(tmp_path: Path):
    with pytest.raises(OptionError, match=r"nowhere: no such folder \(image_dir of .*meta\.json\)"):
        read(tmp_path / "nowhere", {})


# Text


def test_tags_follow_the_caption(pictures: Path):
    assert caption(pictures, {"caption": "a cat", "tags": "red, small"}) == "a cat, red, small"
    assert caption(pictures, {"caption": "a cat ,", "tags": "red,"}) == "a cat, red,"
    assert caption(pictures, {"caption": "a cat", "tags": "red; small"}, caption_separator=";") == "a cat; red; small"
    assert caption(pictures, {"caption": "a cat,", "tags": "red, small"}, caption_separator=", ") == "a cat, red, small"


def test_half_a_character_is_named(pictures: Path):
    assert problems(pictures, {"a": {"caption": "cat \ud83d"}}) == [
        "'a': caption has half of a character (a lone surrogate); write that character anew"
    ]
    assert caption(pictures, {"caption": "cat \ud83d\ude00"}) == "cat \U0001f600"


def test_caption_or_tags_alone_will_do(pictures: Path):
    assert caption(pictures, {"caption": "a cat", "tags": None}) == "a cat"
    assert caption(pictures, {"caption": "", "tags": "red, small"}) == "red, small"


def test_tags_stand_on_every_line_that_wildcards_may_draw(pictures: Path):
    values = {"caption": "a cat\n\na dog ", "tags": "red,\nsmall"}
    assert caption(pictures, values, enable_wildcard=True) == "a cat, red, small\na dog, red, small"


def test_without_wildcards_the_first_line_keeps_the_tags(pictures: Path):
    assert caption(pictures, {"caption": "\na cat\na dog", "tags": "red"}) == "a cat, red"


def test_an_image_without_text_gets_the_class_tokens_or_is_named(pictures: Path):
    assert caption(pictures, {"tags": " "}, class_tokens="sks cat") == "sks cat"
    assert caption(pictures, {}, class_tokens="") == ""
    assert problems(pictures, {"a": {"captoin": "x"}, "b": {}}) == [
        "'a': has neither caption nor tags (its keys: captoin); write one, or give class_tokens",
        "'b': has neither caption nor tags (its keys: none); write one, or give class_tokens",
    ]


# Sizes


def test_sizes_are_read_in_both_spellings(pictures: Path):
    found = read(
        pictures, [{"image_path": "a", "tags": "x", "image_size": [3, 2]}, {"image_path": "b", "tags": "x", "width": 5, "height": 4}]
    )
    assert [each.size for each in found] == [(3, 2), (5, 4)]
    assert read(pictures, {"a": {"tags": "x"}})[0].size is None


@pytest.mark.parametrize(
    "values", [{"image_size": [1]}, {"image_size": "1x1"}, {"width": 2}, {"image_size": [0, 5]}, {"image_size": [True, 5]}]
)
def test_sizes_of_another_form_are_named(pictures: Path, values: dict[str, object]):
    (said,) = problems(pictures, {"a": {"tags": "x"} | values})
    assert said.startswith("'a': the size must be a width and a height in pixels, not ")


# The files


def test_lines_are_read_with_their_numbers(pictures: Path):
    text = '\n{"image_path": "a", "caption": "x"}\n{"image_path": \n\n[]\n{"caption": "x"}\n{"image_path": "q", "caption": 3}'
    path = pictures.parent / "meta.jsonl"
    path.write_text(text, encoding="utf-8-sig")
    with pytest.raises(OptionError) as error:
        read_metadata_file(path, pictures, SubsetOptions(image_dir=pictures))
    said = [problem.removeprefix(f"{path}: ") for problem in error.value.problems]
    assert said[0].startswith("line 3: is not JSON (")
    assert said[1] == "line 5: must be an object with caption or tags, not []"
    assert said[2] == "line 6: image_path must be the path of an image, not null"
    assert said[3] == "line 7: caption must be a text, not 3"
    assert said[4] == f"line 7: 'q' is no image in {pictures}"


def test_wrong_types_are_named_by_key(pictures: Path):
    said = problems(pictures, {"a": [], "b": {"tags": ["red"]}, "": {"tags": "x"}})
    assert said == [
        "'a': must be an object with caption or tags, not []",
        "'b': tags must be a text, not [\"red\"]",
        "'': image_path must be the path of an image, not \"\"",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {"tags": "x"},\n}', r"is not JSON \(.*line 2 column 1"),
        ("[]", "must hold one object"),
        ('{"a": {"tags": "x"}, "a": {"tags": "y"}}', "'a': the key is there twice"),
        ("{}", "names no images"),
        ("[" * 100_000, r"is not JSON \("),
    ],
)
def test_a_file_that_is_no_table_of_images_is_named(pictures: Path, text: str, said: str):
    with pytest.raises(OptionError, match=rf"meta\.json: {said}"):
        read(pictures, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    options = SubsetOptions(image_dir=tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    for name, said in (("latin.json", "not UTF-8 text"), ("no.json", "cannot be read"), ("meta.toml", r"is neither \.json nor \.jsonl")):
        with pytest.raises(OptionError, match=said):
            read_metadata_file(tmp_path / name, tmp_path, options)


def test_keys_that_are_not_read_are_counted_in_one_warning(pictures: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        read(pictures, {name: {"tags": "x", "train_resolution": [1, 1]} for name in ("a", "b")} | {"e": {"tags": "x", "score": 1}})
    (record,) = caplog.records
    assert record.getMessage().endswith("keys that are not read: train_resolution (2 images), score (1 images)")
