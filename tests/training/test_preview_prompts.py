"""The prompt files of previews: text, TOML and JSON say the same."""

import json
from pathlib import Path
from typing import cast

import pytest
from small_family import SmallFamily

from library.core.command_line import parse_command_line
from library.core.options import OptionError
from library.core.rules import without_effect
from library.inference.prompts import PromptLine
from library.training.preview_prompts import PreviewLine, read_preview_prompts
from library.training.previews import PreviewOptions, Previews

LINE = "a red cat --n a dog --w 64 --h 96 --d 7 --s 3 --l 2.5 --ss euler_a"
TABLE = {
    "prompt": "a red cat", "negative_prompt": "a dog", "width": 64, "height": 96, "seed": 7, "sample_steps": 3, "scale": 2.5,
    "sample_sampler": "euler_a",
}  # fmt: skip
TOML = """
[prompt]
width = 64
height = 64
sample_steps = 3
[[prompt.subset]]
prompt = "a red cat"
negative_prompt = "a dog"
height = 96
seed = 7
scale = 2.5
sample_sampler = "euler_a"
[[prompt.subset]]
prompt = "a blue dog"
"""


def read(tmp_path: Path, name: str, text: str) -> list[PromptLine]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_preview_prompts(path)


def test_text_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (text,) = read(tmp_path, "p.txt", LINE)
    tables = [*read(tmp_path, "p.json", json.dumps([TABLE, LINE])), read(tmp_path, "p.toml", TOML)[0]]
    assert text.options == PreviewLine(n="a dog", w=64, h=96, d=(7,), s=3, l=2.5, ss="euler_a")
    assert all(line == text for line in tables)


def test_a_subset_wins_over_what_all_share(tmp_path: Path) -> None:
    first, second = read(tmp_path, "p.toml", TOML)
    assert [cast(PreviewLine, line.options).h for line in (first, second)] == [96, 64]
    assert second == PromptLine(prompt="a blue dog", options=PreviewLine(w=64, h=64, s=3))


def test_one_table_without_subsets_is_one_prompt(tmp_path: Path) -> None:
    (line,) = read(tmp_path, "p.toml", "[prompt]\nprompt = 'a cat'\nguidance_scale = 3\nflow_shift = 2")
    assert line == PromptLine(prompt="a cat", options=PreviewLine(g=3.0, fs=2.0))


def test_a_null_of_json_is_an_option_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, "p.json", '[{"prompt": "a cat", "seed": null}]') == [PromptLine(prompt="a cat", options=PreviewLine())]


@pytest.mark.parametrize(
    ("name", "text", "problems"),
    [
        ("p.json", '[{"prompt": "a", "widht": 64}, {"prompt": "b", "seed": "x"}]', ["prompt 1: unknown key 'widht'", "prompt 2 (seed)"]),
        ("p.json", '[{"width": 64}, 5]', ["prompt 1: needs a text under 'prompt'", "prompt 2: needs a text under 'prompt'"]),
        ("p.json", '[{"prompt": "a", "sample_sampler": "eular"}]', ["'eular'"]),
        ("p.json", '["a --q 2"]', ["prompt 1, --q"]),
        ("p.json", '{"prompt": "a"}', ["needs a list of prompts"]),
        ("p.json", "[", ["cannot be read as JSON"]),
        ("p.json", "[]", ["holds no prompt"]),
        ("p.toml", "prompt = 'a'", ["needs one table [prompt]"]),
        ("p.toml", "[prompts]\nprompt = 'a'", ["needs one table [prompt]"]),
        ("p.toml", "[prompt]\n[prompt.subset]\nprompt = 'a'", ["subset must be a list of tables"]),
        ("p.toml", "[prompt", ["p.toml"]),
        ("p.txt", "a cat --ss eular", ["line 1, --ss"]),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, name: str, text: str, problems: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, name, text)
    told = str(caught.value).splitlines()
    assert len(told) == len(problems)
    assert all(problem in line and name in line for problem, line in zip(problems, told, strict=True))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("p.txt", "p.json", "p.toml"):
        with pytest.raises(ValueError, match=f"--sample_prompts .*{name}: no such file"):
            read_preview_prompts(tmp_path / name)


# Samplers of previews


def samplers(family: SmallFamily, tmp_path: Path, text: str, **options: object) -> list[str]:
    path = tmp_path / "p.txt"
    path.write_text(text, encoding="utf-8")
    chosen = PreviewOptions(sample_prompts=str(path), sample_at_first=True, **options)  # pyright: ignore[reportArgumentType]
    return [request.sampler for request in Previews.of(chosen, family.arch, tmp_path, None, 1).requests]


def test_a_line_s_sampler_wins_over_that_of_the_command(sdxl: SmallFamily, tmp_path: Path) -> None:
    text = "a cat --w 64 --h 64\na dog --w 64 --h 64 --ss heun"
    assert samplers(sdxl, tmp_path, text) == ["ddim", "heun"]
    assert samplers(sdxl, tmp_path, text, sample_sampler="k_lms") == ["k_lms", "heun"]


def test_a_flow_has_its_one_sampler_and_refuses_others(anima: SmallFamily, tmp_path: Path) -> None:
    assert samplers(anima, tmp_path, "a cat --w 64 --h 64") == ["euler"]
    with pytest.raises(ValueError, match=r"--sample_prompts .* prompt 1: sampler heun: a flow is followed with 'euler'"):
        samplers(anima, tmp_path, "a cat --w 64 --h 64 --ss heun")
    with pytest.raises(ValueError, match="sampler ddim: a flow is followed with 'euler'"):
        samplers(anima, tmp_path, "a cat --w 64 --h 64", sample_sampler="ddim")


def test_a_sampler_without_prompts_is_said_to_be_in_vain() -> None:
    options = parse_command_line([PreviewOptions], ["--sample_sampler", "heun"], prog="test", about="test")
    assert list(without_effect(options, PreviewOptions.RULES)) == ["--sample_sampler has no effect: there are no --sample_prompts"]


def test_problems_of_a_table_come_together(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        read(tmp_path, "p.json", '[{"prompt": "a", "width": 0, "height": "x"}, {"prompt": "b", "scale": "big"}]')
    prompts = [problem.split("p.json ")[1].split(":")[0] for problem in caught.value.problems]
    assert prompts == ["prompt 1 (height)", "prompt 1", "prompt 2 (scale)"]
