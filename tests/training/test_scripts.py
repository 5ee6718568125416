"""The scripts as a user starts them: accelerate launch, the README's command, exit status and messages."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "a.png")
    (folder / "a.caption").write_text("a cat")
    path = folder / "dataset.toml"
    path.write_text(f"[general]\nresolution = 64\n[[datasets]]\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    return path


@pytest.mark.slow
def test_the_readmes_commands_train_and_draw(small_sdxl_file: Path, dataset: Path, tmp_path: Path) -> None:
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--num_cpu_threads_per_process",
        "1",
        "--mixed_precision",
        "bf16",
        "sdxl_train_network.py",
    ]
    trained = python(
        *launch, "--pretrained_model_name_or_path", str(small_sdxl_file), "--dataset_config", str(dataset),
        "--mixed_precision", "bf16", "--fp8_base", "--optimizer_type", "adamw8bit", "--learning_rate", "2e-4", "--gradient_checkpointing",
        "--network_module", "networks.loha", "--network_dim", "32", "--network_alpha", "16",
        "--max_train_epochs", "2", "--save_every_n_epochs", "1", "--output_dir", str(tmp_path), "--output_name", "my-loha",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-loha-000001.safetensors", "my-loha-run", "my-loha.safetensors"]
    drawn = python(
        "gen_img.py", "--ckpt", str(small_sdxl_file), "--network_module", "networks.loha", "--network_weights",
        str(tmp_path / "my-loha.safetensors"), "--prompt", "your prompt", "--W", "64", "--H", "64", "--steps", "2",
        "--outdir", str(tmp_path / "out"),
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.slow
def test_animas_commands_train_and_draw(small_anima_files: Any, dataset: Path, tmp_path: Path) -> None:
    files = small_anima_files
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--num_cpu_threads_per_process",
        "1",
        "--mixed_precision",
        "bf16",
        "anima_train_network.py",
    ]
    trained = python(
        *launch, "--pretrained_model_name_or_path", str(files.dit), "--qwen3", str(files.qwen3), "--vae", str(files.vae),
        "--dataset_config", str(dataset), "--mixed_precision", "bf16", "--optimizer_type", "adamw8bit", "--learning_rate", "1e-4",
        "--gradient_checkpointing", "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only",
        "--network_module", "networks.lokr", "--network_dim", "16", "--network_alpha", "8", "--network_args", "factor=8",
        "--max_train_epochs", "2", "--output_dir", str(tmp_path), "--output_name", "my-lokr",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    drawn = python(
        "anima_minimal_inference.py", "--dit", str(files.dit), "--text_encoder", str(files.qwen3), "--vae", str(files.vae),
        "--lora_weight", str(tmp_path / "my-lokr.safetensors"), "--prompt", "your prompt", "--save_path", str(tmp_path / "out"),
        "--image_size", "64", "64", "--infer_steps", "2",
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.slow
def test_mistakes_end_with_status_2_and_no_traceback(small_sdxl_file: Path, tmp_path: Path) -> None:
    done = python(
        "sdxl_train_network.py", "--pretrained_model", str(small_sdxl_file), "--network_module", "networks.loha", "--network_dim", "0"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: unknown option '--pretrained_model'; did you mean '--pretrained_model_name_or_path'?" in done.stderr
    assert "error: --network_dim 0: must be at least 1" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sdxl_train_network.py", "anima_train_network.py", "gen_img.py", "anima_minimal_inference.py"])
def test_help_lists_the_options(script: str) -> None:
    done = python(script, "--help")
    assert done.returncode == 0 and ("--lora_weight" if "minimal" in script else "--network_module") in done.stdout
