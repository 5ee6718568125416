"""The time that files are dated with."""

import pytest

from library.core.clock import dated, now


def test_a_pinned_time_is_the_same_for_everyone(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert now() == 86400.0
    assert dated("%Y-%m-%dT%H:%M:%S") == "1970-01-02T00:00:00"


def test_time_passes_without_a_pin(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert now() > 1.7e9


def test_a_pin_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ValueError, match="SOURCE_DATE_EPOCH=yesterday"):
        now()
