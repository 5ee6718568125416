"""The shipped scripts, stopped and taken up again, in one process and in two."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from library.training.state.folder import read_manifest
from library.training.state.resuming import read_content

ROOT = Path(__file__).parents[3]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
MODELS = {
    "sdxl": ("--pretrained_model_name_or_path", "assets/toy_sdxl.safetensors"),
    "anima": (
        "--pretrained_model_name_or_path", "assets/toy_anima/dit.safetensors", "--qwen3", "assets/toy_anima/qwen3.safetensors",
        "--vae", "assets/toy_anima/vae.safetensors",
    ),
}  # fmt: skip


def train(family: str, images: Path, output: Path, *extra: str, processes: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [
        f"{family}_train_network.py", *MODELS[family], "--dataset_config", str(images / "dataset.toml"), "--output_dir", str(output),
        "--output_name", "net", "--network_module", "networks.lokr", "--seed", "1", "--learning_rate", "1e-2", "--max_train_steps", "4",
        "--max_data_loader_n_workers", "0", *extra,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "SOURCE_DATE_EPOCH": "1700000000"}
    return subprocess.run([sys.executable, *processes, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_that_go_on_write_the_same_bytes(images: Path, tmp_path: Path) -> None:
    whole = train("anima", images, tmp_path / "whole", "--save_state_every_n_steps", "2", processes=TWO)
    assert whole.returncode == 0, whole.stderr
    state = tmp_path / "cut" / "net-step00000002-state"
    shutil.copytree(tmp_path / "whole" / state.name, state)
    cut = train("anima", images, tmp_path / "cut", "--save_state_every_n_steps", "2", "--resume", "auto", processes=TWO)
    assert cut.returncode == 0, cut.stderr
    assert (tmp_path / "whole" / "net.safetensors").read_bytes() == (tmp_path / "cut" / "net.safetensors").read_bytes()


@pytest.mark.slow
def test_one_process_makes_all_steps_that_are_left_of_a_run_of_two(images: Path, tmp_path: Path) -> None:
    two = train("sdxl", images, tmp_path, "--save_state_every_n_steps", "2", processes=TWO)
    assert two.returncode == 0, two.stderr
    state = tmp_path / "net-step00000002-state"
    assert read_manifest(state).identity["processes"] == 2 and len(read_content(state)["ranks"]) == 2
    (tmp_path / "net.safetensors").unlink()
    one = train("sdxl", images, tmp_path, "--resume", str(state), "--allow_resume_mismatch", "processes")
    assert one.returncode == 0, one.stderr
    assert '"step": 4' in (tmp_path / "net-run" / "log.jsonl").read_text() and (tmp_path / "net.safetensors").is_file()
