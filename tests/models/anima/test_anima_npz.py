"""sd-scripts' caches of Anima: its names and shapes, and states as ours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from library.core.command_line import parse_command_line
from library.data.caches.npz import read_text
from library.models.anima.npz import NAMES
from library.models.anima.spec import ARCHITECTURE, ModelOptions

CPU = torch.device("cpu")


def test_states_of_sd_scripts_come_out_as_ours(small_model_options: Any, tmp_path: Path):
    given = [*small_model_options("anima"), "--qwen3_max_token_length", "24", "--t5_max_token_length", "20"]
    options = parse_command_line([ModelOptions], given, prog="test", about="test")[ModelOptions]
    encoders, tokenizers = ARCHITECTURE.load_text(options, device=CPU, dtype=torch.float32)
    states = ARCHITECTURE.encode_text(encoders, ARCHITECTURE.tokenize(tokenizers, ["a red cat"], options))
    arrays: dict[str, Any] = {stored: states[name][0].numpy() for stored, name in NAMES.items()}
    arrays |= {stored: array.astype(np.int32) for stored, array in arrays.items() if stored != "prompt_embeds"}
    np.savez(tmp_path / "a_anima_te.npz", **arrays, caption_dropout_rate=np.float32(0.5))
    npz = ARCHITECTURE.npz_text(encoders, options)
    assert {name: arrays[name].shape for name in npz.shapes} == dict(npz.shapes)
    found = read_text(tmp_path / f"a{npz.suffix}", npz)
    assert found.keys() == states.keys()
    assert all(torch.equal(found[name], tensor[0]) and found[name].dtype == tensor.dtype for name, tensor in states.items())


def test_latents_are_stored_as_the_model_wants_them():
    stored = torch.randn(16, 4, 4)
    assert torch.equal(ARCHITECTURE.npz_latents().ready(stored), stored)
