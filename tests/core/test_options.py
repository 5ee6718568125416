"""Options are declared once and read strictly."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from library.core.command_line import markdown_table, parse_command_line, run_script
from library.core.options import Given, OptionError, convert, option, pairs, read_group


@dataclass(kw_only=True, frozen=True)
class Animal:
    """An animal."""

    name: str = option(help="what it is called")
    legs: int = option(4, help="how many")
    weight: float | None = option(None, help="in kilograms")
    voice: Literal["bark", "meow"] = option("bark", help="what it says")
    tame: bool = option(False, help="does it bite")
    foods: tuple[str, ...] = option((), help="what it eats")

    def check(self) -> list[str]:
        """What is wrong."""
        return [] if self.legs >= 0 else [f"--legs {self.legs}: must not be negative"]


def parse(*argv: str, refuse: dict[str, str] | None = None) -> Animal:
    return parse_command_line([Animal], argv, prog="test", about="test", refuse=refuse)[Animal]


def problems(*argv: str, refuse: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(OptionError) as caught:
        parse(*argv, refuse=refuse)
    return caught.value.problems


def test_values_take_the_declared_types() -> None:
    animal = parse("--name", "Rex", "--legs", "3", "--weight", "1e1", "--voice", "meow", "--tame", "--foods", "meat", "fish")
    assert animal == Animal(name="Rex", legs=3, weight=10.0, voice="meow", tame=True, foods=("meat", "fish"))


def test_every_mistake_is_reported_at_once() -> None:
    found = problems("--legz", "3", "--weight", "heavy", "--voice", "moo")
    assert found[0] == "unknown option '--legz'; did you mean '--legs'?"
    assert "--weight: 'heavy' is not a number" in found
    assert any(line.startswith("--voice: unknown choice 'moo'") for line in found)
    assert any(line.startswith("--name is required") for line in found)


def test_a_check_of_the_group_is_an_error_beside_others() -> None:
    assert problems("--name", "Rex", "--legs", "-1") == ["--legs -1: must not be negative"]
    assert problems("--name", "Rex", "--legs", "-1", "--voice", "moo")[1:] == ["--legs -1: must not be negative"]


def test_a_refused_option_says_what_to_use() -> None:
    assert problems("--name", "Rex", "--fur", "long", refuse={"fur": "retired: use --voice"}) == ["--fur: retired: use --voice"]


def test_options_are_not_abbreviated() -> None:
    assert problems("--name", "Rex", "--leg", "3")[0].startswith("unknown option '--leg'")


def test_config_file_stands_below_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[one]\nname = "Rex"\nlegs = 3\n[two]\ntame = true\nfoods = ["meat"]\n')
    animal = parse("--config_file", str(config), "--legs", "2", "--no-tame")
    assert animal == Animal(name="Rex", legs=2, tame=False, foods=("meat",))


def test_config_file_mistakes_name_file_line_and_nearest(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('name = "Rex"\n\nlegz = 3\nweight = "heavy"\nfur = "long"\nclaws = false\n')
    found = problems("--config_file", str(config), refuse={"fur": "retired", "claws": "retired"})
    assert f"{config} line 3 (legz): unknown option 'legz'; did you mean 'legs'?" in found
    assert f"{config} line 4 (weight): 'heavy' is a text, but a number is needed; write it without quotes" in found
    assert f"{config} line 5 (fur): retired" in found
    assert not any("claws" in problem for problem in found), "what is switched off asks for nothing"


@pytest.mark.parametrize(("text", "message"), [("a = ", "config.toml"), (None, "no such file")])
def test_config_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    config = tmp_path / "config.toml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--config_file", str(config))


@pytest.mark.parametrize(("value", "kind", "expected"), [
    ("True", bool, True), ("off", bool, False), ("1e-4", float, 1e-4), ("none", int | None, None), ("[1, 2]", tuple[int, ...], (1, 2)),
    ("1,2", tuple[int, int], (1, 2)), (["a"], tuple[str, ...], ("a",)), ("[r'a{1,2}']", tuple[str, ...], ("a{1,2}",)), (3, float, 3.0),
    ("512,768", int | tuple[int, int], (512, 768)), ("512", int | tuple[int, int], 512),
])  # fmt: skip
def test_convert(value: object, kind: object, expected: object) -> None:
    assert convert(value, kind, "x") == expected


@pytest.mark.parametrize(("value", "kind"), [
    ("maybe", bool), (float("inf"), int), (float("nan"), int), (1.5, int),
    (True, int), (True, float), ("nan", float), (3, str), ("1,2,3", tuple[int, int]), ("x", int | None),
])  # fmt: skip
def test_convert_refuses(value: object, kind: object) -> None:
    with pytest.raises(OptionError, match="^here: "):
        convert(value, kind, "here")


def test_pairs_split_at_the_first_equals_sign() -> None:
    assert pairs(["a=b=c"], "--args") == [Given("a", "b=c", "--args a")]
    assert pairs([" a = b "], "--args") == [Given("a", "b", "--args a")]
    with pytest.raises(OptionError, match="--args: 'ab' is not of the form key=value"):
        pairs(["ab"], "--args")


def test_a_mistake_is_reported_beside_advice_that_names_its_option() -> None:
    refused = {"fur": "retired: use --legs"}
    assert problems("--name", "Rex", "--fur", "--legs", "-1", refuse=refused)[1:] == ["--legs -1: must not be negative"]


def test_a_pair_given_twice_is_refused_not_dropped() -> None:
    with pytest.raises(OptionError, match="--args rates: given 2 times"):
        pairs(["rates=a=1", "x=2", " rates =b=2"], "--args")


def test_read_group_gives_advice_for_names_of_another_place() -> None:
    with pytest.raises(OptionError, match="fur: belongs to the coat"):
        read_group(Animal, pairs(["name=Rex", "fur=long"], "--args"), elsewhere={"fur": "belongs to the coat"})


def test_docs_table_holds_every_option() -> None:
    table = markdown_table([Animal])
    assert "| `--legs` | whole number | 4 | how many |" in table and "bark\\|meow" in table and "required" in table


def test_ctrl_c_ends_a_script_with_its_status_and_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_script(interrupted)
    assert caught.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


def test_what_the_screen_cannot_show_is_printed_as_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    run_script(lambda argv: print("red \U0001f408", flush=True))
    assert screen.buffer.getvalue() == b"red \\U0001f408\n"  # pyright: ignore[reportAttributeAccessIssue]


# Files of options


def write(folder: Path, text: str, name: str = "options.toml") -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


def presets_of(folder: Path, text: str) -> dict[str, Path]:
    return {"small": Path(write(folder, text, "small.toml"))}


def test_a_preset_is_below_the_config_file_and_that_below_the_command_line(tmp_path: Path) -> None:
    presets = presets_of(tmp_path, 'legs = 1\nweight = 1.0\nvoice = "meow"\n')
    config = write(tmp_path, "legs = 2\nweight = 2.0\n")
    argv = ["--name", "Rex", "--preset", "small", "--config_file", config, "--legs", "3"]
    options = parse_command_line([Animal], argv, prog="test", about="test", presets=presets)
    assert options[Animal] == Animal(name="Rex", legs=3, weight=2.0, voice="meow")


def test_a_preset_of_the_users_own_is_a_file(tmp_path: Path) -> None:
    options = parse_command_line(
        [Animal], ["--name", "Rex", "--preset", write(tmp_path, "legs = 7")], prog="t", about="t", presets=presets_of(tmp_path, "")
    )
    assert options[Animal].legs == 7


def test_a_misspelt_preset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--preset: unknown preset 'smal'; did you mean 'small'"):
        parse_command_line([Animal], ["--name", "Rex", "--preset", "smal"], prog="t", about="t", presets=presets_of(tmp_path, ""))


def test_a_mistake_in_a_preset_names_file_and_line(tmp_path: Path) -> None:
    presets = presets_of(tmp_path, "legs = 1\nweigth = 2\n")
    with pytest.raises(OptionError, match=r"small\.toml line 2 \(weigth\): unknown option 'weigth'; did you mean 'weight'"):
        parse_command_line([Animal], ["--name", "Rex", "--preset", "small"], prog="t", about="t", presets=presets)


def test_an_option_twice_in_a_file_is_an_error(tmp_path: Path) -> None:
    config = write(tmp_path, "legs = 2\n[other]\nlegs = 3\n")
    found = problems("--name", "Rex", "--config_file", config)
    assert found == [f"{config} line 3 (legs): given twice; the other is {config} line 1 (legs)"]


@pytest.mark.parametrize("text", ["bark = false\ntalks = true\n", "talks = true\nbark = false\n"])
def test_two_spellings_of_an_option_may_stand_in_a_file_if_one_is_unused(text: str, tmp_path: Path) -> None:
    @dataclass(kw_only=True, frozen=True)
    class Talker:
        """Talker."""

        talks: bool = option(False, help="does it talk", flags=("--talks", "--bark"))

    assert parse_command_line([Talker], ["--config_file", write(tmp_path, text)], prog="t", about="t")[Talker].talks


def test_a_section_may_have_the_name_of_an_option(tmp_path: Path) -> None:
    assert parse("--name", "Rex", "--config_file", write(tmp_path, "[legs]\nlegs = 3\n")).legs == 3


def test_what_names_files_is_for_the_command_line_only(tmp_path: Path) -> None:
    config = write(tmp_path, 'preset = "small"\n')
    assert problems("--name", "Rex", "--config_file", config) == [
        f"{config} line 1 (preset): is for the command line only; leave it out of the file"
    ]


def test_an_empty_name_of_a_file_is_an_error_and_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--config_file .*: is a folder, and a file is needed"):
        parse("--name", "Rex", "--config_file", "")
    with pytest.raises(OptionError, match="--preset: unknown preset ''"):
        parse_command_line([Animal], ["--name", "Rex", "--preset", ""], prog="t", about="t", presets=presets_of(tmp_path, ""))


@pytest.mark.parametrize("number", ["-3", "-0.5", "-1e-4", "-.5E3"])
def test_a_negative_number_is_a_value_and_no_option(number: str) -> None:
    assert parse("--name", "Rex", "--weight", number).weight == float(number)


def test_a_flag_is_switched_off_over_a_file(tmp_path: Path) -> None:
    assert parse("--name", "Rex", "--config_file", write(tmp_path, "tame = true"), "--no-tame").tame is False


def test_a_retired_option_in_a_file_is_refused_unless_it_asks_for_nothing(tmp_path: Path) -> None:
    config = write(tmp_path, "fur = 2\ntail = false\n")
    refuse = {"fur": "retired", "tail": "retired too"}
    assert problems("--name", "Rex", "--config_file", config, refuse=refuse) == [f"{config} line 1 (fur): retired"]


def test_only_what_differs_from_the_default_counts_as_given_in_a_file(tmp_path: Path) -> None:
    config = write(tmp_path, "legs = 4\nweight = 2.0\n")
    argv = ["--name", "Rex", "--config_file", config, "--voice", "bark"]
    assert parse_command_line([Animal], argv, prog="t", about="t").given == {"name", "weight", "voice"}


def test_the_written_config_file_gives_the_same_options_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new.toml"
    argv = ["--name", 'R"x\\ \u00e4', "--weight", "1e-6", "--tame", "--foods", "meat", "fi sh", "--voice", "meow"]
    with pytest.raises(SystemExit) as ended:
        parse(*argv, "--output_config", "--config_file", str(file))
    assert ended.value.code == 0 and str(file) in capsys.readouterr().err
    assert parse("--config_file", str(file)) == parse(*argv)


def test_a_written_config_file_shows_what_is_not_set(tmp_path: Path) -> None:
    file = tmp_path / "new.toml"
    with pytest.raises(SystemExit):
        parse("--name", "Rex", "--output_config", "--config_file", str(file))
    assert "# how many\n# legs = 4\n" in file.read_text()


def test_an_existing_config_file_is_not_written_over(tmp_path: Path) -> None:
    config = write(tmp_path, "legs = 2\n")
    assert problems("--name", "Rex", "--output_config", "--config_file", config) == [
        f"--output_config: {config} exists already; name a new file with --config_file"
    ]


def test_output_config_without_a_file_says_what_it_needs() -> None:
    assert problems("--name", "Rex", "--output_config") == ["--output_config: name the file to write with --config_file"]


@dataclass(kw_only=True, frozen=True)
class Picky:
    """Many choices."""

    colour: Literal["red", "green", "blue", "yellow", "violet", "orange"] = option("red", help="which")


def test_help_shows_long_lists_of_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line([Picky], ["-h"], prog="test", about="test")
    assert "red|green|blue|yellow|violet|orange" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


def test_a_misspelt_negative_flag_is_answered_with_a_negative_one() -> None:
    assert problems("--name", "Rex", "--no-tamed") == ["unknown option '--no-tamed'; did you mean '--no-tame'?"]


def test_sections_in_sections_are_as_free(tmp_path: Path) -> None:
    assert parse("--name", "Rex", "--config_file", write(tmp_path, "[a.b]\nlegs = 2\n")).legs == 2
