"""The tools that fill caches: a training run afterwards, with the same options, finds everything."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from library.core.command_line import parse_command_line
from library.models.architecture import architecture_named, architecture_names
from library.training.cache_script import main
from library.training.run import option_groups, train

ROOT = Path(__file__).parent.parent.parent
IN_CACHE = re.compile(r"((?:validation )?(?:latents|text)): (\d+) in the cache, (\d+) to encode")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    (folder := tmp_path / "images").mkdir()
    for n in range(5):
        Image.effect_noise((64, 64), 40 + n).convert("RGB").save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a {('cat', 'dog')[n % 2]}, red")
    subset = f"image_dir = '{folder}'\nflip_aug = true\nshuffle_caption = true\nvalidation_split = 0.2\n"
    (path := tmp_path / "dataset.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}")
    return path


@pytest.fixture(params=architecture_names())
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def command(dataset: Path, tmp_path: Path, family: str, small_model_options: Callable[[str], tuple[str, ...]]) -> list[str]:
    """A training command without its script and caches."""
    return [
        *small_model_options(family), "--dataset_config", str(dataset), "--output_dir", str(tmp_path / "out"), "--seed", "3",
        "--network_module", "networks.lora", "--network_train_unet_only", "--max_train_steps", "1", "--max_data_loader_n_workers", "0",
        "--text_cache_variants", "3", "--text_encoder_batch_size", "2",
    ]  # fmt: skip


def cached(said: str) -> list[tuple[str, int, int]]:
    """Of each cache, what the log says: how many were there, how many were encoded."""
    return [(what, int(there), int(missing)) for what, there, missing in IN_CACHE.findall(said)]


def test_a_training_run_finds_what_the_tools_encoded(family: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("latents", "text"):
        AcceleratorState._reset_state(reset_partial_state=True)
        main(what, ["--family", family, *command])
    before = cached(capsys.readouterr().err)
    assert [what for what, _, missing in before if missing] == ["latents", "validation latents", "text"]
    AcceleratorState._reset_state(reset_partial_state=True)
    arch = architecture_named(family)
    to_disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    train(arch, parse_command_line(option_groups(arch), [*command, *to_disk], prog="test", about="test"))
    assert cached(capsys.readouterr().err) == [(what, there + missing, 0) for what, there, missing in before]


def test_a_cache_that_depends_on_the_seed_asks_for_it(family: str, command: list[str]) -> None:
    at = command.index("--seed")
    with pytest.raises(ValueError, match="give the --seed of the training run"):
        main("text", ["--family", family, *command[:at], *command[at + 2 :]])


@pytest.mark.parametrize("given", [[], ["--family"]])
def test_the_family_must_be_named(given: list[str]) -> None:
    with pytest.raises(ValueError, match="--family is required: .* sdxl"):
        main("latents", given)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's launcher is not reliable there")
def test_two_launched_processes_fill_one_cache_without_a_seed(family: str, command: list[str], dataset: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tools.cache_latents"]
    at = command.index("--seed")
    given = [f"--family={family}", *command[:at], *command[at + 2 :]]
    done = subprocess.run([*launch, *given], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((dataset.parent / "images" / ".hadron_cache").glob("latents-*.safetensors"))) == 4 * 2 + 1


def test_the_dtype_of_the_other_models_renews_no_latents(family: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--mixed_precision", "bf16"]):
        AcceleratorState._reset_state(reset_partial_state=True)
        main("latents", ["--family", family, *command, "--no_half_vae", *more])
    assert cached(capsys.readouterr().err)[2:] == [("latents", 8, 0), ("validation latents", 1, 0)]
