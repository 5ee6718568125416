"""Caption files: which one belongs to an image, and in which encodings they are read."""

import logging
from pathlib import Path

import pytest

from library.data.captions.files import caption_file, decoded, read_caption


def test_the_first_ending_that_is_there_is_read(tmp_path: Path):
    for name in ("a.txt", "a.caption", "b.txt"):
        (tmp_path / name).write_text("x")
    assert caption_file(tmp_path / "a.png", (".caption", ".txt")) == tmp_path / "a.caption"
    assert caption_file(tmp_path / "b.png", (".caption", ".txt")) == tmp_path / "b.txt"
    assert caption_file(tmp_path / "c.png", (".caption", ".txt")) is None


def test_the_place_of_a_face_may_be_left_out_of_the_name(tmp_path: Path):
    (tmp_path / "a_b.txt").write_text("x")
    assert caption_file(tmp_path / "a_b_120_96_80_80.png", (".txt",)) == tmp_path / "a_b.txt"
    assert caption_file(tmp_path / "a_b_120_96_80_x.png", (".txt",)) is None
    (tmp_path / "a_b_120_96_80_80.txt").write_text("x")
    assert caption_file(tmp_path / "a_b_120_96_80_80.png", (".txt",)) == tmp_path / "a_b_120_96_80_80.txt"


def test_a_name_of_four_numbers_alone_is_no_face(tmp_path: Path):
    (tmp_path / ".txt").write_text("x")
    assert caption_file(tmp_path / "_1_2_3_4.png", (".txt",)) is None


def test_only_wildcards_read_further_lines(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n one \n\n two\n")
    assert read_caption(tmp_path / "a.txt", every_line=False) == "one"
    assert read_caption(tmp_path / "a.txt", every_line=True) == "one\ntwo"


def test_only_line_ends_end_a_line(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("a\x0bcat\x85on\u2028a mat\r\ntwo\rthree".encode())
    assert read_caption(tmp_path / "a.txt", every_line=False) == "a\x0bcat\x85on\u2028a mat"
    assert read_caption(tmp_path / "a.txt", every_line=True).split("\n")[1:] == ["two", "three"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding_and_is_not_part_of_the_caption(tmp_path: Path, encoding: str):
    (tmp_path / "a.txt").write_text("caf\u00e9\n\u732b", encoding=encoding)
    assert read_caption(tmp_path / "a.txt", every_line=True) == "caf\u00e9\n\u732b"


@pytest.mark.parametrize("order", ["le", "be"])
def test_both_byte_orders_are_read(order: str):
    assert decoded("\ufeffa cat".encode(f"utf-16-{order}")) == ("a cat", f"utf-16-{order}")


def test_utf16_is_said_once_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x", encoding="utf-16")
        with caplog.at_level(logging.WARNING):
            read_caption(tmp_path / name, every_line=False)
    assert caplog.text.count("UTF-16") == 1 and str(tmp_path) in caplog.text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("caf\u00e9".encode("latin-1"), "not UTF-8 text .*at byte 3.*Latin-1"),
        ("\u732b\u306e\u7d75".encode("shift_jis"), "not UTF-8 text .*Shift-JIS"),
        ("a cat".encode("utf-16-le"), "not UTF-8 text .*zero bytes.*UTF-16 without a byte-order mark"),
        (b"\xff\xfea", "not UTF-16 text .*at byte 2"),
        (b"\x80\xff\x81", "not UTF-8 text"),
    ],
)
def test_a_caption_in_another_encoding_is_named(tmp_path: Path, data: bytes, said: str):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.txt: {said}.*; save it as UTF-8"):
        read_caption(tmp_path / "a.txt", every_line=False)


def test_an_empty_caption_file_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: holds no text.*class_tokens"):
        read_caption(tmp_path / "a.txt", every_line=False)
