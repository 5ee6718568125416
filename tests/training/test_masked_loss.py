"""Training under masks: what they hide is not learned from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_family import SmallFamily
from toy_step import SIDE, toy_batch, toy_context

from library.data.batch import Batch
from library.training.step import batch_loss

USES = [(1, 0), (2, 0)]


def gradients(batch: Batch) -> list[torch.Tensor]:
    context = toy_context()
    batch_loss(context, batch).mean.backward()
    return [parameter.grad for parameter in context.own_model.network.parameters() if parameter.grad is not None]


def test_a_masked_half_gives_the_gradient_of_the_other_half() -> None:
    mask = torch.ones(2, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 0
    other = 1 - mask
    whole, left, right = (gradients(toy_batch(USES, mask=each)) for each in (torch.ones_like(mask), mask, other))
    for all_of_it, one, two in zip(whole, left, right, strict=True):
        torch.testing.assert_close(one + two, all_of_it)
        assert not torch.allclose(one, all_of_it, rtol=1e-3)


def test_an_image_without_a_mask_counts_whole_beside_one_that_has() -> None:
    context, mask = toy_context(), torch.ones(2, 1, SIDE, SIDE)
    mask[0] = 0
    alone = batch_loss(context, toy_batch(USES[1:])).mean
    torch.testing.assert_close(batch_loss(context, toy_batch(USES, mask=mask)).mean, alone / 2)


def test_weights_of_regularisation_images_and_masks_multiply() -> None:
    context = toy_context()
    mask = torch.full((2, 1, SIDE, SIDE), 0.5)
    halved = replace(toy_batch(USES, mask=mask), loss_weights=torch.full((2,), 0.5))
    torch.testing.assert_close(batch_loss(context, halved).mean, batch_loss(context, toy_batch(USES)).mean / 4)


@pytest.fixture
def masked(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with two pictures and mask images of one grey, all black or all white; the dataset file stands in it."""

    def make(grey: str) -> Path:
        folder = tmp_path / grey
        (folder / "masks").mkdir(parents=True)
        for index in range(2):
            Image.effect_noise((64, 64), 40 + index).convert("RGB").save(folder / f"{index}.png")
            Image.new("L", (64, 64), grey).save(folder / "masks" / f"{index}.png")
        (folder / "dataset.toml").write_text(
            f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\nclass_tokens = 'x'\n"
            f"conditioning_data_dir = '{folder / 'masks'}'\n"
        )
        return folder

    return make


@pytest.mark.parametrize("extra", [[], ["--cache_latents"]], ids=["pixels", "cached"])
def test_black_masks_leave_nothing_to_learn_and_white_ones_everything(
    extra: list[str], sdxl: SmallFamily, masked: Callable[[str], Path], tmp_path: Path
) -> None:
    losses = {
        grey: sdxl.run(masked(grey), tmp_path / "out", "--max_train_steps", "2", "--masked_loss", *extra).losses
        for grey in ("black", "white")
    }
    assert losses["black"] == [0.0, 0.0]
    assert min(losses["white"]) > 0.1
