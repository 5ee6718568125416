"""Samplers by the names that generation scripts use, over diffusers' schedulers."""

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

SamplerName = Literal[
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
]  # fmt: skip

SD_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
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


def build_sampler(name: str, steps: int) -> Any:
    """A diffusers scheduler for noise-predicting models on SD's betas, set to `steps` steps."""
    kind, arguments = SAMPLERS[name]
    scheduler = kind(**SD_BETAS, **arguments)
    scheduler.set_timesteps(steps)
    return scheduler
