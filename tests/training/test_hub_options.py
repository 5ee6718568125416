"""What the options about the hub refuse, and what has no effect."""

import pytest

from library.core.command_line import OptionSet, parse_command_line
from library.core.options import OptionError
from library.core.rules import without_effect
from library.training.hub import HubOptions
from library.training.hub.fetching import StateAddress


def parsed(*argv: str) -> OptionSet:
    return parse_command_line([HubOptions], argv, prog="test", about="test")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--huggingface_repo_id", "my-lora"], "write it as OWNER/NAME"),
        (["--huggingface_repo_id", "me/my/lora"], "write it as OWNER/NAME"),
        (["--huggingface_path_in_repo", "../up"], "a folder inside the repository"),
        (["--huggingface_path_in_repo", "/top"], "a folder inside the repository"),
        (["--huggingface_token", " "], "is empty"),
        (["--huggingface_repo_type", "modle"], "did you mean 'model'"),
        (["--huggingface_repo_visibility", "secret"], "known: public, private"),
    ],
)
def test_what_cannot_be_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parsed(*given)


def test_every_option_without_effect_is_said() -> None:
    options = parsed(
        "--huggingface_repo_type", "dataset", "--huggingface_path_in_repo", "x", "--huggingface_repo_visibility", "public",
        "--save_state_to_huggingface", "--resume_from_huggingface", "--async_upload",
    )  # fmt: skip
    said = list(without_effect(options, HubOptions.RULES))
    assert {sentence.split(" ")[0] for sentence in said} == {f"--{name}" for name in options.given}


def test_a_token_alone_has_no_effect_and_is_not_said() -> None:
    [said] = without_effect(parsed("--huggingface_token", "hf_abcdef"), HubOptions.RULES)
    assert "--huggingface_token has no effect" in said and "hf_abcdef" not in said


def test_states_are_not_uploaded_where_none_are_saved() -> None:
    [said] = without_effect(parsed("--huggingface_repo_id", "me/x", "--save_state_to_huggingface"), HubOptions.RULES)
    assert "no state is saved" in said


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("me/x/runs/a-state", StateAddress(repository="me/x", folder="runs/a-state")),
        ("me/x/a-state:v2", StateAddress(repository="me/x", folder="a-state", revision="v2")),
        ("me/x/a-state:v2:dataset", StateAddress(repository="me/x", folder="a-state", revision="v2", kind="dataset")),
        ("me/x/a-state::dataset", StateAddress(repository="me/x", folder="a-state", kind="dataset")),
        ("me/x", StateAddress(repository="me/x", folder="")),
    ],
)
def test_an_address_is_read_as_sd_scripts_writes_it(text: str, address: StateAddress) -> None:
    assert StateAddress.parse(text) == address


@pytest.mark.parametrize("text", ["a-state", "me/", "me/x/../../y", "me/x/a:b:c", "me/x/a:b:model:more"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="OWNER/NAME/FOLDER"):
        StateAddress.parse(text)
