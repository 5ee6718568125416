"""The benchmark of whole steps: copies of one model, adapted in different ways, take the same steps."""

import pytest
import torch

from benchmarks.peers import OURS, SD_SCRIPTS
from benchmarks.results import FROZEN, Rows
from benchmarks.shapes import LOHA_8, LORA_16
from benchmarks.step import measure, report
from benchmarks.step_models import SUBJECTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> Rows:
    subject = SUBJECTS["tiny"]["SDXL"](1, "cpu", torch.float32)
    lineup = [(setting, way) for setting in (LORA_16, LOHA_8) for way in (OURS, SD_SCRIPTS)]
    return Rows(measure(subject, "tiny", lineup, seconds=0))


def test_both_ways_learn_the_same(rows: Rows) -> None:
    for setting in (LORA_16.title, LOHA_8.title):
        losses = [row.facts["loss"] for row in rows if row.setting == setting]
        assert len(losses) == 2
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_frozen_model_is_untouched_by_its_copies(rows: Rows) -> None:
    frozen = rows.find("tiny", "float32", "", FROZEN)
    assert frozen is not None
    assert frozen.facts["layers"] == 0
    assert all(row.kernels > frozen.kernels for row in rows if row.way != FROZEN)


def test_the_report_has_every_setting(rows: Rows) -> None:
    text = report(rows)
    assert LORA_16.title in text
    assert LOHA_8.title in text
