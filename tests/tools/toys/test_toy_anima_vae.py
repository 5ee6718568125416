"""The toy Anima's VAE before its training: the start, the frame, the scale."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from tools.toys.anima_frames import latent_constants, moments, one_frame_convolutions, restore
from tools.toys.anima_vae import fold_scale, psnr
from tools.toys.anima_vae_start import start_with_colours
from tools.toys.sdxl_vae import drawn, pixels_of
from tools.toys.training import Network


@pytest.fixture
def vae() -> Network:
    torch.manual_seed(0)
    build: Network = AutoencoderKLQwenImage
    return build(base_dim=8, num_res_blocks=1)


def pixels() -> torch.Tensor:
    return pixels_of(drawn(0, 0, 4))


@torch.no_grad()
def test_one_frame_is_encoded_as_the_library_encodes_it(vae: Network) -> None:
    with one_frame_convolutions():
        mean, _ = moments(vae, pixels())
    assert torch.allclose(vae.encode(pixels()[:, :, None]).latent_dist.mean[:, :, 0], mean, atol=1e-5)


@torch.no_grad()
def test_one_frame_is_decoded_as_the_library_decodes_it(vae: Network) -> None:
    latents = torch.randn(2, 16, 4, 4)
    with one_frame_convolutions():
        restored = restore(vae, latents)
    assert torch.allclose(vae.decode(latents[:, :, None]).sample[:, :, 0], restored.clamp(-1, 1), atol=1e-5)


def test_at_the_start_mean_colours_pass_through(vae: Network) -> None:
    with one_frame_convolutions():
        start_with_colours(vae, pixels())
        assert psnr(vae) > 13


@torch.no_grad()
def test_the_folded_scale_gives_latents_the_mean_and_deviation_of_the_class(vae: Network) -> None:
    start_with_colours_of_frames(vae)
    fold_scale(vae, pictures=64)
    with one_frame_convolutions():
        latents, _ = moments(vae, pixels_of(drawn(100, 0, 64)))
    mean, std = latent_constants(vae)
    assert torch.allclose(latents.mean((0, 2, 3)), mean, atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), std, rtol=1e-3)


@torch.no_grad()
def test_the_folded_scale_does_not_change_the_pictures(vae: Network) -> None:
    start_with_colours_of_frames(vae)
    with one_frame_convolutions():
        before = restore(vae, moments(vae, pixels())[0])
    fold_scale(vae, pictures=64)
    with one_frame_convolutions():
        after = restore(vae, moments(vae, pixels())[0])
    assert torch.allclose(before, after, atol=1e-4)


@torch.no_grad()
def test_the_folded_scale_keeps_the_noise_of_a_sample_in_proportion(vae: Network) -> None:
    start_with_colours_of_frames(vae)
    with one_frame_convolutions():
        mean, logvar = moments(vae, pixels())
    fold_scale(vae, pictures=64)
    with one_frame_convolutions():
        scaled_mean, scaled_logvar = moments(vae, pixels())
    before, after = (0.5 * logvar).exp() / mean.std((0, 2, 3), keepdim=True), (0.5 * scaled_logvar).exp()
    assert torch.allclose(before, after / scaled_mean.std((0, 2, 3), keepdim=True), rtol=1e-3)


def start_with_colours_of_frames(vae: Network) -> None:
    with one_frame_convolutions():
        start_with_colours(vae, pixels())
