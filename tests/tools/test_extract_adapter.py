"""The tool that makes an adapter of what fine-tuning changed, end to end on a small checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.core.command_line import run_script
from library.core.tensor_file import load_tensors, read_header, save_tensors
from networks.network import Network
from networks.open_file import open_adapter
from tools.extract_adapter import main

QUERY = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
OUT = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.weight"
CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
NORM = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.norm1.weight"
TEXT = "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
RANK = 3


def planted(shape: torch.Size, seed: int) -> Tensor:
    """A change of rank 3, small against the weights."""
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], RANK, generator=generator), torch.randn(RANK, shape[1:].numel(), generator=generator)
    return 1e-2 * (up @ down).reshape(shape)


@pytest.fixture(scope="module")
def changes(small_sdxl_file: Path) -> dict[str, Tensor]:
    tensors = load_tensors(small_sdxl_file)
    return {key: planted(tensors[key].shape, seed) for seed, key in enumerate((QUERY, OUT, CONV, NORM, TEXT)) if key != NORM}


@pytest.fixture(scope="module")
def tuned(small_sdxl_file: Path, changes: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = load_tensors(small_sdxl_file)
    for key, change in changes.items():
        tensors[key] = tensors[key] + change
    tensors[NORM] = tensors[NORM] + 1
    path = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    save_tensors(path, tensors)
    return path


def extracted(base: Path, tuned: Path, out: Path, *extra: str) -> Network:
    main(["--base", str(base), "--tuned", str(tuned), "--out", str(out), *extra])
    return open_adapter(out, base=base)


def deltas(network: Network) -> dict[str, Tensor]:
    return {member.adapter.name: member.adapter.delta_weight().detach() for member in network.members}


def test_a_planted_lora_is_extracted(
    small_sdxl_file: Path, tuned: Path, changes: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    network = extracted(small_sdxl_file, tuned, tmp_path / "out.safetensors", "--rank", "3", "--precision", "float")
    found = deltas(network)
    assert list(found) == [
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0",
    ]
    for delta, key in zip(found.values(), (QUERY, OUT), strict=True):
        torch.testing.assert_close(delta, changes[key], rtol=1e-3, atol=1e-6)  # the checkpoints are float32: so much of it is rounding
    said = capsys.readouterr().out
    assert "more layers are the same in both checkpoints" in said
    assert "differ and are not in the adapter: 3 (lora_unet_input_blocks_1_0_in_layers_2.weight" in said
    assert "0.0000 (largest)" in said


def test_convolutions_and_text_encoders_are_extracted_when_asked_for(
    small_sdxl_file: Path, tuned: Path, changes: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    network = extracted(small_sdxl_file, tuned, tmp_path / "out.safetensors", "--rank", "3", "--conv_rank", "2", "--text_encoders")
    found = deltas(network)
    ranks = {member.adapter.name: member.adapter.rank for member in network.members}
    assert ranks["lora_unet_input_blocks_1_0_in_layers_2"] == 2
    assert ranks["lora_te1_text_model_encoder_layers_1_mlp_fc1"] == 3
    torch.testing.assert_close(found["lora_te1_text_model_encoder_layers_1_mlp_fc1"], changes[TEXT], rtol=2e-2, atol=2e-4)
    assert "differ and are not in the adapter: 1 (" in capsys.readouterr().out, "the norm"


@pytest.mark.parametrize(
    "wish",
    [
        ["--algorithm", "lokr"],
        ["--algorithm", "lokr", "--rank", "2", "--factor", "4"],
        ["--algorithm", "lokr", "--rank", "3", "--factor", "search"],
        ["--algorithm", "lokr", "--max_error", "0.5", "--factor", "search"],
        ["--algorithm", "loha", "--rank", "2"],
        ["--max_error", "0.5", "--precision", "bf16"],
    ],
    ids=" ".join,
)
def test_the_stated_error_is_that_of_the_written_file(
    small_sdxl_file: Path, tuned: Path, changes: dict[str, Tensor], tmp_path: Path, wish: list[str]
):
    network = extracted(small_sdxl_file, tuned, tmp_path / "out.safetensors", *wish)
    found = deltas(network)
    errors = [float((delta - changes[key]).norm() / changes[key].norm()) for delta, key in zip(found.values(), (QUERY, OUT), strict=True)]
    stated = json.loads(read_header(tmp_path / "out.safetensors").metadata["ss_extracted"])["largest_error"]
    assert max(errors) == pytest.approx(stated, abs=1e-4)
    assert "0.5" not in wish or max(errors) < 0.51


def test_a_search_at_the_size_of_a_lora_is_no_further_off(small_sdxl_file: Path, tuned: Path, tmp_path: Path):
    errors = []
    for wish in (["--rank", "2"], ["--algorithm", "lokr", "--rank", "2", "--factor", "search"]):
        extracted(small_sdxl_file, tuned, tmp_path / "out.safetensors", "--precision", "float", *wish)
        errors.append(json.loads(read_header(tmp_path / "out.safetensors").metadata["ss_extracted"])["largest_error"])
    assert errors[1] <= errors[0] + 1e-6


def test_the_file_says_what_it_is(small_sdxl_file: Path, tuned: Path, tmp_path: Path):
    extracted(small_sdxl_file, tuned, tmp_path / "out.safetensors", "--algorithm", "lokr", "--factor", "4", "--rank", "2")
    metadata = read_header(tmp_path / "out.safetensors").metadata
    wanted = {
        "ss_network_module": "networks.lokr",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    assert {key: metadata[key] for key in wanted} == wanted
    assert json.loads(metadata["ss_network_args"]) == {"factor": "4"}
    assert "sshs_model_hash" in metadata


def test_layers_are_chosen_as_in_training(small_sdxl_file: Path, tuned: Path, tmp_path: Path):
    network = extracted(
        small_sdxl_file, tuned, tmp_path / "out.safetensors", "--rank", "3", "--network_args", "only_patterns=middle_block.*"
    )
    assert [member.adapter.name for member in network.members] == ["lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0"]


def test_a_checkpoint_that_is_only_rounded_differently_has_no_changes(small_sdxl_file: Path, tmp_path: Path):
    half = tmp_path / "half.safetensors"
    save_tensors(
        half, {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in load_tensors(small_sdxl_file).items()}
    )
    with pytest.raises(ValueError, match="none of the .* layers differs from"):
        extracted(small_sdxl_file, half, tmp_path / "out.safetensors", "--rank", "3")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ([], "give --rank or --max_error"),
        (["--rank", "0"], "--rank 0: must be at least 1"),
        (["--rank", "2", "--factor", "4"], "--factor: only lokr has one, not lora"),
        (["--algorithm", "lokr", "--factor", "serch"], "--factor"),
        (["--rank", "2", "--max_error", "1.5"], "--max_error 1.5: must be at least 0"),
        (["--rank", "2", "--network_args", "only_paterns=x"], "only_patterns"),
        (["--rank", "2", "--network_args", "dora_wd=True"], "dora_wd: has no effect on an extraction, which takes only_patterns"),
        (["--rank", "2", "--conv_rank", "2", "--network_args", "conv_dim=4"], "conv_dim: --conv_rank says the same"),
    ],
)
def test_wrong_wishes_are_refused(small_sdxl_file: Path, tuned: Path, tmp_path: Path, wish: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        extracted(small_sdxl_file, tuned, tmp_path / "out.safetensors", *wish)


def test_checkpoints_that_do_not_fit_each_other_are_refused(small_sdxl_file: Path, tmp_path: Path):
    tensors = load_tensors(small_sdxl_file)
    short = {key: tensor for key, tensor in tensors.items() if key != QUERY}
    save_tensors(tmp_path / "tuned.safetensors", short)
    arguments = ["--base", str(small_sdxl_file), "--tuned", str(tmp_path / "tuned.safetensors"), "--rank", "2"]
    with pytest.raises(ValueError, match=r"tuned.safetensors: lacks 1 of \d+ layers: lora_unet_input_blocks_3_1"):
        main([*arguments, "--out", str(tmp_path / "out.safetensors")])
    tensors[QUERY] = tensors[QUERY][:, :-1]
    save_tensors(tmp_path / "tuned.safetensors", tensors)
    with pytest.raises(ValueError, match=r"has the shape \[64, 63\]"):
        main([*arguments, "--out", str(tmp_path / "out.safetensors")])


def test_a_mistake_ends_with_status_2_and_its_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    files = ["--base", "absent.safetensors", "--tuned", "b.safetensors", "--out", "c.safetensors"]
    monkeypatch.setattr("sys.argv", ["extract_adapter", *files, "--rank", "2"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    assert "absent.safetensors: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
def test_a_checkpoint_with_values_that_are_not_finite_is_refused_by_layer(small_sdxl_file: Path, tmp_path: Path, algorithm: str):
    tensors = load_tensors(small_sdxl_file)
    save_tensors(tmp_path / "tuned.safetensors", {**tensors, QUERY: tensors[QUERY] * torch.nan})
    with pytest.raises(ValueError, match="attn1_to_q: .*tuned.safetensors holds NaN or infinity"):
        extracted(small_sdxl_file, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", "--rank", "2", "--algorithm", algorithm)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_fitted(small_sdxl_file: Path, tuned: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out .*file: cannot write there"):
        extracted(small_sdxl_file, tuned, tmp_path / "file" / "out.safetensors", "--rank", "2")
