"""The doctor's command line, its report and its exit status."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.core.options import OptionError
from library.core.secrets import keep_secret
from tools import doctor
from tools.health.finding import Finding, Patient, fail, ok, warn

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Finding]]:
    """Checks that find what a test says, in place of the real ones."""
    found: dict[str, list[Finding]] = {"first": [ok("a", "is well")], "second": []}
    monkeypatch.setattr(doctor, "CHECKS", {name: lambda patient, name=name: iter(found[name]) for name in found})
    return found


def test_a_healthy_machine_gives_status_0(checks: dict[str, list[Finding]], capsys: pytest.CaptureFixture[str]) -> None:
    checks["second"] = [warn("b", "could be better", "make it better")]
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "OK    a: is well" in shown and "WARN  b: could be better\n      -> make it better" in shown
    assert "1 ok, 1 to look at, 0 failed" in shown


def test_a_failure_gives_status_1(checks: dict[str, list[Finding]], capsys: pytest.CaptureFixture[str]) -> None:
    checks["second"] = [fail("b", "is broken", "mend it")]
    assert doctor.main([]) == 1
    assert "FAIL  b: is broken" in capsys.readouterr().out


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(
    checks: dict[str, list[Finding]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(patient: Patient) -> Iterator[Finding]:
        yield ok("b", "so far")
        raise RuntimeError("no such thing")

    monkeypatch.setitem(doctor.CHECKS, "first", broken)  # type: ignore[arg-type]
    checks["second"] = [ok("c", "is well")]
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "OK    b: so far" in shown and "broke off: RuntimeError: no such thing" in shown and "OK    c: is well" in shown


def test_json_holds_every_finding(checks: dict[str, list[Finding]], capsys: pytest.CaptureFixture[str]) -> None:
    checks["second"] = [fail("b", "is broken", "mend it")]
    doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"ok": 1, "fail": 1}
    assert report["findings"][1] == {"check": "second", "level": "fail", "subject": "b", "text": "is broken", "advice": "mend it"}


def test_what_a_package_prints_does_not_spoil_the_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def greets(patient: Patient) -> Iterator[Finding]:
        print("welcome")
        yield ok("b", "is well")

    monkeypatch.setattr(doctor, "CHECKS", {"greets": greets})
    doctor.main(["--json"])
    assert json.loads(capsys.readouterr().out)["counts"] == {"ok": 1}


def test_checks_can_be_left_out(checks: dict[str, list[Finding]], capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--skip", "first"])
    assert "is well" not in capsys.readouterr().out


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_secret_in_a_finding_is_masked(
    checks: dict[str, list[Finding]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    monkeypatch.setattr("library.core.secrets._secrets", set())
    keep_secret(["hf_aVerySecretToken"])
    checks["second"] = [fail("b", "the hub says: bad token hf_aVerySecretToken", "log in")]
    doctor.main(form)
    shown = capsys.readouterr().out
    assert "bad token ***" in shown and "hf_aVerySecretToken" not in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--skip", "disk"], "did you mean 'disks'"),
        (["--family", "sdlx"], "did you mean 'sdxl'"),
        (["--network_dim", "4"], "--network_dim: is an option of a training script; say of which with --family"),
    ],
)
def test_what_it_does_not_understand_is_refused(argv: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        doctor.main(argv)


@pytest.mark.slow
def test_this_machine_trains_every_family_with_every_algorithm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.doctor", "--json", "--skip", "software", "devices", "attention", "host", "disks", "launching"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    report = json.loads(ran.stdout)
    assert ran.returncode == 0, report
    subjects = " ".join(finding["subject"] for finding in report["findings"])
    assert all(f"{family} with networks.{name}" in subjects for family in ("sdxl", "anima") for name in ("lora", "loha", "lokr"))
