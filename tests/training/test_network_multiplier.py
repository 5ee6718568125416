"""The strength of the network: set for a batch, through its backward, and 1 for all else; and the base as a target."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from small_family import SmallFamily
from torch import Tensor
from toy_step import toy_batch, toy_context

from library.training import update
from library.training.step import BatchLoss, Drawn, StepContext, acting_at, batch_loss, loss_at
from networks.network import Network

USES = [(1, 0), (2, 0), (3, 0)]


def network_of(context: StepContext) -> Network:
    network = context.own_model.network
    assert isinstance(network, Network)
    return network


def strengths(context: StepContext) -> set[float]:
    return {adapter.multiplier for adapter in network_of(context).adapters}


def gradient(context: StepContext, strength: float) -> list[Tensor]:
    batch = toy_batch(USES, network_multiplier=strength)
    with acting_at(context, strength):
        batch_loss(context, batch).mean.backward()
    return [cast(Tensor, parameter.grad) for parameter in network_of(context).parameters()]


def test_the_strength_is_one_again_after_a_batch_and_after_an_error() -> None:
    context = toy_context()
    with acting_at(context, -0.5):
        assert strengths(context) == {-0.5}
    assert strengths(context) == {1.0}
    with pytest.raises(ValueError, match="stop"), acting_at(context, 0.25):
        raise ValueError("stop")
    assert strengths(context) == {1.0}


def test_the_loss_at_a_strength_is_that_of_a_delta_as_much_stronger() -> None:
    one, other = toy_context(), toy_context()
    with torch.no_grad():
        next(parameter for name, parameter in network_of(other).named_parameters() if "up" in name).mul_(-0.7)
    with acting_at(one, -0.7):
        torch.testing.assert_close(batch_loss(one, toy_batch(USES)).mean, batch_loss(other, toy_batch(USES)).mean)


def test_a_checkpointed_backward_computes_at_the_strength_of_its_batch() -> None:
    plain, checkpointed = (gradient(toy_context(checkpoints=checkpoints), -0.5) for checkpoints in (False, True))
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


def test_opposite_strengths_pull_a_new_network_in_opposite_directions() -> None:
    contexts = toy_context(), toy_context()
    for context in contexts:
        with torch.no_grad():
            next(parameter for name, parameter in network_of(context).named_parameters() if "up" in name).zero_()
    for one, other in zip(gradient(contexts[0], 1.0), gradient(contexts[1], -1.0), strict=True):
        torch.testing.assert_close(one, -other)


def drawn_for(context: StepContext, latents: Tensor) -> Drawn:
    return Drawn.of(context.process, latents, [torch.Generator().manual_seed(n) for n in range(len(latents))])


def test_preserved_samples_aim_at_the_base_and_the_others_at_the_noise() -> None:
    context, batch = toy_context(), toy_batch(USES)
    assert batch.latents is not None
    drawn = drawn_for(context, batch.latents)
    noisy = context.process.corrupt(batch.latents, drawn.noise, drawn.timesteps)
    given = noisy, drawn.timesteps, cast(dict[str, Tensor], batch.text), batch.sizes
    with torch.no_grad():
        guess = context.own_model(*given)
        with acting_at(context, 0.0):
            base = context.own_model(*given)
    targets = torch.stack([base[0], drawn.noise[1], base[2]])
    loss = loss_at(context, replace(batch, preserves=torch.tensor([True, False, True])), batch.latents, drawn)
    torch.testing.assert_close(loss.mean, (guess - targets).square().mean())


@pytest.mark.parametrize("strength", [1.0, -2.0])
def test_preserving_leaves_the_batch_its_strength_and_what_was_drawn(strength: float) -> None:
    context, batch = toy_context(), toy_batch(USES, network_multiplier=strength, preserves=torch.ones(len(USES), dtype=torch.bool))
    assert batch.latents is not None
    drawn = drawn_for(context, batch.latents)
    noise = drawn.noise.clone()
    with acting_at(context, strength):
        loss_at(context, batch, batch.latents, drawn)
        assert strengths(context) == {strength}
    assert torch.equal(drawn.noise, noise)


def test_a_network_that_does_nothing_preserves_perfectly() -> None:
    context = toy_context()
    batch = toy_batch(USES, preserves=torch.ones(len(USES), dtype=torch.bool))
    with torch.no_grad():
        next(parameter for name, parameter in network_of(context).named_parameters() if "up" in name).zero_()
    assert batch_loss(context, batch).mean < 1e-12


# Whole runs


@pytest.fixture
def dataset(images: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """A folder whose dataset file shows the same pictures in two datasets, each with lines of its own."""

    def make(first: str, second: str) -> Path:
        each = [f"[[datasets]]\nresolution = 64\n{lines}\n[[datasets.subsets]]\nimage_dir = '{images}'\n" for lines in (first, second)]
        (tmp_path / "dataset.toml").write_text("".join(each))
        return tmp_path

    return make


def test_each_dataset_trains_at_its_network_multiplier(
    family: SmallFamily, dataset: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, set[float]]] = []

    def watched(context: StepContext, batch: Any) -> BatchLoss:
        seen.append((batch.network_multiplier, strengths(context)))
        watched.context = context  # pyright: ignore[reportFunctionMemberAccess]
        return batch_loss(context, batch)

    monkeypatch.setattr(update, "batch_loss", watched)
    folder = dataset("network_multiplier = -1.0", "network_multiplier = 1.5")
    family.run(folder, tmp_path / "out", "--max_train_epochs", "1", "--cache_latents", "--gradient_checkpointing")
    assert {wanted for wanted, _ in seen} == {-1.0, 1.5}
    assert all(found == {wanted} for wanted, found in seen)
    assert strengths(watched.context) == {1.0}  # pyright: ignore[reportFunctionMemberAccess]


def test_images_that_preserve_the_output_have_no_loss_while_the_network_does_nothing(
    family: SmallFamily, dataset: Callable[[str, str], Path], tmp_path: Path
) -> None:
    preserved = dataset(
        "custom_attributes = { diff_output_preservation = true }", "custom_attributes = { diff_output_preservation = true }"
    )
    result = family.run(preserved, tmp_path / "out", "--max_train_steps", "3", "--cache_latents")
    assert max(result.losses) < 1e-8


def test_a_third_party_network_follows(sdxl: SmallFamily, dataset: Callable[[str, str], Path], tmp_path: Path) -> None:
    pytest.importorskip("lycoris")
    common = ["--max_train_steps", "3", "--cache_latents", "--network_args", "algo=loha"]
    losses = [
        sdxl.run(dataset(line, line), tmp_path / "out", *common, module="lycoris.kohya").losses
        for line in ("network_multiplier = 1.0", "network_multiplier = -3.0", "custom_attributes = { diff_output_preservation = true }")
    ]
    plain, other, preserved = losses
    assert other[0] == pytest.approx(plain[0], rel=1e-4) and other[2] != pytest.approx(plain[2], rel=1e-4)
    assert max(preserved) < 1e-8
