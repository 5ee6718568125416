"""Kinds of files, told from their keys, in the words of the family that was asked."""

from pathlib import Path

import pytest

import library.models
from library.models import lookalikes
from library.models.anima.lookalikes import ENCODER
from library.models.lookalikes import seems_to_be

QWEN3 = ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.weight"]


def test_a_family_s_own_file_comes_with_its_option_and_another_s_with_its_script():
    assert seems_to_be(QWEN3, "anima", "give Anima's") == (
        "it seems to be a Qwen3 text encoder; give it to --qwen3 (--text_encoder for anima_minimal_inference.py)"
    )
    assert seems_to_be(QWEN3, "sdxl", "give SDXL's") == "it seems to be a Qwen3 text encoder; that is a file for anima_train_network.py"


def test_what_was_asked_for_and_what_nobody_knows_are_not_said():
    assert seems_to_be(QWEN3, "anima", "give Anima's", asked=ENCODER) is None
    assert seems_to_be(["something.else"], "anima", "give Anima's") is None


def test_a_kind_that_no_family_has_comes_with_the_family_s_advice():
    keys = ["double_blocks.0.img_attn.qkv.weight"]
    assert seems_to_be(keys, "sdxl", "give SDXL's") == "it seems to be a Stable Diffusion 3, Flux or similar transformer; give SDXL's"


def test_a_family_may_know_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "__init__.py").write_text('"""A family without lookalikes."""\n', encoding="utf-8")
    monkeypatch.setattr(library.models, "__path__", [*library.models.__path__, str(tmp_path)])
    assert "plain" not in lookalikes._families()
    assert seems_to_be(["x"], "sdxl", "give SDXL's") is None
