"""What a model family must answer. Each folder beside this file is one family; nothing outside a folder names it.

A family's names stand in its `names.py` (see `naming.py`); all else is a subclass of `Architecture` in `<family>/spec.py`, exported
there as `ARCHITECTURE`. Trainers and tools reach it through `architecture_named` (by name) or `architecture_of` (by the model in hand).
"""

import importlib
import importlib.util
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from library.data.batch import Sizes, TextStates
from library.data.caches.npz import NpzLatents, NpzText
from library.diffusion.process import NoiseProcess
from library.models.naming import Naming

Tokens = dict[str, Tensor]
"""Token ids of a batch of captions: a family's fixed set of integer tensors, each with the batch in dimension 0."""


@dataclass(kw_only=True)
class Models:
    """The loaded models of one family. `vae` may be None where latents come from a cache."""

    denoiser: nn.Module
    text_encoders: list[nn.Module]
    tokenizers: list[Any]
    vae: nn.Module | None


class GenerationFiles(Protocol):
    """The option group of a family's generation script: which model files to load, and in which precision."""

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of the models' weights. Raises `ValueError` for one that the device cannot run."""
        ...

    def model_options(self) -> Any:
        """The same files as the family's `ModelOptions`."""
        ...


class Architecture(Naming):
    """The answers of one family. Instances hold no state."""

    base_model_version: ClassVar[str]  # ss_base_model_version
    modelspec_architecture: ClassVar[str]  # modelspec.architecture without the /lora
    modelspec_implementation: ClassVar[str]  # modelspec.implementation
    latent_channels: ClassVar[int]
    pixels_per_latent: ClassVar[int]  # side of the square of pixels behind one latent position
    resolution_step: ClassVar[int]  # image sides and bucket steps are multiples of it
    longest_side: ClassVar[int | None] = None  # of an image, where the denoiser knows no more positions
    default_resolution: ClassVar[int]
    text_keys: ClassVar[tuple[str, ...]]  # the keys of TextStates
    has_blocks: ClassVar[bool] = False  # a row of blocks in the denoiser, of which those not at work may leave the device
    ModelOptions: ClassVar[type]  # the option group that says which files to load
    NoiseOptions: ClassVar[type]  # the option group of training about timesteps and noise, a `noise.NoiseOptions`; all of it has defaults
    GenerationFiles: ClassVar[type[GenerationFiles]]  # the option group of generation that says which files to load
    refused: ClassVar[Mapping[str, str]] = {}  # options of sd-scripts' scripts that mean nothing for this family -> the reason

    @abstractmethod
    def load(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Models:
        """Load all models; `ValueError` names the file and its missing, extra or misshapen keys, or the family it seems to be."""

    def outlined(self, options: Any = None) -> Models:
        """The models without their weights (parameters on the meta device) and without tokenizers, ready to be called.

        As the files that `options` (`ModelOptions`) name describe them, at full size where there are none. Raises `ValueError` for
        files of another family. Here from `outline`, without a VAE.
        """
        denoiser, *encoders = (module for _, module in self.outline())
        return Models(denoiser=denoiser, text_encoders=encoders, tokenizers=[], vae=None)

    @abstractmethod
    def noise_process(self, options: Any = None, model_options: Any = None) -> NoiseProcess:
        """How the family mixes latents and noise, and what its denoiser predicts.

        `options` are its `NoiseOptions`; `model_options` its `ModelOptions`, where what a model predicts is a fact of its checkpoint.
        """

    @abstractmethod
    def encode_images(self, vae: nn.Module, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Model-ready latents (batch, channels, height/8, width/8) of pixels (batch, 3, height, width) in [-1, 1]."""

    @abstractmethod
    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) in [-1, 1] of model-ready latents."""

    @abstractmethod
    def tokenize(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> Tokens:
        """Token ids of the captions, padded and chunked as the family does."""

    @abstractmethod
    def overlong(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> list[int]:
        """How many tokens of each caption are beyond what `tokenize` keeps; 0 for one that fits."""

    @abstractmethod
    def encode_text(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> TextStates:
        """Text states of token ids, differentiable."""

    def conditioned(self, denoiser: nn.Module, text: TextStates) -> TextStates:
        """What the denoiser makes of the text once for all timesteps, for `predict` in place of the text; here the text itself."""
        return text

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: TextStates, sizes: Sizes) -> Tensor:
        """The denoiser's output (same shape as `noisy`) for timesteps (batch,)."""

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The denoiser's row of blocks in the order of its forward pass; empty unless `has_blocks`."""
        return []

    @abstractmethod
    def latents_identity(self, options: Any) -> str:
        """A string that changes whenever the latents of these model options would: what the VAE is, and how it computes."""

    @abstractmethod
    def text_identity(self, options: Any) -> str:
        """A string that changes whenever the text states of these model options would: encoders, tokenizers, length of captions."""

    def npz_latents(self) -> NpzLatents | None:
        """How sd-scripts' cached latents of this family are named and read; None where there are none."""
        return None

    def npz_text(self, text_encoders: Sequence[nn.Module], options: Any) -> NpzText | None:
        """How sd-scripts' cached text states of this family are named and read, for these encoders; None where they are of no use."""
        return None

    def load_vae(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The VAE alone, for caches. Raises `ValueError` as `load` does."""
        vae = self.load(options, device=device, dtype=dtype).vae
        assert vae is not None, "a family whose models come without a VAE loads it in its own way"
        return vae

    def load_text(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> tuple[list[nn.Module], list[Any]]:
        """The text encoders and tokenizers alone, for caches. Raises `ValueError` as `load` does."""
        models = self.load(options, device=device, dtype=dtype)
        return models.text_encoders, models.tokenizers

    @abstractmethod
    def metadata(self, options: Any) -> dict[str, str]:
        """The `ss_*` entries about the base model (name, hashes, token length)."""


def architecture_names() -> list[str]:
    """The families that can be trained and run: the folders beside this file with a `spec.py`, in alphabetical order."""
    import library.models

    folders = sorted(module.name for module in pkgutil.iter_modules(library.models.__path__) if module.ispkg)
    return [name for name in folders if importlib.util.find_spec(f"library.models.{name}.spec") is not None]


def architecture_named(name: str) -> Architecture:
    """The family in the folder `name`. Raises `ValueError` for an unknown one."""
    if name not in architecture_names():
        raise ValueError(f"unknown model family '{name}'; there are: {', '.join(architecture_names())}")
    return importlib.import_module(f"library.models.{name}.spec").ARCHITECTURE


def architecture_of(denoiser: nn.Module) -> Architecture | None:
    """The family that recognises this denoiser, or None."""
    return next((arch for arch in map(architecture_named, architecture_names()) if arch.recognises(denoiser)), None)
