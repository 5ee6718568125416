"""A family is one folder: a third one, known to nobody, trains, saves and draws with the shared code."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import library.models
from library.core.tensor_file import load_tensors
from library.inference import script
from library.models.architecture import architecture_named, architecture_names, architecture_of
from library.models.naming import naming_names
from library.training import run
from networks import lora
from networks.network import Network
from networks.protocol import argument_problems

SOURCE = Path(__file__).parent / "third_family"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The family in a folder outside of the project, among the families for the length of a test."""
    folder = tmp_path / "families" / "minute"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").write_text('"""A throw-away family."""\n', encoding="utf-8")
    monkeypatch.setattr(library.models, "__path__", [*library.models.__path__, str(folder.parent)])
    importlib.invalidate_caches()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield "minute"
    for name in [name for name in sys.modules if name.startswith("library.models.minute")]:
        del sys.modules[name]
    if hasattr(library.models, "minute"):
        delattr(library.models, "minute")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four noisy pictures of one colour, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (60 * index, 90, 200)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"blue {index}", encoding="utf-8")
    (folder / "set.toml").write_text(
        "[general]\nresolution = 8\n[[datasets]]\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return folder


def train(family: str, pictures: Path, output: Path, *extra: str) -> Path:
    run.main(
        family,
        [
            *("--dataset_config", str(pictures / "set.toml"), "--output_dir", str(output), "--output_name", "net", "--seed", "1"),
            *("--network_dim", "2", "--learning_rate", "1e-1", "--max_train_steps", "6", "--max_data_loader_n_workers", "0", *extra),
        ],
    )
    return output / "net.safetensors"


def test_the_folder_is_found_and_recognised(family: str) -> None:
    assert family in architecture_names() and family in naming_names()
    arch = architecture_named(family)
    models = arch.load(arch.ModelOptions(), device=torch.device("cpu"), dtype=torch.float32)
    assert architecture_of(models.denoiser) is arch


def test_an_argument_of_its_own_is_explained_to_the_others(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [mixer, *_] = architecture_named(family).parts
    monkeypatch.setitem(cast(dict, mixer.extra_groups), "train_frills", ("Frill",))
    for arch in map(architecture_named, architecture_names()):
        expected = [] if arch.name == family else [f"--network_args train_frills: {arch.title} has no such layers"]
        assert argument_problems(lora, {"train_frills": "True"}, arch) == expected


@pytest.mark.parametrize("module", ["networks.lora", "networks.loha", "networks.lokr"])
def test_it_trains_saves_and_loads(family: str, pictures: Path, tmp_path: Path, module: str) -> None:
    file = train(family, pictures, tmp_path / "out", "--network_module", module)
    tensors = load_tensors(file)
    assert {name.partition(".")[0] for name in tensors} == {"lora_unet_inner", "lora_unet_outer", "lora_te_project"}
    arch = architecture_named(family)
    models = arch.load(arch.ModelOptions(), device=torch.device("cpu"), dtype=torch.float32)
    network = Network.from_file(file, models.denoiser, models.text_encoders)
    assert all(adapter.delta_weight().abs().max() > 0 for adapter in network.adapters)


def test_its_caches_change_nothing_but_the_work(family: str, pictures: Path, tmp_path: Path) -> None:
    given = ("--network_module", "networks.lora", "--network_train_unet_only")
    plain = load_tensors(train(family, pictures, tmp_path / "plain", *given))
    AcceleratorState._reset_state(reset_partial_state=True)
    cached = train(family, pictures, tmp_path / "cached", *given, "--cache_latents", "--cache_text_encoder_outputs")
    torch.testing.assert_close(load_tensors(cached), plain, rtol=1e-4, atol=1e-6)  # batches of another size round differently


def test_it_draws_with_what_it_learned(family: str, pictures: Path, tmp_path: Path) -> None:
    file = train(family, pictures, tmp_path / "out", "--network_module", "networks.lokr")
    given = ["--prompt", "blue 1", "--steps", "3", "--seed", "1", "--outdir", str(tmp_path / "drawn"), "--scale", "2"]
    [without] = script.main(family, given)
    [learned] = script.main(family, [*given, "--network_module", "networks.lokr", "--network_weights", str(file)])
    with Image.open(without) as first, Image.open(learned) as second:
        assert first.size == second.size == (8, 8) and first.tobytes() != second.tobytes()
