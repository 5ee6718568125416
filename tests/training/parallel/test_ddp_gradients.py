"""Two processes give the gradients of one with the joint batch: DDP and FSDP2, both families, all algorithms."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import HERE, two
from PIL import Image

from library.models.architecture import architecture_names

CASES = {
    "lora": "--network_module networks.lora",
    "loha": "--network_module networks.loha --network_train_unet_only",
    "lokr": "--network_module networks.lokr --gradient_checkpointing",
    "dora": "--network_module networks.lora --network_args dora_wd=True --network_train_unet_only",
    "bf16": "--network_module networks.loha --mixed_precision bf16 --gradient_checkpointing",
    "full_bf16": "--network_module networks.lora --mixed_precision bf16 --full_bf16 --network_train_unet_only",
}
"""What is trained, and how. Text encoders too, where nothing says otherwise."""
TRIED = {"ddp": tuple(CASES), "fsdp": ("lora", "lokr", "bf16")}
ENGINES = {"ddp": {}, "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
DIFFERENCE = {"bf16": 0.05, "full_bf16": 0.05}
"""Of a gradient from that of the joint batch, by their norms: products of one picture and of two are rounded differently in bfloat16."""
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of one size."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(4):
        Image.effect_noise((64, 64), 40 + index).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {('cat', 'dog')[index % 2]}, red")
    path = folder / "dataset.toml"
    path.write_text(f"[general]\nresolution = 64\n[[datasets]]\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    return path


@pytest.fixture(scope="module", params=[(engine, family) for engine in ENGINES for family in architecture_names()], ids="-".join)
def measured(
    request: pytest.FixtureRequest, dataset: Path, small_model_options: Callable[[str], tuple[str, ...]], tmp_path_factory: Any
) -> dict[str, Any]:
    """What two processes found in every case, for an engine and a family: started once, for it takes a while."""
    engine, family = request.param
    folder = tmp_path_factory.mktemp(f"{engine}-{family}")
    cases = [f"{name}={CASES[name]}" for name in TRIED[engine]]
    found = two(
        str(HERE / "gradients_of_two.py"), str(folder / "found.json"), str(dataset), str(folder), *cases, "--", family,
        *small_model_options(family), **ENGINES[engine],
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    known = json.loads((folder / "found.json").read_text())
    assert tuple(known) == TRIED[engine]
    return known


@pytest.mark.slow
def test_gradients_are_those_of_the_joint_batch_over_different_pictures_and_noise(measured: dict[str, Any]) -> None:
    for case, found in measured.items():  # in one test, so that the processes are started once also where several workers share the tests
        assert found["size"] > 0 and found["count"] > 10, case
        assert found["worst"] < DIFFERENCE.get(case, ROUNDING), case
    draws = [(tuple(map(tuple, keys)), total) for keys, total in measured["lora"]["draws"]]
    assert len(set(draws)) == len(draws) == 4
    assert len({keys for keys, _ in draws}) == 4  # which key the noise: see `library.training.step`
