"""After which epochs the network is saved, and which files stay."""

from pathlib import Path

import pytest

from library.training.save import SaveOptions, Saver


@pytest.mark.parametrize(("ratio", "epochs", "expected"), [(4, 12, [3, 6, 9]), (5, 12, [2, 4, 6, 8, 10]), (20, 3, [1, 2]), (1, 5, [])])
def test_a_ratio_saves_so_many_times_in_the_run(ratio: int, epochs: int, expected: list[int], tmp_path: Path) -> None:
    saver = Saver(SaveOptions(output_dir=str(tmp_path), save_n_epoch_ratio=ratio))
    assert [epoch for epoch in range(1, epochs + 1) if saver.due_after_epoch(epoch, epochs)] == expected


def test_a_ratio_rotates_as_epochs_do(tmp_path: Path) -> None:
    saver = Saver(SaveOptions(output_dir=str(tmp_path), save_n_epoch_ratio=3, save_last_n_epochs=1))
    assert saver.outdated_epoch_file(4, 6) == saver.epoch_file(2)


def test_two_ways_to_say_the_epochs_exclude_each_other() -> None:
    (problem,) = SaveOptions(output_dir="o", save_every_n_epochs=2, save_n_epoch_ratio=3).check()
    assert problem.startswith("--save_every_n_epochs and --save_n_epoch_ratio exclude each other")
