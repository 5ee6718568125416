"""A whole run with a hub, as a user starts it: the files arrive, a state comes back, and the token is nowhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, FakeRepository, running_hub
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


def train(hub: FakeHub, folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    command = [
        sys.executable, str(ROOT / "sdxl_train_network.py"),
        "--pretrained_model_name_or_path", str(ROOT / "assets" / "toy_sdxl.safetensors"), "--dataset_config", str(folder / "data.toml"),
        "--output_dir", str(folder / "out"), "--output_name", "net", "--network_module", "networks.loha", "--network_dim", "2",
        "--max_data_loader_n_workers", "0", "--seed", "1", "--save_every_n_steps", "1", "--save_state",
        "--logging_dir", str(folder / "logs"),
        "--console_log_file", str(folder / "console.log"), "--console_log_level", "DEBUG", "--log_config", *extra,
    ]  # fmt: skip
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "images").mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "images" / "a.png")
    (folder / "images" / "a.txt").write_text("a cat")
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder / 'images'}'\n"
    (folder / "data.toml").write_text(f"[general]\nresolution = 64\n[[datasets]]\nbatch_size = 1\n{subset}")
    return folder


HUB = ("--huggingface_repo_id", "me/x", "--huggingface_token", TOKEN, "--save_state_to_huggingface")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--async_upload",)])
def test_all_that_is_saved_arrives_and_the_token_is_nowhere(hub: FakeHub, folder: Path, how: tuple[str, ...]) -> None:
    hub.repositories.clear()
    hub.failures = 1  # the token stands in that answer of the hub
    ran = train(hub, folder, "--max_train_steps", "2", *HUB, *how)
    assert ran.returncode == 0, ran.stderr
    files = hub.repositories["me/x"].files
    assert {"net.safetensors", "net-step00000001.safetensors"} <= set(files)
    assert any(name.startswith("net-state/") for name in files) and any(name.startswith("net-step00000001-state/") for name in files)
    assert files["net.safetensors"] == (folder / "out" / "net.safetensors").read_bytes()
    assert "the hub has a bad day (Bearer ***)" in ran.stderr
    shown = [("stderr", ran.stderr.encode()), ("stdout", ran.stdout.encode())]
    shown += [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    assert len(shown) > 10 and [name for name, content in shown if TOKEN.encode() in content] == []


@pytest.mark.slow
def test_a_run_goes_on_from_a_state_on_the_hub(hub: FakeHub, folder: Path) -> None:
    hub.repositories.clear()
    assert train(hub, folder, "--max_train_steps", "2", *HUB).returncode == 0
    whole = (folder / "out" / "net.safetensors").read_bytes()
    again = ("--resume", "me/x/net-step00000001-state:main", "--resume_from_huggingface", "--huggingface_token", TOKEN)
    for path in (folder / "out").glob("net*.safetensors"):
        path.unlink()
    ran = train(hub, folder, "--max_train_steps", "2", *again)
    assert ran.returncode == 0, ran.stderr
    tensors = [
        content[8 + int.from_bytes(content[:8], "little") :] for content in (whole, (folder / "out" / "net.safetensors").read_bytes())
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.slow
def test_a_token_that_may_not_write_ends_the_run_before_it_begins(hub: FakeHub, folder: Path) -> None:
    hub.repositories["me/x"] = FakeRepository(private=True)
    hub.readers.add(TOKEN)
    ran = train(hub, folder, "--max_train_steps", "1", *HUB)
    hub.readers.clear()
    assert ran.returncode == 2 and "--huggingface_repo_id me/x: cannot write there" in ran.stderr and TOKEN not in ran.stderr
