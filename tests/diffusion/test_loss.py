"""The loss: errors, weights and masks."""

import pytest
import torch
from torch import Tensor

from library.diffusion.loss import LossOptions, weigh

OPTIONS = [LossOptions(loss_type="l2"), LossOptions(loss_type="l1")]
WEIGHTS = torch.tensor([1.0, 0.5, 0.0])


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 6, 8, generator=generator), torch.randn(3, 4, 6, 8, generator=generator)


def test_losses_are_the_weighted_mean_errors_of_the_samples() -> None:
    guess, target = pair()
    errors = (guess - target).square().mean((1, 2, 3))
    torch.testing.assert_close(weigh(guess, target, WEIGHTS, LossOptions()), errors * WEIGHTS)
    errors = (guess - target).abs().mean((1, 2, 3))
    torch.testing.assert_close(weigh(guess, target, WEIGHTS, LossOptions(loss_type="l1")), errors * WEIGHTS)


def test_loss_of_half_precision_guesses_is_taken_in_fp32() -> None:
    guess = torch.full((1, 4, 64, 64), 200.0, dtype=torch.float16)
    assert weigh(guess, torch.full_like(guess, -200.0), torch.ones(1), LossOptions()).item() == 160000.0


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.loss_type)
def test_a_mask_of_ones_is_no_mask(options: LossOptions) -> None:
    guess, target = pair()
    assert torch.equal(weigh(guess, target, WEIGHTS, options, torch.ones(3, 1, 6, 8)), weigh(guess, target, WEIGHTS, options))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.loss_type)
def test_what_is_masked_has_no_loss_and_no_gradient(options: LossOptions) -> None:
    guess, target = pair()
    mask = torch.ones(3, 1, 6, 8)
    mask[:, :, 2:, 3:] = 0
    guess.requires_grad_()
    weigh(guess, target, torch.ones(3), options, mask).sum().backward()
    assert guess.grad is not None
    assert torch.equal(guess.grad != 0, mask.bool().expand_as(guess))


def test_the_mean_is_over_all_places_and_not_over_those_that_count() -> None:
    ones, zeros, mask = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :2] = 1
    assert weigh(ones, zeros, torch.ones(1), LossOptions(), mask) == 0.25


def test_places_count_by_the_grey_of_their_mask() -> None:
    guess, target = pair()
    mask = torch.rand(3, 1, 6, 8, generator=torch.Generator().manual_seed(1))
    expected = ((guess - target).square() * mask).mean((1, 2, 3)) * WEIGHTS
    torch.testing.assert_close(weigh(guess, target, WEIGHTS, LossOptions(), mask), expected)


def test_half_precision_is_masked_in_float32() -> None:
    guess, target = (tensor.bfloat16() for tensor in pair())
    mask = torch.full((3, 1, 6, 8), 0.3)
    loss = weigh(guess, target, WEIGHTS, LossOptions(), mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, weigh(guess.float(), target.float(), WEIGHTS, LossOptions(), mask))
