"""The VAE on single images, against the walk of its own class."""

from typing import Any

import pytest
import torch
from small_anima import build_small_anima
from torch import Tensor, nn

from library.models.anima.vae import decode_latents, encode_pixels

SIZES = ((32, 48), (40, 24))


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    return build_small_anima().vae


def picture(height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def constants(vae: Any) -> tuple[Tensor, Tensor]:
    center, spread = (torch.tensor(fact).reshape(1, 16, 1, 1) for fact in (vae.config.latents_mean, vae.config.latents_std))
    return center, spread


def moderate(vae: nn.Module, height: int = 32, width: int = 48) -> Tensor:
    """Latents whose picture is not clamped."""
    latents = torch.randn(2, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    model: Any = vae
    center, spread = constants(vae)
    assert model.decode((latents * spread + center).unsqueeze(2)).sample.abs().mean() < 0.9
    return latents


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_latents_are_the_normalised_mode_of_the_class(vae: Any, size: tuple[int, int]):
    center, spread = constants(vae)
    wanted = (vae.encode(picture(*size).unsqueeze(2)).latent_dist.mode().squeeze(2) - center) / spread
    found = encode_pixels(vae, picture(*size))
    assert found.dtype is torch.float32 and found.shape == (2, 16, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)


@torch.no_grad()
def test_a_generator_samples_the_posterior_of_the_class(vae: Any):
    center, spread = constants(vae)
    posterior = vae.encode(picture().unsqueeze(2)).latent_dist
    wanted = (posterior.sample(torch.Generator().manual_seed(3)).squeeze(2) - center) / spread
    found = encode_pixels(vae, picture(), torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)
    assert (found - encode_pixels(vae, picture())).abs().max() > 0.01


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_pixels_are_those_of_the_class(vae: Any, size: tuple[int, int]):
    center, spread = constants(vae)
    latents = moderate(vae, *size)
    wanted = vae.decode((latents * spread + center).unsqueeze(2)).sample.squeeze(2)
    found = decode_latents(vae, latents)
    assert found.dtype is torch.float32 and found.shape == (2, 3, *size)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 1000])
@torch.no_grad()
def test_chunks_of_rows_change_nothing(vae: nn.Module, chunk: int):
    latents = moderate(vae)
    torch.testing.assert_close(encode_pixels(vae, picture(), chunk=chunk), encode_pixels(vae, picture()), atol=1e-6, rtol=0)
    torch.testing.assert_close(decode_latents(vae, latents, chunk=chunk), decode_latents(vae, latents), atol=1e-6, rtol=0)


@torch.no_grad()
def test_no_convolution_gives_more_rows_than_a_chunk(vae: nn.Module, monkeypatch: pytest.MonkeyPatch):
    latents, rows = moderate(vae), list[int]()
    conv2d = torch.nn.functional.conv2d

    def watched(*given: Any, **named: Any) -> Tensor:
        output = conv2d(*given, **named)
        rows.append(output.shape[-2])
        return output

    monkeypatch.setattr("library.models.anima.vae.functional.conv2d", watched)
    decode_latents(vae, latents, chunk=4)
    encode_pixels(vae, picture(), chunk=4)
    assert max(rows) == 4


@torch.no_grad()
def test_normalised_latents_come_back_to_the_decoder(vae: Any):
    raw = vae.encode(picture().unsqueeze(2)).latent_dist.mode()
    wanted = vae.decode(raw).sample.squeeze(2)
    torch.testing.assert_close(decode_latents(vae, encode_pixels(vae, picture())), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pixels_are_clamped(vae: nn.Module):
    pixels = decode_latents(vae, 30 * moderate(vae))
    assert pixels.abs().max() == 1


@pytest.mark.parametrize("size", [(32, 44), (30, 48)])
def test_sides_that_are_no_multiples_of_eight_are_refused(vae: nn.Module, size: tuple[int, int]):
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} pixels: .* multiples of 8"):
        encode_pixels(vae, picture(*size))


@torch.no_grad()
def test_an_outer_autocast_does_not_narrow_a_vae_in_32_bits(vae: nn.Module):
    latents = moderate(vae)
    wanted = encode_pixels(vae, picture()), decode_latents(vae, latents)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_pixels(vae, picture()), decode_latents(vae, latents)
    assert all(map(torch.equal, found, wanted))


@torch.no_grad()
def test_half_precision_is_as_near_as_the_class_in_half_precision():
    model: Any = build_small_anima().vae
    center, spread = constants(model)
    exact = encode_pixels(model, picture(16, 16))
    model.to(torch.bfloat16)
    theirs = (model.encode(picture(16, 16).bfloat16().unsqueeze(2)).latent_dist.mode().squeeze(2).float() - center) / spread
    ours = encode_pixels(model, picture(16, 16))
    assert ours.dtype is torch.float32
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@torch.no_grad()
def test_an_overflow_is_said_with_the_option_that_helps():
    model: Any = build_small_anima().vae.half()
    model.decoder.conv_in.bias.fill_(60000)
    with pytest.raises(ValueError, match="float16 gave pixels that are not finite: give --no_half_vae"):
        decode_latents(model, torch.zeros(1, 16, 2, 2))
    model.encoder.conv_in.bias.fill_(60000)
    with pytest.raises(ValueError, match="float16 gave latents that are not finite"):
        encode_pixels(model, torch.zeros(1, 3, 16, 16))


@torch.no_grad()
def test_broken_weights_are_not_blamed_on_the_precision(vae: nn.Module):
    with pytest.raises(ValueError, match="float32 gave pixels that are not finite: its weights or what it was given are broken"):
        decode_latents(vae, torch.full((1, 16, 2, 2), torch.nan))


def test_gradients_reach_the_pixels(vae: nn.Module):
    pixels = picture(16, 16).requires_grad_(True)
    model: Any = vae
    encode_pixels(vae, pixels, chunk=4).sum().backward()
    found, pixels.grad = pixels.grad, None
    _, spread = constants(vae)
    (model.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2) / spread).sum().backward()
    torch.testing.assert_close(found, pixels.grad, atol=1e-4, rtol=1e-4)
