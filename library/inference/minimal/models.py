"""The models of a family, loaded in parts while what is there already works; adapters, fp8 and compilation put on them in order."""

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import nn

from library.core.compiler import check_compiler
from library.core.devices import fp8_refusal
from library.core.fp8 import store_as_fp8
from library.core.log import get_logger
from library.inference.minimal.adapters import merge_for_good, read_networks
from library.inference.minimal.options import AdapterOptions, MachineOptions
from library.models.architecture import Architecture
from networks.network import Network

logger = get_logger(__name__)
PartName = Literal["text", "denoiser", "vae"]


class LoadsInParts(Protocol):
    """A family whose models can be loaded apart. Each raises `ValueError` as `Architecture.load` does."""

    def load_text(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> tuple[list[nn.Module], list[Any]]:
        """Text encoders and tokenizers."""
        ...

    def load_denoiser(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The denoiser."""
        ...

    def load_vae(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The VAE."""
        ...

    def check_fit(self, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any], denoiser: nn.Module) -> None:
        """Raise `ValueError` for parts that do not fit each other, as only the loaded parts tell."""
        ...


class Parts:
    """The models behind futures: one thread loads the text encoders, the denoiser and the VAE in this order.

    One thread only: building a model without memory changes how the whole process makes parameters, so no second one may be built, nor
    an adapter made, at the same time.
    """

    def __init__(self, arch: LoadsInParts, options: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        self.arch = arch
        self._options, self._device, self._dtype = options, device, dtype
        self._thread = ThreadPoolExecutor(1, "loading")
        self._parts: dict[PartName, Future[Any]] = {}
        self._has_failed = False

    def begin(self, name: PartName, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Load a part after those that were begun before, to the usual device in the usual dtype if none is given."""
        places = {"device": device or self._device, "dtype": dtype or self._dtype}
        self._parts[name] = self._thread.submit(self._load, name, places)

    def take(self, name: PartName) -> Any:
        """A part, waited for. Raises what its loading raised; `CancelledError` where a part before it could not be loaded."""
        return self._parts[name].result()

    def take_all(self) -> None:
        """Wait until everything is loaded; raises as `take` does."""
        for name in self._parts:
            self.take(name)

    def _load(self, name: PartName, places: dict[str, Any]) -> Any:
        """On the thread. Nothing is loaded after a failure: by then nobody waits for it, and another run may have begun to load."""
        if self._has_failed:
            raise CancelledError(f"{name}: a part before it could not be loaded")
        try:
            return getattr(self.arch, f"load_{name}")(self._options, **places)
        except BaseException:
            self._has_failed = True
            raise


class DrawingModels:
    """Text encoders, denoiser and VAE as they draw: adapters merged or attached, weights in fp8, blocks compiled."""

    def __init__(self, arch: Architecture, parts: Parts, adapters: AdapterOptions, machine: MachineOptions) -> None:
        self._arch, self._parts, self._adapters, self._machine = arch, parts, adapters, machine
        self._attached: list[Network] = []

    @property
    def text(self) -> tuple[list[nn.Module], list[Any]]:
        """Text encoders and tokenizers; adapters are on the encoders, for which the denoiser has to be there too."""
        if self._adapters.lora_weight:
            _ = self.denoiser
        return self._parts.take("text")

    @cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser, ready. Raises `ValueError` for adapters that do not fit, and what loading raises."""
        self._parts.take_all()
        denoiser, (encoders, tokenizers) = self._parts.take("denoiser"), self._parts.take("text")
        self._parts.arch.check_fit(encoders, tokenizers, denoiser)
        if not self._adapters.no_merge:
            merge_for_good(read_networks(self._adapters, denoiser, encoders))
        if self._machine.fp8:
            logger.info("fp8: the weights of %d layers of the denoiser are stored as float8_e4m3fn", store_as_fp8(denoiser))
        if self._adapters.no_merge:
            self._attached = read_networks(self._adapters, denoiser, encoders)  # after fp8: DoRA measures the weights it acts on
            for network in self._attached:
                network.attach()
        if self._machine.compile:
            compile_blocks(self._arch, denoiser)
        return denoiser

    @property
    def vae(self) -> nn.Module:
        """The VAE."""
        return self._parts.take("vae")

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Set the strength of every attached network; merged ones have theirs for good."""
        for network, strength in zip(self._attached, strengths, strict=False):
            network.set_multiplier(strength)

    def release_text(self) -> None:
        """Give the text encoders' memory back."""
        encoders, _ = self._parts.take("text")
        for encoder in encoders:
            _release(encoder)

    def release_denoiser(self) -> None:
        """Give the denoiser's memory back."""
        _release(self.denoiser)


def check_machine(machine: MachineOptions, device: torch.device, arch: Architecture) -> None:
    """Raises `ValueError` for what the device or the family cannot do: before anything is loaded."""
    if machine.fp8 and (reason := fp8_refusal(device)):
        raise ValueError(f"--fp8: {reason}; leave it out")
    if machine.compile:
        if not arch.has_blocks:
            raise ValueError(f"--compile: {arch.title} has no row of blocks to compile; leave it out")
        check_compiler(device)


def compile_blocks(arch: Architecture, denoiser: nn.Module) -> None:
    """Compile the denoiser's blocks, each by itself: alike ones share their code. The first step of each size waits for it."""
    for block in arch.blocks(denoiser):
        block.compile()


def _release(model: nn.Module) -> None:
    """Leave a model's memory to others, whoever still refers to the model."""
    model.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
