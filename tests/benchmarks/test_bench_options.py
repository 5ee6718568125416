"""What the benchmarks say of options that lead nowhere."""

import re
from typing import Any

import pytest

from benchmarks import layers, life, step


@pytest.mark.parametrize("benchmark", [layers, step, life], ids=lambda module: module.__name__)
def test_a_report_of_no_file_is_refused_with_the_place_of_those_that_are_kept(benchmark: Any, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        benchmark.main(["--report", "nowhere.json"])
    assert "--report: there is no file nowhere.json; benchmarks/results/ has those" in capsys.readouterr().err


def test_a_filter_that_is_no_regex_is_said(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        layers.main(["--filter", "["])
    assert re.search(r"--filter: '\[' is no regex: unterminated character set", capsys.readouterr().err)
