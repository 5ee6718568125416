"""Image files: which are found, what their headers say, and which of them are broken."""

import io
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from library.data.file_index import FileIndex
from library.data.images import files as image_files
from library.data.images.files import check_whole, files_in, image_endings, measure, read_rgb, read_size, tail_problem, unread_endings

HAS_AVIF = features.check("avif") is True
KINDS = ["png", "jpg", "webp", "bmp", *(["avif"] if HAS_AVIF else [])]


def written(path: Path, size: tuple[int, int] = (40, 20), **options) -> Path:
    Image.fromarray(noise(size)).save(path, **options)
    return path


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise((40, 20))).save(file, {"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


ENCODED = {kind: encoded(kind) for kind in KINDS}


@pytest.fixture
def counted(monkeypatch) -> list[Path]:
    """The files that are opened from now on."""
    opened: list[Path] = []
    pillows = Image.open
    monkeypatch.setattr(image_files.Image, "open", lambda path: (opened.append(path), pillows(path))[1])
    return opened


# Which files there are


def test_files_are_found_in_any_case_and_in_order(tmp_path: Path):
    for name in ("b.PNG", "a.jpeg", "c.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in files_in(tmp_path)] == ["a.jpeg", "b.PNG"]


def test_links_to_images_are_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    written(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "elsewhere" / "nothing.png")
    assert files_in(tmp_path) == [tmp_path / "b.png"]
    assert read_size(tmp_path / "b.png") == (40, 20)


@pytest.mark.parametrize("has_library", [True, False])
def test_a_kind_that_needs_a_library_is_read_or_named_with_it(monkeypatch, has_library):
    libraries = {".avif": has_library, ".jxl": has_library}
    monkeypatch.setattr(image_files, "_read_by_libraries", lambda: libraries)
    assert (libraries.keys() <= image_endings()) is has_library
    assert ("pip install pillow-jxl-plugin" in unread_endings().values()) is not has_library


def test_no_ending_is_both_read_and_unread():
    assert not image_endings() & unread_endings().keys()
    assert {".gif", ".tif", ".heic"} <= unread_endings().keys()


@pytest.mark.skipif(".jxl" not in image_endings(), reason="needs pillow-jxl-plugin")
def test_jxl_is_read(tmp_path):
    assert np.array_equal(np.asarray(read_rgb(written(tmp_path / "a.jxl", lossless=True))), noise((40, 20)))


# Headers


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [kind for kind in KINDS if kind != "bmp"])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(tmp_path / f"a.{ending}", exif=exif)
    assert read_size(path) == read_rgb(path).size == ((40, 20) if orientation < 5 else (20, 40))


def test_damaged_exif_turns_nothing(tmp_path):
    path = written(tmp_path / "a.jpg", exif=b"Exif\0\0no header of a TIFF file")
    assert read_size(path) == read_rgb(path).size == (40, 20)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"hello", "not an image"), (b"", "the file is empty"), (b"\0\0\0\x18ftypheic" + bytes(99), "a HEIC image, .*")]
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.png: cannot be read \({reason}\); replace or remove it"):
        read_size(tmp_path / "a.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: cannot be read \(.*No such file"):
        read_size(tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_size, read_rgb, check_whole])
def test_a_decompression_bomb_is_named_with_its_pixels_and_the_limit(tmp_path, monkeypatch, read):
    path = written(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(ValueError, match=r"a\.png: .*800 pixels.* 600 pixels.*make it smaller"):
        read(path)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.png", "tiff")
    with pytest.raises(ValueError, match=r"a\.png: .*floating-point"):
        read_size(tmp_path / "a.png")


# Bodies


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_not_suspected(tmp_path, kind):
    path = tmp_path / "a.img"
    path.write_bytes(ENCODED[kind])
    assert tail_problem(path) is None
    check_whole(path)


@given(st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_suspected_or_not_an_image(tmp_path_factory, kind, share):
    path = tmp_path_factory.mktemp("cut") / "a.img"
    path.write_bytes(ENCODED[kind][: int(share * len(ENCODED[kind]))])
    assert measure([path])[1] or tail_problem(path)


@given(st.sampled_from(KINDS), st.data())
def test_damage_raises_nothing_but_a_named_problem(tmp_path_factory, kind, data):
    damaged = bytearray(ENCODED[kind])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, min(300, len(damaged) - 1)), st.integers(0, 255)), max_size=4)):
        damaged[place] = value
    path = tmp_path_factory.mktemp("damaged") / "a.img"
    path.write_bytes(damaged)
    sizes, problems = measure([path], whole=True)
    assert sizes.keys() | problems.keys() == {path}
    assert all(str(path) in problem for problem in problems.values())


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_data_behind_the_end_is_no_problem(tmp_path, kind):
    path = tmp_path / "a.img"
    path.write_bytes(ENCODED[kind] + b"a film, or the notes of another program" * 9)
    assert tail_problem(path)
    assert measure([path]) == ({path: (40, 20)}, {})


def test_a_cut_file_is_found_without_decoding_the_others(tmp_path, monkeypatch):
    whole, cut = written(tmp_path / "whole.jpg"), written(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:1000])
    decoded: list[Path] = []
    check = image_files.check_whole
    monkeypatch.setattr(image_files, "check_whole", lambda path: (decoded.append(path), check(path)))
    sizes, problems = measure([whole, cut])
    assert sizes == {whole: (40, 20)}
    assert "cut.jpg: cannot be read" in problems[cut]
    assert decoded == [cut]


def test_a_damaged_middle_is_found_only_where_all_is_decoded(tmp_path):
    path = written(tmp_path / "a.png", (64, 64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    assert measure([path]) == ({path: (64, 64)}, {})
    assert measure([path], whole=True)[1].keys() == {path}


# What is known already


def test_what_the_index_knows_is_not_read_again(tmp_path, counted):
    paths = [written(tmp_path / f"{n}.png") for n in range(3)]
    index = FileIndex(tmp_path)
    first = measure(paths, index=index)
    counted.clear()
    written(paths[1], (30, 50))
    assert measure(paths, index=index)[0] == {**first[0], paths[1]: (30, 50)}
    assert counted == [paths[1]]


def test_a_known_size_is_not_a_known_body(tmp_path, counted):
    paths = [written(tmp_path / "a.png")]
    index = FileIndex(tmp_path)
    measure(paths, index=index)
    counted.clear()
    measure(paths, whole=True, index=index)
    assert counted
    counted.clear()
    measure(paths, whole=True, index=index)
    assert not counted


def test_a_file_that_is_gone_is_a_problem_with_an_index_too(tmp_path):
    path = tmp_path / "a.png"
    assert "No such file" in measure([path], index=FileIndex(tmp_path))[1][path]


# Animations


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_an_animation_is_its_first_frame_and_said_so(tmp_path, caplog, kind):
    path = tmp_path / f"a.{kind}"
    frames = [Image.fromarray(noise((16, 16), n)) for n in range(2)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert measure([path])[0] == {path: (16, 16)}
    assert "1 images are animated; their first frames are used: a." in caplog.text
    assert np.array_equal(np.asarray(read_rgb(path)), noise((16, 16)))


def test_a_camera_file_of_several_pictures_is_no_animation(tmp_path, caplog):
    path = tmp_path / "a.jpg"
    frames = [Image.fromarray(noise((16, 16), n)) for n in range(2)]
    frames[0].save(path, "mpo", save_all=True, append_images=frames[1:])
    assert measure([path])[0] == {path: (16, 16)}
    assert not caplog.records
