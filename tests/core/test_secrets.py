"""Tokens leave everything that is shown."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from library.core.secrets import HidingFormatter, hidden, keep_secret

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_aVerySecretToken"


@pytest.fixture(autouse=True)
def no_secrets_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.core.secrets._secrets", set())
    monkeypatch.setattr(sys, "argv", ["script", "--token", TOKEN, f"--token={TOKEN}", "--other"])


def test_a_secret_is_masked_wherever_it_stands() -> None:
    keep_secret([TOKEN, None])
    assert hidden(f"Bearer {TOKEN}: refused") == "Bearer ***: refused"


def test_what_is_too_short_for_a_token_masks_nothing() -> None:
    keep_secret(["a", ""])
    assert hidden("a cat") == "a cat"


def test_signatures_of_links_are_masked() -> None:
    assert hidden("403 for https://host/file?sig=abc&x=1 (sorry)") == "403 for https://host/file?*** (sorry)"


def test_arguments_hold_no_secret_any_more() -> None:
    keep_secret([TOKEN])
    assert sys.argv == ["script", "--token", "***", "--token=***", "--other"]


def test_log_lines_and_their_tracebacks_hold_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    keep_secret([TOKEN])
    try:
        raise RuntimeError(f"bad {TOKEN}")
    except RuntimeError:
        logging.getLogger("hadron").warning("with %s", TOKEN, exc_info=True)
    line = HidingFormatter().format(caplog.records[0])
    assert "with ***" in line and "RuntimeError: bad ***" in line and TOKEN not in line


@pytest.mark.skipif(sys.platform != "linux", reason="titles are read from /proc")
def test_the_title_of_the_process_holds_no_secret() -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.'); from library.core.secrets import keep_secret;"
        "keep_secret([sys.argv[2]]); print(Path('/proc/self/cmdline').read_text())"
    )
    title = subprocess.run([sys.executable, "-c", code, "--token", TOKEN, "--other"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert TOKEN not in title.stdout and "--other" in title.stdout and "*" * len(TOKEN) in title.stdout
