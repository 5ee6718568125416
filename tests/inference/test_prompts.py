"""Prompt lines and what they ask for."""

from pathlib import Path

import pytest

from library.core.options import OptionError
from library.inference.prompts import LineOptions, parse_line, read_prompt_file
from library.inference.script import PictureOptions, requests_of
from library.models.architecture import architecture_named

SDXL = architecture_named("sdxl")


def requests(strengths: tuple[float, ...] = (), **options: object) -> list:
    return list(requests_of(PictureOptions(**options), strengths, SDXL))  # pyright: ignore[reportArgumentType]


def test_line_options_are_read() -> None:
    line = parse_line("a cat, --n bad, ugly --w 512 --h 768 --d 1,2 --s 20 --l 7.5 --am 0.5,1", "line 1")
    assert line.prompt == "a cat,"
    assert line.options == LineOptions(n="bad, ugly", w=512, h=768, d=(1, 2), s=20, l=7.5, am=(0.5, 1.0))


def test_a_prompt_may_hold_words_that_look_like_options() -> None:
    assert parse_line("I am a well-known cat - with -- dashes", "x").prompt == "I am a well-known cat - with -- dashes"


def test_bad_lines_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\n\na cat --q 3\na dog --w wide\n")
    with pytest.raises(OptionError) as caught:
        read_prompt_file(path)
    assert len(caught.value.problems) == 2
    assert "line 3, --q" in caught.value.problems[0] and "line 4, --w: 'wide' is not a whole number" in caught.value.problems[1]


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (b"\xff\xfe\xff", "UTF-8"), (b"# nothing\n", "holds no prompt")])
def test_a_prompt_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts.txt: .*{message}"):
        read_prompt_file(path)


def test_a_single_picture_takes_the_seed_itself() -> None:
    assert [request.seed for request in requests(prompt="a cat", seed=7)] == [7]


def test_several_pictures_take_seeds_drawn_from_it() -> None:
    first = [request.seed for request in requests(prompt="a cat", seed=7, images_per_prompt=3)]
    assert first == [request.seed for request in requests(prompt="a cat", seed=7, images_per_prompt=3)]
    assert len(set(first)) == 3 and 7 not in first


def test_a_list_of_seeds_draws_that_many() -> None:
    assert [request.seed for request in requests(prompt="a cat --d 5,6")] == [5, 6]


def test_strengths_of_a_line_repeat_the_last() -> None:
    assert requests((1.0, 1.0, 1.0), prompt="a cat --am 0.5,0.2")[0].strengths == (0.5, 0.2, 0.2)
    with pytest.raises(ValueError, match="there is no network"):
        requests(prompt="a cat --am 0.5")
    with pytest.raises(ValueError, match="2 strengths for 1 networks"):
        requests((1.0,), prompt="a cat --am 0.5,1")


def test_a_size_that_the_family_cannot_draw_names_the_next() -> None:
    with pytest.raises(ValueError, match="width 1000: SDXL draws multiples of 32; try 992"):
        requests(prompt="a cat", W=1000)


def test_prompt_or_file_is_needed() -> None:
    assert list(PictureOptions().check()) == ["give either --prompt or --from_file"]
    assert list(PictureOptions(prompt="a", from_file="b").check())


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(OptionError, match="--prompt: not UTF-8 text"):
        parse_line("a cat\udcff", "--prompt")
