"""How the toy Anima is trained: in fewer rows of text, to the same velocities as Anima's own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.models.anima.denoiser import AnimaDiT
from library.models.anima.text import encode_text, tokenize
from tools.toys.anima import ToyAnima, build_anima
from tools.toys.anima_denoiser import flow_loss, read_captions, start_gently, velocity

CAPTIONS = ["", "a red circle on a mint background", "a striped blue ring, glimmen"]


@pytest.fixture
def models(tmp_path: Path) -> ToyAnima:
    return build_anima(tmp_path)


@torch.no_grad()
def test_few_rows_of_text_give_the_velocity_of_all_rows(models: ToyAnima) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, times = torch.randn(3, 16, 8, 8, generator=generator), torch.tensor([0.1, 0.5, 1.0])
    few = velocity(models, latents, times, read_captions(models, CAPTIONS))
    denoiser = AnimaDiT(models.transformer, models.conditioner)
    states = encode_text(models.encoder, tokenize(models.tokenizers, CAPTIONS))
    conditioning = denoiser.condition(states["hidden_states"], states["mask"], states["t5_ids"], states["t5_mask"])
    assert torch.allclose(few, denoiser(latents, times, conditioning), atol=1e-5)


def test_the_training_starts_at_a_velocity_of_zero_and_learns_from_there(models: ToyAnima) -> None:
    start_gently(models)
    rng = np.random.default_rng(0)
    latents = torch.zeros(3, 16, 8, 8)
    loss = flow_loss(models, latents, read_captions(models, CAPTIONS), rng)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=0.1)  # the noise alone
    assert models.transformer.proj_out.weight.grad.abs().max() > 0


def test_every_text_gives_finite_gradients(models: ToyAnima) -> None:
    rows, _ = read_captions(models, CAPTIONS)
    rows.sum().backward()
    gradients = [p.grad for p in (*models.conditioner.parameters(), *models.encoder.parameters()) if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
