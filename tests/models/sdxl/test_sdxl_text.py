"""SDXL's text: vocabularies and where they are found, token ids, chunks, hidden states."""

import copy
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.models.sdxl import text, vocabulary
from library.models.sdxl.keymap import text_level
from library.models.sdxl.vocabulary import find_vocabularies

GOLDEN = json.loads((Path(__file__).parent / "data" / "clip_ids.json").read_text(encoding="utf-8"))
needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip_torch has the vocabulary")


@pytest.fixture
def encoders(small_sdxl_modules: SimpleNamespace) -> list[nn.Module]:
    return [small_sdxl_modules.text_encoder_1, small_sdxl_modules.text_encoder_2]


@pytest.fixture
def tokenizers(encoders: list[nn.Module], small_sdxl_file: Path) -> list[Any]:
    return text.build_tokenizers(find_vocabularies(small_sdxl_file), encoders)


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither open_clip_torch nor the hub is there."""
    monkeypatch.setattr(vocabulary, "_in_package", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def clip_tokenizers() -> list[Any]:
    """Both tokenizers with CLIP's own vocabulary."""
    encoder = SimpleNamespace(config=SimpleNamespace(vocab_size=49408, max_position_embeddings=77))
    pair = vocabulary._in_package()
    assert pair is not None
    return text.build_tokenizers(pair, [encoder, encoder])  # pyright: ignore[reportArgumentType]


# Token ids


@needs_open_clip
@pytest.mark.parametrize(("caption", "ids"), GOLDEN, ids=lambda value: ascii(value) if isinstance(value, str) else "")
def test_ids_are_those_of_the_original_clip_tokenizer(clip_tokenizers: list[Any], caption: str, ids: list[int]):
    for key, tokens in text.tokenize(clip_tokenizers, [caption], 75).items():
        assert tokens[0, 0, : len(ids) + 2].tolist() == [49406, *ids, 49407], key


@needs_open_clip
def test_the_first_tokenizer_pads_with_the_end_and_the_second_with_zero(clip_tokenizers: list[Any]):
    tokens = text.tokenize(clip_tokenizers, ["wow! a cat!"], 75)
    assert tokens["ids_1"][0, 0, :7].tolist() == tokens["ids_2"][0, 0, :7].tolist()  # "!" keeps its id although id 0 pads
    assert set(tokens["ids_1"][0, 0, 7:].tolist()) == {49407}
    assert set(tokens["ids_2"][0, 0, 7:].tolist()) == {0}


@pytest.mark.parametrize(("words", "chunks"), [(0, [0, 0]), (74, [74, 0]), (75, [75, 0]), (76, [75, 1]), (150, [75, 75]), (151, [75, 75])])
def test_captions_are_cut_into_whole_chunks(tokenizers: list[Any], words: int, chunks: list[int]):
    begin, end = tokenizers[0].bos_token_id, tokenizers[0].eos_token_id
    for key, pad in (("ids_1", end), ("ids_2", 0)):
        ids = text.tokenize(tokenizers, ["cat " * words], 150)[key]
        word = tokenizers[0].convert_tokens_to_ids("cat</w>")
        assert ids[0].tolist() == [[begin, *[word] * n, end, *[pad] * (75 - n)] for n in chunks]


def test_too_long_captions_are_said_once(tokenizers: list[Any], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            text.tokenize(tokenizers, ["cat " * 100, "dog " * 100], 75)
    assert caplog.text.count("more than 75 tokens are cut") == 1


# Weighted captions


def test_weights_stand_at_the_words_in_the_brackets(tokenizers: list[Any]):
    tokens = text.tokenize(tokenizers, ["a (red:1.5) cat", "dog"], 75, weighted=True)
    plain = text.tokenize(tokenizers, ["a red cat", "dog"], 75)
    for n in (1, 2):
        assert torch.equal(tokens[f"ids_{n}"], plain[f"ids_{n}"])
        weights = tokens[f"weights_{n}"]
        assert weights.dtype is torch.float32 and weights.shape == plain[f"ids_{n}"].shape
        assert weights[0, 0, :6].tolist() == [1, 1, 1.5, 1, 1, 1] and (weights != 1).sum() == 1


def test_weights_are_cut_into_chunks_with_their_words(tokenizers: list[Any]):
    weights = text.tokenize(tokenizers, ["(" + "cat " * 80 + ":2)" + "dog " * 100], 150, weighted=True)["weights_1"]
    assert weights[0].tolist() == [[1, *[2] * 75, 1], [1, *[2] * 5, *[1] * 71]]


def test_weights_are_in_the_tokens_only_when_asked_for(tokenizers: list[Any]):
    assert set(text.tokenize(tokenizers, ["(cat)"], 75)) == set(text.IDS)


def test_brackets_and_weights_are_not_counted_as_words(tokenizers: list[Any]):
    captions = ["(cat:1.2) " * 76, r"\(cat\)", "()"]
    assert text.overlong(tokenizers, captions, 75, weighted=True) == [1, 0, 0]
    assert text.overlong(tokenizers, captions, 75)[0] > 76


def test_an_empty_caption_can_be_weighted(tokenizers: list[Any]):
    tokens = text.tokenize(tokenizers, ["", "()"], 75, weighted=True)
    assert torch.equal(tokens["ids_1"][0], tokens["ids_1"][1]) and (tokens["weights_1"] == 1).all()


def test_a_vocabulary_of_another_size_is_refused(encoders: list[nn.Module], small_sdxl_file: Path):
    pair = find_vocabularies(small_sdxl_file)
    shorter = vocabulary.from_merges(pair[0].merges[:-1], "elsewhere")
    with pytest.raises(ValueError, match=r"tokenizer in elsewhere has \d+ tokens, text encoder 2 embeds"):
        text.build_tokenizers((pair[0], shorter), encoders)


# Where vocabularies are found


def words(pair: vocabulary.Pair) -> list[int]:
    return [len(entry.ids) for entry in pair]


@pytest.fixture
def folder(small_sdxl_file: Path, tmp_path: Path) -> Path:
    """A folder with the small tokenizer's two files."""
    return Path(shutil.copytree(small_sdxl_file.with_name("small.tokenizer"), tmp_path / "given"))


def test_the_given_folder_wins(folder: Path, small_sdxl_file: Path):
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(ids | {"extra</w>": len(ids)}))
    assert words(find_vocabularies(small_sdxl_file, str(folder))) == [len(ids) + 1] * 2


def test_a_given_folder_may_hold_two_tokenizers(folder: Path):
    shutil.copytree(folder, folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    for name in vocabulary.FILES:
        (folder / name).unlink()
    ids = json.loads((folder / "tokenizer_2" / "vocab.json").read_text())
    (folder / "tokenizer_2" / "vocab.json").write_text(json.dumps(ids | {"extra</w>": len(ids)}))
    assert words(find_vocabularies(folder, str(folder))) == [len(ids), len(ids) + 1]


def test_a_given_folder_without_files_is_refused(tmp_path: Path, small_sdxl_file: Path):
    with pytest.raises(ValueError, match=r"--tokenizer .*vocab\.json and merges\.txt"):
        find_vocabularies(small_sdxl_file, str(tmp_path))


def test_a_folder_that_is_no_clip_tokenizer_is_refused(folder: Path, small_sdxl_file: Path):
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"not a CLIP tokenizer"):
        find_vocabularies(small_sdxl_file, str(folder))


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("place", ["model.tokenizer", "tokenizer"])
def test_the_tokenizer_is_found_beside_the_file(folder: Path, tmp_path: Path, place: str):
    folder.rename(tmp_path / place)
    assert find_vocabularies(tmp_path / "model.safetensors")[0].where == str(tmp_path / place)


@pytest.mark.usefixtures("no_package")
def test_the_tokenizer_is_found_in_a_diffusers_folder(folder: Path, tmp_path: Path):
    folder.rename(tmp_path / "tokenizer")
    assert find_vocabularies(tmp_path)[1].where == str(tmp_path / "tokenizer")


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("place", [".", "openai_clip-vit-large-patch14", "models--openai--clip-vit-large-patch14/snapshots/1234"])
def test_the_tokenizer_is_found_in_the_cache(folder: Path, tmp_path: Path, place: str):
    cache = tmp_path / "cache"
    shutil.copytree(folder, cache / place)
    assert find_vocabularies(tmp_path / "model.safetensors", cache=str(cache))[0].where == str(cache / place)


@pytest.mark.usefixtures("no_package")
def test_a_tokenizer_in_one_file_is_read(folder: Path, tmp_path: Path):
    pair = find_vocabularies(tmp_path, str(folder))
    single = {"model": {"vocab": pair[0].ids, "merges": [" ".join(merge) for merge in pair[0].merges]}}
    for name in vocabulary.FILES:
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps(single))
    again = find_vocabularies(tmp_path, str(folder))
    assert (again[0].ids, again[0].merges) == (pair[0].ids, pair[0].merges)


@pytest.mark.usefixtures("no_package")
def test_the_hub_is_asked_last(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _hub, name, **_: str(folder / name))
    assert find_vocabularies(tmp_path / "model.safetensors")[0].where == str(folder)


@pytest.mark.usefixtures("no_package")
def test_without_any_vocabulary_the_error_says_what_to_put_where(tmp_path: Path):
    with pytest.raises(ValueError) as error:
        find_vocabularies(tmp_path / "model.safetensors", cache=str(tmp_path))
    assert all(part in str(error.value) for part in ("vocab.json and merges.txt", "model.tokenizer", "--tokenizer", "open_clip_torch"))


# Hidden states


def encoded(encoders: list[nn.Module], tokenizers: list[Any], caption: str, length: int = 75) -> dict[str, Tensor]:
    return text.encode_text(encoders, text.tokenize(tokenizers, [caption], length))


@pytest.mark.parametrize(("length", "tokens"), [(75, 77), (150, 152), (225, 227)])
def test_states_have_the_length_and_width_of_both_encoders(encoders: list[nn.Module], tokenizers: list[Any], length: int, tokens: int):
    states = encoded(encoders, tokenizers, "a red cat", length)
    assert states["hidden_states"].shape == (1, tokens, 64 + 128)
    assert states["pooled"].shape == (1, 128)


def test_states_are_those_before_the_last_layer_without_the_final_norm(encoders: list[nn.Module], tokenizers: list[Any]):
    tokens = text.tokenize(tokenizers, ["a red cat"], 75)
    encoder: Any = encoders[0]
    seen: list[Tensor] = []
    hook = encoder.get_submodule(f"{text_level(encoder)}encoder.layers.1").register_forward_hook(lambda _m, _i, output: seen.append(output))
    encoder(tokens["ids_1"][:, 0])
    hook.remove()
    assert torch.equal(text.encode_text(encoders, tokens)["hidden_states"][..., :64], seen[0])


def test_chunks_are_encoded_apart_and_joined_without_inner_begin_and_end(encoders: list[nn.Module], tokenizers: list[Any]):
    joined = encoded(encoders, tokenizers, "cat " * 75 + "dog", 150)
    first, second = (encoded(encoders, tokenizers, caption) for caption in ("cat " * 75, "dog"))
    expected = torch.cat([first["hidden_states"][:, :76], second["hidden_states"][:, 1:]], dim=1)
    torch.testing.assert_close(joined["hidden_states"], expected)
    torch.testing.assert_close(joined["pooled"], first["pooled"])


def test_the_pooled_vector_is_read_at_the_first_end_through_the_projection(encoders: list[nn.Module], tokenizers: list[Any]):
    encoder: Any = encoders[1]
    tokens = text.tokenize(tokenizers, ["a red cat"], 75)
    last = encoder(tokens["ids_2"][:, 0]).last_hidden_state[:, 4]  # begin, a, red, cat, end
    torch.testing.assert_close(text.encode_text(encoders, tokens)["pooled"], last @ encoder.text_projection.weight.t())


def test_weights_multiply_the_hidden_states_of_their_words_alone(encoders: list[nn.Module], tokenizers: list[Any]):
    plain = encoded(encoders, tokenizers, "a red cat")
    weighted = text.encode_text(encoders, text.tokenize(tokenizers, ["a (red:1.5) cat"], 75, weighted=True))
    expected = plain["hidden_states"].clone()
    expected[:, 2] *= 1.5
    assert torch.equal(weighted["hidden_states"], expected)
    assert torch.equal(weighted["pooled"], plain["pooled"])


@pytest.mark.parametrize("length", [75, 225])
def test_a_caption_without_brackets_is_the_same_with_weighting(encoders: list[nn.Module], tokenizers: list[Any], length: int):
    plain = encoded(encoders, tokenizers, "cat " * 80, length)
    weighted = text.encode_text(encoders, text.tokenize(tokenizers, ["cat " * 80], length, weighted=True))
    assert all(torch.equal(weighted[key], plain[key]) for key in plain)


def test_half_precision_states_stay_so_when_weighted(encoders: list[nn.Module], tokenizers: list[Any]):
    tokens = text.tokenize(tokenizers, ["(cat)"], 75, weighted=True)
    halves = [copy.deepcopy(encoder).bfloat16() for encoder in encoders]
    assert text.encode_text(halves, tokens)["hidden_states"].dtype is torch.bfloat16


def test_a_batch_gives_what_its_captions_give_alone(encoders: list[nn.Module], tokenizers: list[Any]):
    captions = ["a red cat", "", "dog " * 100]
    together = text.encode_text(encoders, text.tokenize(tokenizers, captions, 150))
    for n, caption in enumerate(captions):
        alone = encoded(encoders, tokenizers, caption, 150)
        for key, states in together.items():
            torch.testing.assert_close(states[n : n + 1], alone[key])


def test_gradients_are_the_same_with_gradient_checkpointing(tokenizers: list[Any], small_sdxl_file: Path):
    from library.models.sdxl.checkpoint import load_checkpoint

    def gradient(checkpointing: bool) -> Tensor:
        loaded = load_checkpoint(small_sdxl_file, dtype=torch.float32, device=torch.device("cpu"))
        encoders: list[Any] = [loaded.text_encoder_1, loaded.text_encoder_2]
        trained = [encoder.get_submodule(text_level(encoder) + "encoder.layers.0.mlp.fc1").weight for encoder in encoders]
        for encoder, weight in zip(encoders, trained, strict=True):
            weight.requires_grad_(True)
            if checkpointing:
                encoder.train()
                encoder.gradient_checkpointing_enable()
        states = encoded(encoders, tokenizers, "a red cat")
        (states["hidden_states"].square().sum() + states["pooled"].square().sum()).backward()
        return torch.cat([weight.grad.flatten() for weight in trained])

    plain = gradient(False)
    assert plain.abs().sum() > 0
    torch.testing.assert_close(gradient(True), plain)
