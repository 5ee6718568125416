"""Samplers by the names that generation scripts use, over diffusers' schedulers."""

import inspect
from typing import Any, Literal

import torch
from diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from library.diffusion.ddpm import PredictionOptions

SamplerName = Literal[
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
]  # fmt: skip

SD_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEAST_KEPT = 2.0**-24
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "lms": (LMSDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {"steps_offset": 1}),
    "euler_a": (EulerAncestralDiscreteScheduler, {"steps_offset": 1}),
    "heun": (HeunDiscreteScheduler, {"steps_offset": 1}),
    "dpm_2": (KDPM2DiscreteScheduler, {"steps_offset": 1}),
    "dpm_2_a": (KDPM2AncestralDiscreteScheduler, {"steps_offset": 1}),
    "dpmsolver": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmsingle": (DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
SAMPLERS |= {f"k_{name}": SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


class Noise:
    """Random normal tensors for a batch of pictures: each picture has its own seed, so its place in the batch changes nothing."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._device = device

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of `shape`, its first dimension being the batch; fp32, drawn on the CPU."""
        assert shape[0] == len(self._generators)
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in self._generators]).to(self._device)

    @property
    def generators(self) -> list[torch.Generator]:
        """For diffusers' schedulers that draw noise of their own."""
        return self._generators


def build_sampler(name: str, steps: int, prediction: PredictionOptions | None = None) -> Any:
    """A diffusers scheduler for a model on SD's betas, set to `steps` steps; the model predicts noise unless `prediction` says more.

    Under zero terminal SNR sampling begins at the last timestep, as the model was taught ("trailing" in Lin et al. 2024, table 2).
    """
    kind, arguments = SAMPLERS[name]
    scheduler = kind(**{**SD_BETAS, **arguments, **_predicting(kind, prediction or PredictionOptions())})
    scheduler.set_timesteps(steps)
    return scheduler


def rescaled_betas() -> torch.Tensor:
    """SD's betas (1000,) float64, changed so that (nearly) no picture is left at the last (Lin et al. 2024, algorithm 1).

    As in diffusers' samplers of this kind 2^-24 of it is left, so that the noise for one part of picture is 4096 and not infinite.
    """
    low, high = SD_BETAS["beta_start"] ** 0.5, SD_BETAS["beta_end"] ** 0.5
    root = torch.cumprod(1 - torch.linspace(low, high, SD_BETAS["num_train_timesteps"], dtype=torch.float64) ** 2, 0).sqrt()
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    kept[-1] = LEAST_KEPT
    return 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])


def _predicting(kind: type, prediction: PredictionOptions) -> dict[str, Any]:
    """The arguments by which a scheduler knows what the model predicts, and on which betas."""
    arguments: dict[str, Any] = {"prediction_type": "v_prediction"} if prediction.v_parameterization else {}
    if prediction.zero_terminal_snr:
        arguments["trained_betas"] = rescaled_betas().tolist()
        if "timestep_spacing" in inspect.signature(kind).parameters:  # the others begin at the last timestep anyway
            arguments["timestep_spacing"] = "trailing"
    return arguments
