"""The tool that makes adapters smaller, end to end on adapters of a small model."""

import copy
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.core.tensor_file import load_tensors, read_header, save_tensors
from networks.network import Network
from networks.open_file import open_adapter
from tools.resize_adapter import main, with_flags

METADATA = {
    "ss_tag_frequency": "{}",
    "ss_network_dim": "8",
    "ss_network_args": '{"conv_dim": "4", "factor": "4"}',
    "sshs_model_hash": "old",
}


@pytest.fixture
def base(small_sdxl_file: Path) -> Path:
    return small_sdxl_file


def saved(modules: SimpleNamespace, path: Path, algorithm: str, **arguments: Any) -> Path:
    """An adapter of rank 8 with values as after training, in half precision."""
    torch.manual_seed(0)
    create = importlib.import_module(f"networks.{algorithm}").create_network
    network = create(1.0, 8, 4.0, None, None, copy.deepcopy(modules.unet), only_patterns="input_blocks.3.*", **arguments)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" not in name:
                parameter.normal_(std=0.3)
    network.save_weights(path, torch.float16, METADATA)
    return path


def errors(before: Path, after: Network, base: Path) -> dict[str, float]:
    """The relative error of every layer, measured on its dense change."""
    old, new = ([adapter.direction().detach() for adapter in network.adapters] for network in (open_adapter(before, base=base), after))
    names = [adapter.name for adapter in after.adapters]
    return {name: float((b - a).norm() / a.norm()) for name, a, b in zip(names, old, new, strict=True)}


CASES = [
    ("lora", {}),
    ("lora", {"conv_dim": 8, "use_tucker": True}),
    ("lora", {"dora_wd": True}),
    ("lokr", {"factor": 4}),
    ("lokr", {"full_matrix": True}),
    ("loha", {}),
]


@pytest.mark.parametrize(("algorithm", "arguments"), CASES, ids=str)
def test_a_resized_file_has_the_rank_and_the_error_that_was_stated(
    small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path, algorithm: str, arguments: dict[str, Any]
):
    before = saved(small_sdxl_modules, tmp_path / "in.safetensors", algorithm, **arguments)
    after = tmp_path / "out.safetensors"
    main([str(before), str(after), "--rank", "2", "--base", str(base), "--precision", "float"])
    network = open_adapter(after, base=base)
    assert {member.adapter.rank for member in network.members} == {2}
    assert {member.adapter.title.lower() for member in network.members} == {algorithm}
    assert all((member.adapter.dora_scale is not None) == ("dora_wd" in arguments) for member in network.members)
    stated = json.loads(read_header(after).metadata["ss_resized"])["largest_error"]
    assert max(errors(before, network, base).values()) == pytest.approx(stated, abs=1e-5)
    assert after.stat().st_size > 1000


@pytest.mark.parametrize(("algorithm", "arguments"), [case for case in CASES if case[0] != "loha"], ids=str)
def test_a_wished_error_is_kept(small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path, algorithm: str, arguments: dict[str, Any]):
    before = saved(small_sdxl_modules, tmp_path / "in.safetensors", algorithm, **arguments)
    main([str(before), "--out", str(tmp_path / "out.safetensors"), "--max_error", "0.6", "--base", str(base)])
    assert max(errors(before, open_adapter(tmp_path / "out.safetensors", base=base), base).values()) < 0.601


def test_the_report_and_the_metadata_say_what_was_done(
    small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = saved(small_sdxl_modules, tmp_path / "in.safetensors", "lora")
    main([str(before), str(tmp_path / "out.safetensors"), "--rank", "3", "--base", str(base)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["algorithm", "layers", "ranks", "now", "parameters", "now"]
    assert said[1].split()[:4] == ["LoRA", "12", "8", "3"]
    worst = said[said.index(next(line for line in said if line.startswith("worst layers"))) + 1 : -1]
    found = errors(before, open_adapter(tmp_path / "out.safetensors", base=base), base)
    assert worst[0].split()[0] == max(found, key=lambda name: found[name])
    assert len(worst) == 10
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata["ss_tag_frequency"] == "{}"
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", "3")
    assert json.loads(metadata["ss_network_args"]) == {"factor": "4"}
    assert metadata["sshs_model_hash"] not in ("old", read_header(before).metadata["sshs_model_hash"])


def test_a_file_keeps_its_precision_unless_told_otherwise(small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path):
    before = saved(small_sdxl_modules, tmp_path / "in.safetensors", "lora")
    for wish, dtype in (((), torch.float16), (("--precision", "bf16"), torch.bfloat16)):
        main([str(before), str(tmp_path / "out.safetensors"), "--rank", "3", "--base", str(base), *wish])
        written = load_tensors(tmp_path / "out.safetensors")
        assert {tensor.dtype for name, tensor in written.items() if not name.endswith("alpha")} == {dtype}


def test_a_file_that_is_small_enough_is_left_as_it_is(
    small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = saved(small_sdxl_modules, tmp_path / "in.safetensors", "lora")
    main([str(before), str(tmp_path / "out.safetensors"), "--rank", "8", "--base", str(base)])
    assert "nothing was lost" in capsys.readouterr().out
    old, new = load_tensors(before), load_tensors(tmp_path / "out.safetensors")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize("rank", [8, 4])
def test_the_stated_error_is_that_of_the_tensors_as_written(small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path, rank: int):
    before, after = saved(small_sdxl_modules, tmp_path / "in.safetensors", "lora"), tmp_path / "out.safetensors"
    main([str(before), str(after), "--rank", str(rank), "--base", str(base), "--precision", "bf16"])
    stated = json.loads(read_header(after).metadata["ss_resized"])["largest_error"]
    assert stated > 1e-3
    assert max(errors(before, open_adapter(after, base=base), base).values()) == pytest.approx(stated, abs=2e-6)


def test_values_that_the_precision_cannot_hold_are_refused(small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path):
    before = saved(small_sdxl_modules, tmp_path / "in.safetensors", "lora")
    tensors = load_tensors(before)
    save_tensors(before, {key: tensor.float() * (1e6 if "lora_up" in key else 1) for key, tensor in tensors.items()})
    with pytest.raises(ValueError, match="holds values that float16 cannot; choose --precision"):
        main([str(before), str(tmp_path / "out.safetensors"), "--rank", "8", "--base", str(base), "--precision", "fp16"])


def test_layers_without_a_change_lose_nothing(
    small_sdxl_modules: SimpleNamespace, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = saved(small_sdxl_modules, tmp_path / "in.safetensors", "lora")
    save_tensors(before, {key: tensor if "alpha" in key else tensor * 0 for key, tensor in load_tensors(before).items()})
    main([str(before), str(tmp_path / "out.safetensors"), "--rank", "2", "--base", str(base)])
    assert "nothing was lost\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in.safetensors", "out.safetensors"], "give --rank, --max_error or both"),
        (["in.safetensors", "out.safetensors", "--rank", "0"], "--rank 0: must be at least 1"),
        (["in.safetensors", "out.safetensors", "--max_error", "2"], "--max_error 2: must be at least 0 and less than 1"),
        (["in.safetensors", "in.safetensors", "--rank", "2"], "would replace the adapter that is resized"),
        (["in.safetensors", "out.ckpt", "--rank", "2"], "only .safetensors files are written"),
        (["in.safetensors", "--rank", "2"], "--out is required"),
        (["absent.safetensors", "out.safetensors", "--rank", "2"], "absent.safetensors: no such file"),
        (["in.safetensors", "out.safetensors", "third", "--rank", "2"], "'third' stands where an option was expected"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_wrong_command_lines_are_refused(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        main(words)


def test_leading_words_are_put_behind_their_options():
    assert with_flags(["a", "b", "--rank", "2"], ("--adapter", "--out")) == ["--adapter", "a", "--out", "b", "--rank", "2"]
    assert with_flags(["--rank", "2", "--out", "b"], ("--adapter", "--out")) == ["--rank", "2", "--out", "b"]
