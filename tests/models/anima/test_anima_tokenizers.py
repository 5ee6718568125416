"""Where Anima's tokenizers are found, and how their files are read."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from small_anima import T5_SPECIAL, WORDS, t5_tokenizer, write_qwen_tokenizer, write_t5_tokenizer

from library.models.anima.tokenizers import Tokenizer, check_sizes, find_tokenizers

CAPTIONS = (
    "a photo of the red cat",
    "",
    "  two  spaces\tand\n\nlines, it's 1girl 2024!",
    "caf\u00e9 \u732b \ufb01ne \uff11 e\u0301 \U0001f408 \u201cquotes\u201d",
    "<|im_start|>cat<|endoftext|> </s>",
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.models.anima.tokenizers.hub_folder", lambda *_: None)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of both tokenizers, in a place where nothing looks for them."""
    qwen, t5 = tmp_path / "files" / "q", tmp_path / "files" / "t"
    write_qwen_tokenizer(qwen)
    write_t5_tokenizer(t5)
    return qwen, t5


def find(folder: Path, **places: Any) -> list[Tokenizer]:
    """As for two model files in different folders."""
    return find_tokenizers(folder / "text" / "qwen3.safetensors", places.pop("t5", None), folder / "dit" / "anima.safetensors", **places)


def where(tokenizers: list[Tokenizer]) -> list[Path]:
    return [Path(tokenizer.where) for tokenizer in tokenizers]


@pytest.mark.parametrize("place", ["text/qwen3.tokenizer", "text/tokenizer", "text", "dit/tokenizer"])
def test_qwens_tokenizer_is_found_beside_a_model(folders: tuple[Path, Path], tmp_path: Path, place: str):
    shutil.copytree(folders[0], tmp_path / place)
    assert where(find(tmp_path, t5=folders[1])) == [tmp_path / place, folders[1]]


@pytest.mark.parametrize("place", ["dit/anima.t5_tokenizer", "dit/t5_tokenizer", "dit", "text/t5_tokenizer"])
def test_t5s_tokenizer_is_found_beside_a_model(folders: tuple[Path, Path], tmp_path: Path, place: str):
    shutil.copytree(folders[1], tmp_path / place)
    assert where(find(tmp_path, qwen_tokenizer=folders[0])) == [folders[0], tmp_path / place]


def test_both_are_found_in_a_diffusers_folder(folders: tuple[Path, Path], tmp_path: Path):
    model = tmp_path / "anima"
    shutil.copytree(folders[0], model / "tokenizer")
    shutil.copytree(folders[1], model / "t5_tokenizer")
    (model / "text_encoder").mkdir()
    assert where(find_tokenizers(model / "text_encoder", None, model)) == [model / "tokenizer", model / "t5_tokenizer"]


def test_a_folder_of_the_text_encoder_holds_its_tokenizer(folders: tuple[Path, Path], tmp_path: Path):
    assert where(find_tokenizers(folders[0], folders[1], tmp_path / "anima.safetensors"))[0] == folders[0]


@pytest.mark.parametrize("layout", ["{0}", "models--{1}/snapshots/abc", "{2}"])
def test_a_given_cache_is_searched(folders: tuple[Path, Path], tmp_path: Path, layout: str):
    cache = tmp_path / "cache"
    for source, folder, name in zip(folders, ("tokenizer", "t5_tokenizer"), ("Qwen/Qwen3-0.6B", "google-t5/t5-base"), strict=True):
        shutil.copytree(source, cache / layout.format(folder, name.replace("/", "--"), name.replace("/", "_")))
    assert all(cache in place.parents for place in where(find(tmp_path, cache=cache)))


def test_the_hub_is_asked_last(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {"Qwen/Qwen3-0.6B": folders[0], "google-t5/t5-base": folders[1]}
    monkeypatch.setattr("library.models.anima.tokenizers.hub_folder", lambda name, _files, _cache: found[name])
    assert where(find(tmp_path)) == list(folders)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("t5", ("no Qwen3 tokenizer", "merges.txt", "Qwen/Qwen3-0.6B", "qwen3.tokenizer", "--qwen3_tokenizer_path")),
        ("qwen", ("no T5 tokenizer", "spiece.model", "google-t5/t5-base", "anima.t5_tokenizer", "--t5_tokenizer_path")),
    ],
)
def test_without_one_the_error_says_which_files_to_put_where(
    folders: tuple[Path, Path], tmp_path: Path, given: str, words: tuple[str, ...]
):
    places = {"t5": folders[1]} if given == "t5" else {"qwen_tokenizer": folders[0]}
    with pytest.raises(ValueError) as error:
        find(tmp_path, **places)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("option", ["qwen_tokenizer", "t5"])
def test_a_given_place_of_the_other_kind_is_refused(folders: tuple[Path, Path], tmp_path: Path, option: str):
    qwen, t5 = folders
    places = {"qwen_tokenizer": t5, "t5": t5} if option == "qwen_tokenizer" else {"qwen_tokenizer": qwen, "t5": qwen}
    with pytest.raises(ValueError, match="tokenizer_path .*: no .* tokenizer there; needs"):
        find(tmp_path, **places)


def test_clips_vocabulary_beside_the_model_is_not_taken_for_qwens(folders: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "vocab.json").write_text(json.dumps({"a": 0, "a</w>": 1, "<|endoftext|>": 2}))
    (tmp_path / "text" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="no Qwen3 tokenizer found"):
        find(tmp_path, t5=folders[1])


def test_another_tokenizers_json_beside_the_model_is_passed_over(folders: tuple[Path, Path], tmp_path: Path):
    shutil.copytree(folders[1], tmp_path / "dit")
    qwen = find(tmp_path, qwen_tokenizer=folders[0])[0]
    qwen.backend.save(str(tmp_path / "dit" / "tokenizer.json"))
    shutil.copytree(folders[1], tmp_path / "text" / "t5_tokenizer")
    assert where(find(tmp_path, qwen_tokenizer=folders[0]))[1] == tmp_path / "text" / "t5_tokenizer"


@pytest.mark.parametrize(
    ("rows", "words"),
    [((200, 177), "Qwen3 tokenizer .* has 283 tokens, the model embeds 200"), ((283, 32128), "T5 tokenizer .* --t5_tokenizer_path")],
    ids=["more than the model embeds", "far fewer"],
)
def test_a_tokenizer_of_another_model_is_refused(folders: tuple[Path, Path], tmp_path: Path, rows: tuple[int, int], words: str):
    with pytest.raises(ValueError, match=words):
        check_sizes(find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1]), *rows)


def test_a_tokenizer_with_fewer_tokens_than_padded_embeddings_fits(folders: tuple[Path, Path], tmp_path: Path):
    check_sizes(find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1]), 320, 177)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(folders: tuple[Path, Path], tmp_path: Path, name: str):
    (folders[0] / name).write_text('{"a": ')
    with pytest.raises(ValueError, match=f"{name}: not valid JSON"):
        find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])


def test_merges_of_another_vocabulary_are_named(folders: tuple[Path, Path], tmp_path: Path):
    (folders[0] / "merges.txt").write_text("x yz\n")
    with pytest.raises(ValueError, match=r"merges\.txt: not a tokenizer"):
        find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])


def test_added_tokens_of_another_vocabulary_are_refused(folders: tuple[Path, Path], tmp_path: Path):
    config = json.loads((folders[0] / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"151643": {"content": "<|endoftext|>", "special": True}}
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="says that <|endoftext|> is token 151643"):
        find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])


def test_without_a_config_qwens_own_tokens_follow_the_vocabulary(folders: tuple[Path, Path], tmp_path: Path):
    with_config = find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])[0]
    (folders[0] / "tokenizer_config.json").unlink()
    without = find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])[0]
    assert without.pad == with_config.pad
    assert [without(caption) for caption in CAPTIONS] == [with_config(caption) for caption in CAPTIONS]


def test_qwen_ids_equal_those_of_transformers(folders: tuple[Path, Path], tmp_path: Path):
    from transformers import Qwen2Tokenizer

    theirs: Any = Qwen2Tokenizer.from_pretrained(folders[0])
    ours = find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])[0]
    assert [ours(caption) for caption in CAPTIONS] == [theirs(caption).input_ids for caption in CAPTIONS]


def test_t5_ids_equal_those_of_the_file_as_it_is(folders: tuple[Path, Path], tmp_path: Path):
    from tokenizers import Tokenizer as Library

    theirs = Library.from_file(str(folders[1] / "tokenizer.json"))
    ours = find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1] / "tokenizer.json")[1]
    assert [ours(caption) for caption in CAPTIONS] == [theirs.encode(caption).ids for caption in CAPTIONS]


def test_qwens_tokenizer_json_equals_its_vocabulary_and_merges(folders: tuple[Path, Path], tmp_path: Path):
    one = find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])[0]
    one.backend.save(str(tmp_path / "tokenizer.json"))
    other = find(tmp_path, qwen_tokenizer=tmp_path / "tokenizer.json", t5=folders[1])[0]
    assert [other(caption) for caption in CAPTIONS] == [one(caption) for caption in CAPTIONS]


@pytest.mark.parametrize("place", [0, 1], ids=["Qwen3", "T5"])
def test_a_tokenizer_json_that_does_not_say_the_type_of_its_model_is_read(folders: tuple[Path, Path], tmp_path: Path, place: int):
    now = find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])
    table = json.loads(now[place].backend.to_str())
    del table["model"]["type"]
    for step in table["pre_tokenizer"]["pretokenizers"]:
        if step.pop("prepend_scheme", None):
            step["add_prefix_space"] = True
    shutil.rmtree(folders[place])
    folders[place].mkdir()
    (folders[place] / "tokenizer.json").write_text(json.dumps(table))
    older = find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])
    assert [older[place](caption) for caption in CAPTIONS] == [now[place](caption) for caption in CAPTIONS]


def test_a_t5_tokenizer_that_knows_no_words_is_refused(folders: tuple[Path, Path], tmp_path: Path):
    t5_tokenizer([*((token, 0.0) for token in T5_SPECIAL), ("x", -1.0)]).save(str(folders[1] / "tokenizer.json"))
    with pytest.raises(ValueError, match="broken T5 tokenizer"):
        find(tmp_path, qwen_tokenizer=folders[0], t5=folders[1])


def field(number: int, value: bytes | int) -> bytes:
    """One field of a message; lengths and numbers here fit two bytes."""
    head, content = (number << 3, b"") if isinstance(value, int) else ((number << 3) | 2, value)
    amount = value if isinstance(value, int) else len(value)
    return bytes([head, *([amount] if amount < 128 else [amount & 127 | 128, amount >> 7])]) + content


def sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    entries = [
        field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + (field(3, kinds[text]) if text in kinds else b"")
        for text, score in pieces
    ]
    return b"".join(field(1, entry) for entry in entries) + field(2, b"\x08\x01") + field(3, field(1, b"nmt_nfkc") + field(3, 1))


def test_a_sentencepiece_model_gives_the_ids_of_its_tokenizer_json(folders: tuple[Path, Path], tmp_path: Path):
    pieces = [*((token, 0.0) for token in T5_SPECIAL), *(("\u2581" + word, -3.0) for word in WORDS), ("\u2581", -4.0), ("o", -6.0)]
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model(pieces))
    ours = find(tmp_path, qwen_tokenizer=folders[0], t5=tmp_path)[1]
    theirs = t5_tokenizer(pieces)
    assert [ours(caption) for caption in CAPTIONS] == [theirs.encode(caption).ids for caption in CAPTIONS]
    assert ours.backend.token_to_id("<extra_id_0>") == len(pieces) + 99


@pytest.mark.parametrize("content", [b"", b"not a model", field(1, field(1, b"a"))[:-1]], ids=["empty", "text", "truncated"])
def test_a_broken_sentencepiece_model_is_named(folders: tuple[Path, Path], tmp_path: Path, content: bytes):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"spiece\.model: not a sentencepiece model"):
        find(tmp_path, qwen_tokenizer=folders[0], t5=path)
