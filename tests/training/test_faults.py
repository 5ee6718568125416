"""Losses and gradients that are not finite, and being asked to end."""

import json
import math
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_family import SmallFamily

from library.core.tensor_file import load_tensors
from library.training import update
from library.training.interruption import EXIT_INTERRUPTED, Interruption
from library.training.progress import Progress
from library.training.step import BatchLoss
from library.training.update import MOST_SKIPPED, NonFinite


def break_losses(monkeypatch: pytest.MonkeyPatch, at: set[int], how: Any = lambda loss: loss * math.nan) -> list[int]:
    """Let the losses of some batches, counted from 0, be something else; returns the list that the calls are counted in."""
    calls: list[int] = []
    whole = update.batch_loss

    def broken(context: Any, batch: Any) -> BatchLoss:
        calls.append(len(calls))
        loss = whole(context, batch)
        return BatchLoss(of_samples=how(loss.of_samples), timesteps=loss.timesteps) if calls[-1] in at else loss

    monkeypatch.setattr(update, "batch_loss", broken)
    return calls


def explode(losses: torch.Tensor) -> torch.Tensor:
    """Losses that are finite, and whose gradients are not."""
    losses.register_hook(lambda gradient: gradient * math.inf)
    return losses


def test_a_loss_that_is_nan_ends_the_run_and_names_step_images_and_captions(
    family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {2})
    with pytest.raises(NonFinite) as error:
        family.run(images, tmp_path, "--max_train_steps", "6")
    assert "the loss became nan at step 3; nothing was updated" in str(error.value)
    assert ".png: 'a " in str(error.value) and "--nan_policy skip" in str(error.value)


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(
    family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {1}, explode)
    with pytest.raises(NonFinite, match=r"the gradient became (nan|inf) at step 2"):
        family.run(images, tmp_path, "--max_train_steps", "4")


def test_a_gradient_is_looked_at_without_clipping_too(
    family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {1}, explode)
    with pytest.raises(NonFinite, match="the gradient became"):
        family.run(images, tmp_path, "--max_train_steps", "4", "--max_grad_norm", "0")


@pytest.mark.parametrize("limit", ["1", "0"])
def test_a_gradient_of_a_fused_backward_pass_is_looked_at_too(
    limit: str, sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {1}, explode)
    with pytest.raises(NonFinite, match="a gradient became nan or inf at step 2; such gradients counted as zero"):
        sdxl.run(images, tmp_path, "--max_train_steps", "4", "--fused_backward_pass", "--max_grad_norm", limit)


def test_a_fused_backward_pass_that_skips_stays_finite(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {1}, explode)
    result = sdxl.run(images, tmp_path, "--max_train_steps", "4", "--fused_backward_pass", "--nan_policy", "skip")
    assert len(result.losses) == 3
    assert all(torch.isfinite(tensor).all() for tensor in load_tensors(result.file).values())


@pytest.mark.parametrize("how", [lambda loss: loss * math.nan, explode], ids=["loss", "gradient"])
def test_a_skipped_step_leaves_the_weights_and_the_rest_of_the_run_finite(
    how: Any, family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {1}, how)
    result = family.run(images, tmp_path, "--max_train_steps", "4", "--nan_policy", "skip")
    assert len(result.losses) == 3 and all(map(math.isfinite, result.losses))
    assert all(torch.isfinite(tensor).all() for tensor in load_tensors(result.file).values())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_screen_that_cannot_be_written_to_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", full)
        progress = Progress(2, 2, True)
        with progress.bar():
            progress.update(1.0, {})
            progress.update(2.0, {})
        patch.undo()
        with suppress(OSError):
            full.close()
    assert progress.losses == [1.0, 2.0]


def test_skipping_gives_up_after_many_steps_in_a_row(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, set(range(1, 99)))
    with pytest.raises(NonFinite) as error:
        sdxl.run(images, tmp_path, "--max_train_steps", "60", "--nan_policy", "skip", "--cache_latents")
    assert f"at step {MOST_SKIPPED + 2}" in str(error.value)
    assert f"the {MOST_SKIPPED} steps before it were left out for the same reason" in str(error.value)


def test_a_skipped_step_is_as_if_its_batch_had_not_been(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sdxl.run(images, tmp_path / "plain", "--max_train_steps", "1")
    break_losses(monkeypatch, {1})
    skipped = sdxl.run(images, tmp_path / "skipped", "--max_train_steps", "2", "--nan_policy", "skip")
    one, other = load_tensors(plain.file), load_tensors(skipped.file)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_that_comes_while_ranks_agree_is_not_lost(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = update.agreed

    def late(*given: Any) -> update.Agreed:
        known = whole(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        return known

    monkeypatch.setattr(update, "agreed", late)
    with pytest.raises(SystemExit) as ended:
        sdxl.run(images, tmp_path, "--max_train_steps", "4")
    assert ended.value.code == EXIT_INTERRUPTED


def test_a_rank_of_several_does_not_end_before_all_know() -> None:
    interruption = Interruption(2)
    interruption.asked = True
    assert not interruption.ends_run
    interruption.agree(True)
    interruption.agree(False)
    assert interruption.ends_run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number: signal.Signals) -> None:
    interruption = Interruption()
    with interruption.heard():
        os.kill(os.getpid(), number)
        assert interruption.asked


def test_a_second_interrupt_ends_at_once() -> None:
    interruption = Interruption()
    with pytest.raises(KeyboardInterrupt), interruption.heard():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption().heard():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_log_says_why_a_run_stopped(sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_losses(monkeypatch, {1})
    with pytest.raises(NonFinite):
        sdxl.run(images, tmp_path, "--max_train_steps", "3")
    last = json.loads((tmp_path / "net-run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "stopped" and last["step"] == 1 and last["reason"].startswith("the loss became nan at step 2")
