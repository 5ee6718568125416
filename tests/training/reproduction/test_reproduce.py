"""A run made again from its lock file ends with the same bytes, whatever the seed was drawn as."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from small_family import SmallFamily

from library.core.command_line import parse_command_line
from library.core.options import OptionError
from library.training.reproduction.lock import Lock
from library.training.retired import refused_options
from library.training.run import RunResult, option_groups, train


@pytest.fixture(autouse=True)
def pinned_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def run(family: SmallFamily, *argv: str) -> RunResult:
    """A run of a command, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    groups = option_groups(family.arch)
    return train(family.arch, parse_command_line(groups, argv, prog="test", about="test", refuse=refused_options(family.arch)))


def first_run(family: SmallFamily, images: Path, output: Path) -> RunResult:
    """A run whose seed is drawn."""
    data = ["--dataset_config", str(images / "dataset.toml"), "--output_dir", str(output), "--output_name", "net"]
    network = ["--network_module", "networks.loha", "--network_dim", "2", "--network_args", "rank_dropout=0.5"]
    return run(family, *family.files, *data, *network, "--max_train_steps", "3", "--max_data_loader_n_workers", "0")


def test_a_reproduced_run_ends_with_the_same_bytes(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    first = first_run(family, images, tmp_path / "first")
    again = run(family, "--reproduce", str(tmp_path / "first" / "net-run" / "lock.toml"), "--output_dir", str(tmp_path / "again"))
    assert again.losses == first.losses and again.file.read_bytes() == first.file.read_bytes()
    assert (
        Lock.read(tmp_path / "again" / "net-run" / "lock.toml").run["seed"]
        == Lock.read(first.file.parent / "net-run" / "lock.toml").run["seed"]
    )


def test_a_run_with_another_caption_is_refused_before_models_are_loaded(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "dataset.toml").write_text((folder / "dataset.toml").read_text().replace(str(images), str(folder)))
    first_run(sdxl, folder, tmp_path / "first")
    (folder / "0.txt").write_text("a blue dog")
    with pytest.raises(OptionError, match=r"images:1.1 differs: .*; --allow_reproduce_mismatch images:1.1 takes it as it is"):
        run(sdxl, "--reproduce", str(tmp_path / "first" / "net-run" / "lock.toml"), "--output_dir", str(tmp_path / "again"))
