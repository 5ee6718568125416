"""The stages of drawing: all texts, then all latents, then all pictures, so that no two large models have to be in memory at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from library.data.batch import TextStates
from library.inference.generate import Generator, Request, batches, states_of
from library.inference.images import to_images
from library.inference.minimal.files import PictureFolder
from library.inference.minimal.models import DrawingModels
from library.inference.minimal.options import DrawingOptions, OutputOptions
from library.inference.script import parameters_of
from library.models.architecture import Architecture, Models

Key = tuple[str, tuple[float, ...]]
"""A prompt and the strengths of the adapters that it is read with."""


@dataclass(kw_only=True, frozen=True)
class Stages:
    """Everything that drawing takes. With `keeps_models` they stay loaded for more pictures."""

    arch: Architecture
    models: DrawingModels
    model_options: Any
    device: torch.device
    dtype: torch.dtype
    drawing: DrawingOptions
    output: OutputOptions
    folder: PictureFolder
    adapter_files: tuple[str, ...]
    keeps_models: bool

    def draw(self, requests: Sequence[Request]) -> list[Path]:
        """The files of all requests, in their order, latents before pictures."""
        states = self._texts(requests)
        if not self.keeps_models:
            self.models.release_text()
        drawn: list[tuple[Request, Tensor]] = []
        written: list[Path] = []
        denoiser = self.models.denoiser
        try:
            for request, latents in self._latents(denoiser, requests, states):
                drawn.append((request, latents))
                if self.output.writes_latents:
                    written.append(self.folder.save_latents(latents, self._parameters(request)))
        finally:  # what was drawn before an error or Ctrl-C is not lost
            if not self.keeps_models:
                self.models.release_denoiser()
            if self.output.writes_images:
                written += self._pictures(drawn)
        return written

    def _texts(self, requests: Sequence[Request]) -> dict[Key, TextStates]:
        """The text states of every prompt and negative prompt, on the CPU: each alone, so that none depends on its neighbours."""
        keys = dict.fromkeys(key for request in requests for key in _keys(request))
        encoders, tokenizers = self.models.text
        states = {}
        for prompt, strengths in tqdm(keys, desc="texts", disable=len(keys) < 2):
            self.models.set_strengths(strengths)
            found = states_of(self.arch, encoders, tokenizers, self.model_options, [prompt])
            states[prompt, strengths] = {name: state.cpu() for name, state in found.items()}
        return states

    def _latents(self, denoiser: nn.Module, requests: Sequence[Request], states: dict[Key, TextStates]) -> Iterator[tuple[Request, Tensor]]:
        """Each request with its latents (channels, height, width), float32, on the CPU."""
        models = Models(denoiser=denoiser, text_encoders=[], tokenizers=[], vae=None)
        groups = batches(requests, self.drawing.batch_size)
        with tqdm(total=sum(group[0].steps for group in groups), desc="steps") as bar:
            generator = Generator(
                arch=self.arch, models=models, model_options=self.model_options, device=self.device, dtype=self.dtype,
                splits_guidance=self.drawing.split_guidance, on_step=bar.update,
            )  # fmt: skip
            for group in groups:
                self.models.set_strengths(group[0].strengths)
                asked = [[states[key] for key in _keys(request)] for request in group]
                text = [self._together(column) for column in zip(*asked, strict=True)]
                yield from zip(group, generator.sample(group, text).cpu(), strict=True)

    @torch.no_grad()
    def _pictures(self, drawn: Sequence[tuple[Request, Tensor]]) -> Iterator[Path]:
        for request, latents in tqdm(drawn, desc="pictures", disable=len(drawn) < 2):
            [image] = to_images(self.arch.decode_latents(self.models.vae, latents.unsqueeze(0).to(self.device)))
            yield self.folder.save_image(image, self._parameters(request))

    def _together(self, column: Sequence[TextStates]) -> TextStates:
        return {name: torch.cat([states[name] for states in column]).to(self.device) for name in column[0]}

    def _parameters(self, request: Request) -> dict[str, str]:
        return parameters_of(request, self.adapter_files)


def _keys(request: Request) -> list[Key]:
    """The prompt, and the negative prompt where it is read."""
    prompts = [request.prompt, request.negative] if request.guides else [request.prompt]
    return [(prompt, request.strengths) for prompt in prompts]
