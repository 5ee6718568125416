"""Timesteps shown before a run: the draws and weights that the run itself would make."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.core.command_line import OptionSet, parse_command_line
from library.core.rules import without_effect
from library.diffusion.loss import LossOptions
from library.diffusion.noise import NoiseOptions
from library.models.architecture import Architecture, architecture_named, architecture_names
from library.training.length import RunOptions
from library.training.plan import PlanOptions
from library.training.save import SaveOptions
from library.training.show_timesteps import BANDS, FILE, TimestepViewOptions, bands, show_timesteps


@pytest.fixture(params=architecture_names())
def arch(request: pytest.FixtureRequest) -> Architecture:
    return architecture_named(request.param)


def options(arch: Architecture, folder: Path, *given: str) -> OptionSet:
    folder.mkdir(exist_ok=True)
    groups = [arch.ModelOptions, arch.NoiseOptions, LossOptions, RunOptions, SaveOptions, TimestepViewOptions]
    files = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(folder)]
    return parse_command_line(groups, [*files, *given], prog="test", about="test")


def shares(text: str) -> list[float]:
    return [float(line.split("%")[0].split()[-1]) / 100 for line in text.splitlines() if "%" in line]


def test_the_console_shows_all_draws_by_band(arch: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_timesteps(arch, options(arch, tmp_path, "--show_timesteps", "console")) is None
    said = capsys.readouterr().out
    assert len(shares(said)) == BANDS and sum(shares(said)) == pytest.approx(1, abs=0.002)
    assert "loss weight" in said and "threshold" not in said and said.isascii()


def test_a_range_of_timesteps_leaves_the_other_bands_empty(arch: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_timesteps(arch, options(arch, tmp_path, "--show_timesteps", "console", "--min_timestep", "250", "--max_timestep", "500"))
    said = capsys.readouterr().out
    assert [index for index, share in enumerate(shares(said)) if share > 0] == list(range(5, 10))


def test_a_robust_loss_shows_its_thresholds(arch: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--show_timesteps", "console", "--loss_type", "huber", "--huber_schedule", "constant", "--huber_c", "0.25"]
    show_timesteps(arch, options(arch, tmp_path, *given))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert {row[-1] for row in rows} <= {"0.25", "-"} and any(row[-1] == "0.25" for row in rows)


def test_the_picture_lands_in_the_output_folder(arch: Architecture, tmp_path: Path) -> None:
    given = ["--show_timesteps", "image", "--loss_type", "smooth_l1"]
    plain = show_timesteps(arch, options(arch, tmp_path / "plain", *given[:2]))
    path = show_timesteps(arch, options(arch, tmp_path / "more", *given))
    assert plain == tmp_path / "plain" / FILE and path == tmp_path / "more" / FILE
    with Image.open(tmp_path / "plain" / FILE) as two, Image.open(tmp_path / "more" / FILE) as three:
        assert three.size[0] == two.size[0] and three.size[1] > two.size[1]  # a third panel
        levels = np.asarray(three.convert("L"))
    assert 0.2 < (levels < 250).mean() < 0.9


def test_bands_hold_the_shares_and_means_of_the_run_s_own_draws(arch: Architecture) -> None:
    process = arch.noise_process(arch.NoiseOptions(min_timestep=100))
    timesteps = process.timesteps((20_000, arch.latent_channels, 8, 8), torch.Generator().manual_seed(0))
    process.loss_weights = lambda timesteps: process.counted(timesteps)  # pyright: ignore[reportAttributeAccessIssue]
    counted = process.counted(timesteps).double().numpy()
    for band in bands(process, timesteps, LossOptions(), 10):
        within = counted[(counted >= band.low) & (counted < band.high)]
        assert band.share == pytest.approx(len(within) / len(counted), abs=1e-3)
        assert band.weight is None if not len(within) else band.weight == pytest.approx(within.mean(), rel=1e-3)


def test_a_larger_picture_moves_the_timesteps_of_flux_shift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = next(arch for arch in map(architecture_named, architecture_names()) if arch.noise_process().prediction_type == "flow")
    means = []
    for size in ("512", "1024,2048"):
        given = ["--show_timesteps", "console", "--timestep_sampling", "flux_shift", "--show_timesteps_resolution", size]
        show_timesteps(flow, options(flow, tmp_path, *given))
        means.append(np.dot(shares(capsys.readouterr().out), np.arange(BANDS)))
    assert means[1] > means[0] + 1


@pytest.mark.parametrize(("text", "size"), [("1024", (1024, 1024)), ("832,1216", (832, 1216)), ("832, 1216", (832, 1216))])
def test_a_size_is_one_side_or_two(text: str, size: tuple[int, int]) -> None:
    assert TimestepViewOptions(show_timesteps_resolution=text).size == size
    assert not list(TimestepViewOptions(show_timesteps_resolution=text).check())


@pytest.mark.parametrize("text", ["", "x", "0", "1024x1024", "1,2,3", "-8", "832,"])
def test_other_sizes_are_refused(text: str) -> None:
    (problem,) = TimestepViewOptions(show_timesteps_resolution=text).check()
    assert problem.startswith(f"--show_timesteps_resolution {text}: write one side or width,height")


def test_a_size_that_nothing_looks_at_is_in_vain() -> None:
    def said(*given: str) -> list[str]:
        chosen = parse_command_line([NoiseOptions, TimestepViewOptions], given, prog="test", about="test")
        return list(without_effect(chosen, TimestepViewOptions.RULES))

    assert "it is for --show_timesteps" in said("--show_timesteps_resolution", "512")[0]
    assert "flux_shift only" in said("--show_timesteps_resolution", "512", "--show_timesteps", "console")[0]
    assert said("--show_timesteps", "console") == []


def test_a_plan_that_is_not_made_is_said(arch: Architecture) -> None:
    groups = [arch.ModelOptions, arch.NoiseOptions, PlanOptions, TimestepViewOptions]
    given = ["--pretrained_model_name_or_path", ".", "--show_timesteps", "console", "--plan"]
    (sentence,) = without_effect(parse_command_line(groups, given, prog="test", about="test"), TimestepViewOptions.RULES)
    assert sentence == "--plan has no effect: --show_timesteps is answered instead"
