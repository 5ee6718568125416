"""The toy Anima's tokenizers: caption words are tokens, other words are spelled."""

from pathlib import Path

import pytest

from library.models.anima.text import tokenize
from library.models.anima.tokenizers import Tokenizer, find_tokenizers
from tools.toys.anima_words import save_tokenizers
from tools.toys.pictures import NEW_LOOK_WORD, all_pictures, caption
from tools.toys.sdxl import caption_words

ASSETS = Path(__file__).parents[3] / "assets" / "toy_anima"
FILES = ("qwen3.tokenizer/vocab.json", "qwen3.tokenizer/merges.txt", "dit.t5_tokenizer/tokenizer.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy_anima")
    save_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> list[Tokenizer]:
    return find_tokenizers(folder / "qwen3.safetensors", None, folder / "dit.safetensors")


@pytest.mark.parametrize("word", caption_words())
def test_each_word_of_the_captions_is_one_token_of_both(tokenizers: list[Tokenizer], word: str) -> None:
    qwen, t5 = tokenizers
    assert (len(qwen(word)), len(qwen(f" {word}")), len(t5(word))) == (1, 1, 1 + len(t5.end))


def test_no_two_captions_have_the_same_ids(tokenizers: list[Tokenizer]) -> None:
    captions = [caption(picture) for picture in all_pictures()]
    for tokenizer in tokenizers:
        assert len({tuple(tokenizer(text)) for text in captions}) == len(captions)


@pytest.mark.parametrize("word", [NEW_LOOK_WORD, "zyqwx", "McCoy-7"])
def test_an_unknown_word_is_spelled_in_known_pieces(tokenizers: list[Tokenizer], word: str) -> None:
    qwen, t5 = tokenizers
    assert qwen.backend.decode(qwen(f"a {word}")) == f"a {word}"
    assert t5.backend.decode(t5(f"a {word}")) == f"a {word}"
    assert len(t5(word)) > 2


def test_a_word_of_no_known_letter_is_t5s_unknown_and_qwens_bytes(tokenizers: list[Tokenizer]) -> None:
    qwen, t5 = tokenizers
    assert len(qwen("\u00fc")) == 2
    assert t5.backend.token_to_id("<unk>") in t5("\u00fc")


def test_an_empty_caption_is_nothing_of_qwens_and_the_end_of_t5s(tokenizers: list[Tokenizer]) -> None:
    tokens = tokenize(tokenizers, [""], 4, 4)
    assert tokens["qwen_mask"].tolist() == [[0, 0, 0, 0]]
    assert tokens["t5_ids"].tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("name", FILES)
def test_the_files_that_come_with_the_project_are_these(folder: Path, name: str) -> None:
    assert (ASSETS / name).read_bytes() == (folder / name).read_bytes()
