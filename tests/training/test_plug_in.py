"""The plug-in contract is open: LyCORIS' own module trains here, and its file loads here."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from library.core.command_line import parse_command_line
from library.core.tensor_file import read_header
from library.inference.script import main as generate
from library.models.architecture import architecture_named
from library.training.run import RunResult, option_groups, train

pytest.importorskip("lycoris")
SDXL = architecture_named("sdxl")


def run(model: Path, folder: Path, *extra: str) -> RunResult:
    AcceleratorState._reset_state(reset_partial_state=True)
    images = folder / "images"
    images.mkdir(parents=True)
    Image.effect_noise((64, 64), 50).convert("RGB").save(images / "a.png")
    (images / "a.txt").write_text("a cat")
    (folder / "dataset.toml").write_text(
        f"[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nnum_repeats = 2\n"
    )
    argv = [
        "--pretrained_model_name_or_path", str(model), "--dataset_config", str(folder / "dataset.toml"), "--output_dir", str(folder),
        "--network_module", "lycoris.kohya", "--network_dim", "2", "--seed", "1", "--learning_rate", "1e-2", "--max_train_steps", "6",
        "--max_data_loader_n_workers", "0", *extra,
    ]  # fmt: skip
    return train(SDXL, parse_command_line(option_groups(SDXL), argv, prog="test", about="test"))


@pytest.mark.parametrize(("algorithm", "module"), [("loha", "networks.loha"), ("lokr", "networks.lokr"), ("lora", "networks.lora")])
def test_lycoris_trains_saves_and_its_file_loads_here(algorithm: str, module: str, small_sdxl_file: Path, tmp_path: Path) -> None:
    result = run(small_sdxl_file, tmp_path, "--network_args", f"algo={algorithm}")
    names = read_header(result.file).tensors
    assert any(name.startswith("lora_unet_input_blocks_") for name in names)
    assert any(name.startswith("lora_te1_text_model_encoder_layers_") for name in names)
    assert not any("down_blocks" in name for name in names)
    base = ["--ckpt", str(small_sdxl_file), "--prompt", "a cat --d 1", "--W", "64", "--H", "64", "--steps", "2"]
    [plain] = generate("sdxl", [*base, "--outdir", str(tmp_path / "plain")])
    [adapted] = generate(
        "sdxl", [*base, "--outdir", str(tmp_path / "adapted"), "--network_module", module, "--network_weights", str(result.file)]
    )
    with Image.open(plain) as first, Image.open(adapted) as second:
        assert first.tobytes() != second.tobytes()


def test_lycoris_changes_the_loss(small_sdxl_file: Path, tmp_path: Path) -> None:
    losses = torch.tensor(run(small_sdxl_file, tmp_path, "--network_args", "algo=loha", "--max_train_steps", "30").losses)
    assert losses[-10:].mean() < losses[:10].mean()
