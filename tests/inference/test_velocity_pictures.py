"""Pictures of models that predict velocity: the generator follows what the model options say, with every sampler."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from library.diffusion.ddpm import DDPMProcess, PredictionOptions
from library.diffusion.samplers import SAMPLERS
from library.inference.generate import Generator, Request
from library.models.architecture import Architecture, Models

CPU = torch.device("cpu")
PICTURE = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)


class KnowsThePicture:
    """A family whose denoiser answers with the velocity that leads to one picture, on betas that end in pure noise."""

    latent_channels, pixels_per_latent = 4, 8

    def noise_process(self, options: Any = None, model_options: Any = None) -> DDPMProcess:
        return DDPMProcess(options, model_options)

    def conditioned(self, denoiser: nn.Module, text: dict[str, Tensor]) -> dict[str, Tensor]:
        return text

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Any) -> Tensor:
        kept = DDPMProcess(prediction=ZERO_SNR).scheduler.alphas_cumprod.double()
        at = timesteps[0].double().clamp(0, 999)
        low, high = kept[at.floor().long()], kept[at.ceil().long()]
        a = low + (high - low) * (at - at.floor())
        eps = (noisy.double() - a.sqrt() * PICTURE) / (1 - a).sqrt()
        return (a.sqrt() * eps - (1 - a).sqrt() * PICTURE).float()


ZERO_SNR = PredictionOptions(v_parameterization=True, zero_terminal_snr=True)


def drawn(sampler: str, prediction: PredictionOptions) -> Tensor:
    models = Models(denoiser=nn.Identity(), text_encoders=[], tokenizers=[], vae=None)
    arch = cast(Architecture, KnowsThePicture())
    generator = Generator(arch=arch, models=models, model_options=prediction, device=CPU, dtype=torch.float32)
    request = Request(prompt="", negative="", width=64, height=64, steps=12, scale=1.0, sampler=sampler, seed=3)
    return generator.sample([request], [{}])


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("k_")])
def test_the_picture_is_found_where_the_options_say_what_the_model_predicts(sampler: str) -> None:
    assert float((drawn(sampler, ZERO_SNR) - PICTURE).abs().max()) < 0.15


def test_it_is_not_where_they_do_not() -> None:
    assert float((drawn("ddim", PredictionOptions()) - PICTURE).abs().max()) > 0.5
