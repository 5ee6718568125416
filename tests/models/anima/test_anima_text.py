"""Captions to ids, ids to Qwen3's states."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from small_anima import build_small_anima, write_qwen_tokenizer, write_t5_tokenizer
from torch import Tensor, nn

from library.models.anima.text import LENGTH, encode_text, overlong, tokenize
from library.models.anima.tokenizers import Tokenizer, find_tokenizers

CAPTION = "a photo of the red cat"
LONG = " ".join(["the blue dog"] * 200)
NOT_ASCII = "caf\u00e9 \u732b \ufb01ne e\u0301"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_qwen_tokenizer(folder / "qwen3.tokenizer")
    write_t5_tokenizer(folder / "dit.t5_tokenizer")
    return find_tokenizers(folder / "qwen3.safetensors", None, folder / "dit.safetensors")


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return build_small_anima().text_encoder


def states(encoder: nn.Module, tokenizers: list[Tokenizer], captions: list[str], **lengths: int) -> dict[str, Tensor]:
    return encode_text(encoder, tokenize(tokenizers, captions, **lengths))


def unpadded(encoder: nn.Module, tokenizers: list[Tokenizer], caption: str) -> Tensor:
    """The states of one caption alone, without any padding."""
    model: Any = encoder
    return model(input_ids=torch.tensor([tokenizers[0](caption)])).last_hidden_state[0]


def test_ids_and_masks_are_padded_to_the_length_on_the_right(tokenizers: list[Tokenizer]):
    tokens = tokenize(tokenizers, [CAPTION, LONG])
    for name, tokenizer in zip(("qwen", "t5"), tokenizers, strict=True):
        ids, mask = tokens[f"{name}_ids"], tokens[f"{name}_mask"]
        words = tokenizer(CAPTION)
        assert ids.shape == mask.shape == (2, LENGTH) and ids.dtype == mask.dtype == torch.int64
        assert ids[0].tolist() == words + [tokenizer.pad] * (LENGTH - len(words))
        assert mask[0].tolist() == [1] * len(words) + [0] * (LENGTH - len(words))


def test_an_empty_caption_is_no_token_of_qwen_and_the_end_of_t5(tokenizers: list[Tokenizer]):
    tokens = tokenize(tokenizers, [""])
    assert tokens["qwen_mask"].sum() == 0
    assert tokens["t5_ids"][0].tolist() == [1] + [0] * (LENGTH - 1)
    assert tokens["t5_mask"][0].tolist() == [1] + [0] * (LENGTH - 1)


def test_a_caption_beyond_the_length_is_cut_and_keeps_its_end(tokenizers: list[Tokenizer]):
    tokens = tokenize(tokenizers, [LONG], 8, 6)
    assert tokens["qwen_ids"][0].tolist() == tokenizers[0](LONG)[:8]
    assert tokens["t5_ids"][0].tolist() == [*tokenizers[1](LONG)[:5], 1]


def test_cut_captions_are_said_once_with_the_option_that_keeps_more(tokenizers: list[Tokenizer], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        tokenize(tokenizers, [LONG, LONG])
        tokenize(tokenizers, [LONG])
    assert sorted(record.message.split()[-3] for record in caplog.records) == ["--qwen3_max_token_length", "--t5_max_token_length"]


def test_a_higher_limit_keeps_a_long_caption(tokenizers: list[Tokenizer], caplog: pytest.LogCaptureFixture):
    counts = [len(tokenizer(LONG)) for tokenizer in tokenizers]
    assert min(counts) > LENGTH
    tokens = tokenize(tokenizers, [LONG], *counts)
    assert tokens["qwen_mask"].all() and tokens["t5_mask"].all() and not caplog.records


def test_overlong_counts_what_is_cut_by_the_tokenizer_that_cuts_more(tokenizers: list[Tokenizer]):
    qwen, t5 = (len(tokenizer(LONG)) for tokenizer in tokenizers)
    assert overlong(tokenizers, [CAPTION, "", LONG]) == [0, 0, max(qwen, t5) - LENGTH]
    assert overlong(tokenizers, [LONG], qwen - 3, t5 - 5) == [5]
    assert overlong(tokenizers, [LONG], qwen, t5) == [0]


def test_captions_that_are_not_ascii_come_back(tokenizers: list[Tokenizer]):
    assert tokenizers[0].backend.decode(tokenizers[0](NOT_ASCII)) == "caf\u00e9 \u732b \ufb01ne \u00e9"


def test_states_in_a_batch_equal_those_without_padding(encoder: nn.Module, tokenizers: list[Tokenizer]):
    captions = [CAPTION, NOT_ASCII, "dog"]
    with torch.no_grad():
        found = states(encoder, tokenizers, captions)
        for row, caption in enumerate(captions):
            wanted = unpadded(encoder, tokenizers, caption)
            torch.testing.assert_close(found["hidden_states"][row, : len(wanted)], wanted, atol=1e-6, rtol=1e-6)


def test_states_are_as_long_as_the_ids_and_zero_outside_the_mask(encoder: nn.Module, tokenizers: list[Tokenizer]):
    found = states(encoder, tokenizers, [CAPTION, "dog"])
    assert found["hidden_states"].shape[:2] == found["mask"].shape == (2, LENGTH)
    assert (found["hidden_states"][found["mask"] == 0] == 0).all()
    assert (found["hidden_states"][found["mask"] == 1] != 0).any(dim=-1).all()


def test_states_equal_the_models_own_masking(encoder: nn.Module, tokenizers: list[Tokenizer]):
    tokens = tokenize(tokenizers, [CAPTION, "the dog"], 32, 32)
    model: Any = encoder
    with torch.no_grad():
        wanted = model(input_ids=tokens["qwen_ids"], attention_mask=tokens["qwen_mask"]).last_hidden_state
        found = encode_text(encoder, tokens)["hidden_states"]
    torch.testing.assert_close(found, wanted * tokens["qwen_mask"].unsqueeze(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("captions", [["", ""], ["", CAPTION]], ids=["all empty", "one empty"])
def test_an_empty_caption_has_finite_states(encoder: nn.Module, tokenizers: list[Tokenizer], captions: list[str]):
    found = states(encoder, tokenizers, captions)["hidden_states"]
    assert found.isfinite().all() and (found[0] == 0).all()


def test_t5_ids_and_masks_pass_as_given(encoder: nn.Module, tokenizers: list[Tokenizer]):
    tokens = tokenize(tokenizers, [CAPTION])
    found = encode_text(encoder, tokens)
    assert set(found) == {"hidden_states", "mask", "t5_ids", "t5_mask"}
    assert all(
        torch.equal(found[name], tokens[source]) for name, source in (("mask", "qwen_mask"), ("t5_ids", "t5_ids"), ("t5_mask", "t5_mask"))
    )


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_gradients_equal_those_without_padding(tokenizers: list[Tokenizer], checkpointed: bool):
    model: Any = build_small_anima().text_encoder.requires_grad_(True).train()
    unpadded(model, tokenizers, CAPTION).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    if checkpointed:
        model.gradient_checkpointing_enable()
    states(model, tokenizers, [CAPTION, ""])["hidden_states"].square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-4)


def test_half_precision_states_keep_the_encoders_dtype(tokenizers: list[Tokenizer]):
    model = build_small_anima().text_encoder.to(torch.bfloat16)
    assert states(model, tokenizers, ["dog"], qwen_length=8)["hidden_states"].dtype is torch.bfloat16


def test_tokenizers_travel_to_worker_processes(tokenizers: list[Tokenizer], tmp_path: Path):
    import pickle

    assert [tokenizer(CAPTION) for tokenizer in pickle.loads(pickle.dumps(tokenizers))] == [tokenizer(CAPTION) for tokenizer in tokenizers]
