"""Prompts from the keyboard: what goes wrong with a line is said, and the next is asked for."""

import logging
from collections.abc import Callable

import pytest
import torch

from library.inference.minimal.interactive import converse

Answers = Callable[..., None]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Sets what is typed: lines, and exceptions for what keys raise."""

    def typed(*lines: str | type[BaseException]) -> None:
        rest = iter(lines)

        def ask(prompt: str) -> str:
            line = next(rest)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", ask)

    return typed


@pytest.mark.parametrize("end", ["", "  ", "\x04", "\x1a", EOFError, KeyboardInterrupt])
def test_an_empty_line_and_the_end_of_input_end(end: str | type[BaseException], answers: Answers) -> None:
    drawn: list[str] = []
    answers("a cat ", end, "a dog")
    converse(drawn.append)
    assert drawn == ["a cat"]


@pytest.mark.parametrize(("error", "said"), [
    (ValueError("one\ntwo"), ["one", "two"]),
    (torch.OutOfMemoryError("CUDA out of memory\ndetails"), ["too large for the device's memory: CUDA out of memory"]),
    (KeyboardInterrupt(), ["interrupted"]),
])  # fmt: skip
def test_what_goes_wrong_is_said_and_the_next_line_is_drawn(
    error: BaseException, said: list[str], answers: Answers, caplog: pytest.LogCaptureFixture
) -> None:
    drawn: list[str] = []

    def draw(line: str) -> None:
        if line == "bad":
            raise error
        drawn.append(line)

    answers("bad", "good", EOFError)
    converse(draw)
    assert drawn == ["good"]
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == said


def test_other_errors_are_not_swallowed(answers: Answers) -> None:
    def draw(line: str) -> None:
        raise RuntimeError("a fault of ours")

    answers("a cat")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        converse(draw)
