"""Files that lie, break off or attack are refused with the file's or key's name, in bounded time and memory."""

import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from one_layer import PART, OneLayer
from safetensors.torch import save
from spelt import read, spelt
from torch import Tensor, nn

from library.core.tensor_file import save_tensors
from networks.files import AdapterFile, read_adapter_file
from networks.formats.keys import ENDS
from networks.formats.reader import read_members
from networks.members import Member

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv2d(6, 4, 3),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "norm": lambda: nn.LayerNorm(4),
}


def open_on(path: Path, layer: nn.Module) -> list[Member]:
    """The adapters of a file on a model of one layer."""
    return read_members(read_adapter_file(path), OneLayer(), [(PART, nn.ModuleDict({"m": layer}))])


def raw(header: Any, data: bytes = b"") -> bytes:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: list | None = None, offsets: list | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [0, 4] if offsets is None else offsets}


PATIENCE = 120  # seconds, on any machine: a hostile file must not take hours
KEY = "lora_unet_m.lora_down.weight"
FILES = {
    "nothing": b"",
    "less than a header": b"\1\2",
    "truncated header": raw({KEY: entry()})[:20],
    "truncated data": raw({KEY: entry()}, b"\0\0"),
    "more data than said": raw({KEY: entry()}, b"\0" * 9),
    "a header of petabytes": struct.pack("<Q", 2**50) + b"{}",
    "no JSON": raw(b"{{{{"),
    "a list": raw([1, 2]),
    "nested junk": raw(b'{"a":' * 2000 + b"1" + b"}" * 2000),
    "no tensors": raw({}),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, KEY: entry()}, b"\0" * 4),
    "an unknown dtype": raw({KEY: entry(dtype="F7")}, b"\0" * 4),
    "a negative shape": raw({KEY: entry(shape=[-1])}, b"\0" * 4),
    "a shape of floats": raw({KEY: entry(shape=[1.0])}, b"\0" * 4),
    "an absurd shape": raw({KEY: entry(shape=[2**62, 2**62])}, b"\0" * 4),
    "overlapping tensors": raw({KEY: entry(), "lora_unet_m.lora_up.weight": entry()}, b"\0" * 4),
    "a name twice": raw(b'{"a.alpha":' + json.dumps(entry()).encode() + b',"a.alpha":' + json.dumps(entry()).encode() + b"}", b"\0" * 4),
    "no entry": raw({KEY: 5}, b"\0" * 4),
    "a text file": b"This is not the file you are looking for." * 10,
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors: "):
        open_on(path, nn.Linear(6, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused_by_key(tmp_path: Path, value: float):
    tensors = {KEY: torch.ones(2, 6), "lora_unet_m.lora_up.weight": torch.ones(4, 2)}
    tensors["lora_unet_m.lora_up.weight"][1, 1] = value
    save_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"a.safetensors: lora_unet_m.lora_up.weight: holds values that are not finite"):
        open_on(tmp_path / "a.safetensors", nn.Linear(6, 4))


DOWN, UP, LONG = torch.ones(2, 6), torch.ones(4, 2), torch.ones(1_000_000, 1)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_down.weight": DOWN.to(torch.int8), "lora_up.weight": UP}, "lora_down.weight: numbers of int8"),
        ({"lora_down.weight": DOWN.bool(), "lora_up.weight": UP}, "lora_down.weight: numbers of bool"),
        ({"lora_down.weight": torch.ones(0, 6), "lora_up.weight": torch.ones(4, 0)}, "lora_down.weight: empty"),
        ({"lora_down.weight": torch.ones(()), "lora_up.weight": torch.ones(())}, r"lora_down.weight has the shape \[\]"),
        ({"lora_down.weight": DOWN, "lora_up.weight": torch.ones(4, 3)}, r"lora_up.weight has the shape \[4, 3\]; \[4, 2\]"),
        ({"lora_down.weight": DOWN}, "lacks lora_up.weight"),
        ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.ones(3)}, r"alpha: .*one number was expected"),
        ({"lora_down.weight": DOWN, "lora_up.weight": UP, "dora_scale": torch.ones(5)}, "dora_scale has the shape"),
        ({"hada_w1_b": LONG, "hada_w1_a": torch.ones(4, 1)}, "lacks hada_w2_a"),
        ({f"hada_w{n}_{s}": LONG for n in (1, 2) for s in "ab"}, r"hada_w1_a has the shape"),
        ({"lokr_w1": torch.ones(1, 1), "lokr_w2": LONG}, "do not make a weight of shape"),
        ({"lokr_w1": torch.ones(3, 3), "lokr_w2": torch.ones(1, 2)}, "do not make a weight of shape"),
        ({"lokr_w2": torch.ones(2, 2)}, "lacks lokr_w1"),
    ],
)
def test_tensors_that_fit_no_layer_are_refused_by_key(tmp_path: Path, tensors: dict[str, Tensor], words: str):
    save_tensors(tmp_path / "a.safetensors", {f"lora_unet_m.{key}": value.clone() for key, value in tensors.items()})
    with pytest.raises(ValueError, match=rf"a.safetensors: .*{words}"):
        open_on(tmp_path / "a.safetensors", nn.Linear(6, 4))


@pytest.mark.parametrize("layer", [nn.Embedding(6, 4), nn.LayerNorm(4)], ids=["embedding", "norm"])
def test_factors_of_a_layer_that_takes_none_are_refused_by_name(tmp_path: Path, layer: nn.Module):
    save_tensors(tmp_path / "a.safetensors", {KEY: DOWN, "lora_unet_m.lora_up.weight": UP})
    with pytest.raises(ValueError, match=r"a.safetensors: lora_unet_m: an? (Embedding|LayerNorm) has no adapter"):
        open_on(tmp_path / "a.safetensors", layer)


def test_factors_of_a_convolution_in_another_order_of_dimensions_are_refused(tmp_path: Path):
    tensors = {KEY: torch.ones(2, 3, 3, 6), "lora_unet_m.lora_up.weight": torch.ones(4, 2, 1, 1)}
    save_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"lora_down.weight has the shape \[2, 3, 3, 6\]; \[2, 6, 3, 3\] was expected"):
        open_on(tmp_path / "a.safetensors", nn.Conv2d(6, 4, 3))


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x4B50])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path, length: int, suffix: str):
    text = json.dumps({KEY: entry(shape=[1, 1])}).encode().ljust(length)
    (tmp_path / f"a{suffix}").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    assert list(read_adapter_file(tmp_path / f"a{suffix}").tensors) == [KEY]


def test_shapes_that_would_take_terabytes_are_refused_without_taking_them(sdxl):
    name = "lora_unet_input_blocks_3_1_proj_in"
    down, up = torch.ones(50_000_000, 1), torch.ones(64, 1)
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"{name}.lora_down.weight has the shape \[50000000, 1\]"):
        read(sdxl, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("name", ["lora_unet_input_blocks_{}_1_proj_in", "a.b.c.{}", "lora_unet_{}", "base_model.model.{}.x"])
def test_100000_keys_are_refused_with_a_dozen_names(sdxl, name: str):
    tensor = torch.ones(1)
    tensors = {f"{name.format(n)}.{end}": tensor for n in range(50, 50_050) for end in ("alpha", "lora_up.weight")}
    began = time.monotonic()
    with pytest.raises(ValueError, match="50000 of 50000 adapters are for layers that this SDXL model has not") as caught:
        read(sdxl, tensors)
    assert time.monotonic() - began < PATIENCE and len(str(caught.value)) < 2000


def test_100000_wrong_tensors_are_named_by_the_dozen(sdxl):
    members = sdxl.members(part=None)
    tensors = spelt(
        members,
        lambda m: m.target.name,
        lambda m: {"lora_up.weight": torch.full((2, 2), torch.nan), **{f"x{n}": torch.ones(1) for n in range(500)}},
    )
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"and \d+ more") as caught:
        read(sdxl, tensors)
    assert time.monotonic() - began < PATIENCE and len(str(caught.value)) < 8000


# Pickles


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def good() -> dict[str, Tensor]:
    return {KEY: torch.randn(2, 6), "lora_unet_m.lora_up.weight": torch.randn(4, 2), "lora_unet_m.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors}, nn.ParameterDict])
def test_an_old_pickle_of_tensors_is_read(tmp_path: Path, suffix: str, is_archive: bool, wrap: Callable):
    tensors = good()
    content = {key: nn.Parameter(value) for key, value in tensors.items()} if wrap is nn.ParameterDict else wrap(tensors)
    torch.save(content, tmp_path / f"a{suffix}", _use_new_zipfile_serialization=is_archive)
    (member,) = open_on(tmp_path / f"a{suffix}", nn.Linear(6, 4))
    torch.testing.assert_close(member.adapter.delta_weight(), tensors["lora_unet_m.lora_up.weight"] @ tensors[KEY])


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, is_archive: bool):
    target = tmp_path / "attacked"
    torch.save({**good(), "x": Attack(target)}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_archive)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack(target)))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=rf"{name}: not read: a pickle that is broken or holds more than tensors"):
            open_on(tmp_path / name, nn.Linear(6, 4))
    assert not target.exists()


def archive(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2, 3], "not plain tensors"),
        ({"a.alpha": "text"}, "not plain tensors: 'a.alpha'"),
        ({1: torch.ones(1)}, "not plain tensors: 1"),
        ({"a.alpha": torch.ones(1).expand(2**40)}, "not plain tensors: 'a.alpha'"),
        ({"a.alpha": torch.eye(2).to_sparse()}, "not plain tensors: 'a.alpha'"),
        ({"a.alpha": torch.ones(2, device="meta")}, "a.pt: "),
        ({}, "holds no tensors"),
        (b"PK\3\4 not an archive", "a.pt: "),
        (b"\x80\x02", "a.pt: "),
        (b"\x80\x02" + b"]" * 100_000 + b".", "a.pt: "),
        (archive({"a/data.pkl": b"0" * 5_000_000}), "would unpack to 5000000"),
        (b"neither", "a.pt: "),
    ],
)  # fmt: skip
def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, content: Any, words: str):
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        open_on(path, nn.Linear(6, 4))


def test_a_pickle_with_another_suffix_is_not_unpickled(tmp_path: Path):
    torch.save(good(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors: a PyTorch pickle"):
        open_on(tmp_path / "a.safetensors", nn.Linear(6, 4))


# Fuzz: a valid file changed at random is read or refused, and nothing else happens


def mutated(content: bytes, seed: int) -> bytes:
    """`content` with a few bytes changed, taken out, doubled, or cut off; the header more often than the rest."""
    chance = random.Random(seed)
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        end = len(changed) if chance.random() < 0.3 else min(len(changed), 400)
        place = chance.randrange(max(end, 1))
        match chance.randrange(6):
            case 0:
                del changed[place : place + chance.randint(1, 8)]
            case 1:
                changed[place:place] = changed[place : place + chance.randint(1, 20)]
            case 2:
                del changed[place:]
            case _:
                changed[place : place + 1] = bytes([chance.choice([*range(256), *b'0123456789"{}[]:,.-'])])
    return bytes(changed)


SAMPLES = {
    "lora": {"lora_down.weight": (2, 6), "lora_up.weight": (4, 2), "alpha": ()},
    "loha": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6), "alpha": (), "dora_scale": (4, 1)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3), "alpha": ()},
    "diff": {"diff": (4, 6), "diff_b": (4,)},
}


def sample(kind: str) -> dict[str, Tensor]:
    return {f"lora_unet_m.{key}": torch.full(shape, 0.5) for key, shape in SAMPLES[kind].items()}


def outcome(path: Path, layer: nn.Module) -> str:
    """Read a file; anything but a `ValueError` that names it comes through."""
    began = time.monotonic()
    try:
        open_on(path, layer)
        result = "read"
    except ValueError as error:
        assert path.name in str(error)
        result = "refused"
    assert time.monotonic() - began < PATIENCE
    return result


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_file_changed_at_random_is_read_or_refused(tmp_path: Path, kind: str):
    content = save(sample(kind), {"note": "x"})
    path = tmp_path / "a.safetensors"
    outcomes = []
    for seed in range(250):
        path.write_bytes(mutated(content, seed))
        outcomes.append(outcome(path, nn.Linear(6, 4)))
    assert outcomes.count("refused") > 100


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_pickle_changed_at_random_is_read_or_refused(tmp_path: Path, is_archive: bool):
    stream = io.BytesIO()
    torch.save(sample("lora"), stream, _use_new_zipfile_serialization=is_archive)
    path = tmp_path / "a.pt"
    outcomes = []
    for seed in range(200):
        path.write_bytes(mutated(stream.getvalue(), seed))
        outcomes.append(outcome(path, nn.Linear(6, 4)))
    assert outcomes.count("refused") > 50


def test_a_configuration_changed_at_random_is_read_or_refused(tmp_path: Path):
    save_tensors(tmp_path / "adapter_model.safetensors", {f"base_model.model.m.{key}": value for key, value in
                 {"lora_A.weight": torch.ones(2, 6), "lora_B.weight": torch.ones(4, 2)}.items()})  # fmt: skip
    content = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"m": 3}, "rank_pattern": {}}).encode()
    outcomes = []
    for seed in range(250):
        (tmp_path / "adapter_config.json").write_bytes(mutated(content, seed))
        outcomes.append(outcome(tmp_path, nn.Linear(6, 4)))
    assert outcomes.count("refused") > 100


NAMES = st.sampled_from(sorted({".".join(word if word != "*" else "x" for word in end) for end in ENDS} | {"oft_blocks", "weight"}))
SHAPES = st.lists(st.integers(0, 6), max_size=5).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=6),
    kind=st.sampled_from(sorted(LAYERS)),
    prefix=st.sampled_from(["lora_unet_m", "base_model.model.m", "m", "x"]),
)
@example(tensors={"lokr_w1": ((2, 2), torch.float32), "lokr_w2": ((2, 3), torch.float32)}, kind="linear", prefix="m")
def test_any_tensors_under_known_names_are_read_or_refused(tensors: dict, kind: str, prefix: str):
    made = {f"{prefix}.{name}": torch.ones(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    file = AdapterFile(tensors=made)
    try:
        (member,) = read_members(file, OneLayer(), [(PART, nn.ModuleDict({"m": LAYERS[kind]()}))])
    except ValueError as error:
        assert str(error)
    else:
        assert member.adapter.delta_weight().shape == member.adapter.shape.weight
