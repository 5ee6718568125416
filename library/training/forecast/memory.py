"""The memory that a run will need, by part and by phase, from fakes: nothing is loaded and nothing is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from library.core.command_line import OptionSet
from library.core.fp8 import store_as_fp8
from library.core.quantised import packable, packed_bytes
from library.data.options import DataOptions
from library.models.architecture import Architecture, Models
from library.models.forecast import forecast_of
from library.models.vae_pieces import set_pieces
from library.training.adapters import NetworkOptions, TrainedNetwork, build_trained_network
from library.training.forecast.ledger import total_bytes
from library.training.forecast.optimizers import States, optimizer_states
from library.training.forecast.phases import Shape, StepBytes, drawing_bytes, encoding_bytes, step_bytes, text_bytes
from library.training.forecast.recomputation import kept_by_blocks
from library.training.forecast.stand_in import own_bytes, stand_in, turn_fake
from library.training.memory.activations import fakes
from library.training.memory.block_swap import check_count
from library.training.memory.budget import Activations
from library.training.memory.checkpointing import set_checkpointing
from library.training.memory.options import MemoryOptions
from library.training.model import TrainingModel
from library.training.optimizing.average import AverageOptions
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.precision import PrecisionOptions
from networks.protocol import load_network_module, network_modules

GPU, MAIN, FREED = "GPU", "main memory", "freed"
CONTEXT = 700 * 2**20  # bytes of a GPU that CUDA, cuBLAS and cuDNN take for themselves
SLACK = 0.04  # of what tensors take: sizes that the allocator rounds up, and gaps that it cannot use
PROGRAM = 2500 * 2**20  # bytes of main memory for Python, torch and CUDA


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one part of a run takes while it trains."""

    name: str
    place: str
    bytes: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The most that a phase takes of the GPU."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """The estimate: parts of the training step, phases, and both peaks in bytes."""

    shape: Shape
    parts: tuple[Part, ...]
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()

    @property
    def gpu_peak(self) -> int:
        """The most that any phase takes of the GPU."""
        return max(phase.bytes for phase in self.phases)

    @property
    def main_peak(self) -> int:
        """What main memory holds while training."""
        return sum(part.bytes for part in self.parts if part.place == MAIN)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A run on fakes: its network, and the memory of its worst batch."""

    trained: TrainedNetwork
    memory: MemoryFacts


def forecast_run(
    arch: Architecture,
    options: OptionSet,
    shapes: Sequence[Shape],
    *,
    text_is_cached: bool,
    drawn: Shape | None = None,
    cached_bytes: int = 0,
    as_on_gpu: bool = True,
) -> Forecast:
    """Build the run on fakes and make one step of the largest of `shapes`.

    `drawn` is the picture of a preview, where there are any; `cached_bytes` what caches hold in main memory. With `as_on_gpu` False the
    casts are a CPU's, and nothing is added for CUDA. Raises `ValueError` for options that no network can be built from.
    """
    with fakes(precision=options[PrecisionOptions].weight_dtype, as_on_gpu=as_on_gpu):
        return _Run(arch, options, text_is_cached, as_on_gpu).forecast(largest(shapes), drawn, cached_bytes)


def largest(shapes: Sequence[Shape]) -> Shape:
    """The shape with the most pixels in a batch."""
    return max(shapes, key=lambda shape: (shape.width * shape.height * shape.batch, shape.width))


class _Run:
    """The models and the network of a run on fakes, and what is known of them."""

    def __init__(self, arch: Architecture, options: OptionSet, text_is_cached: bool, as_on_gpu: bool) -> None:
        self.arch, self.options, self.text_is_cached, self.as_on_gpu = arch, options, text_is_cached, as_on_gpu
        self.memory, self.data = options[MemoryOptions], options[DataOptions]
        self.model_options = options[arch.ModelOptions]
        self.models = _stand_ins(arch, self.model_options, options[PrecisionOptions].weight_dtype)
        if self.models.vae is not None:
            set_pieces(self.models.vae, one_by_one=self.memory.vae_slicing, in_tiles=self.memory.vae_tiling)
        self.loaded = own_bytes(self.models.denoiser)
        self.denoiser, self.unpacked, self.stored_as = _store(self.models.denoiser, options)
        self.trained = _trained(self.models, options, text_is_cached)
        if options.values().get("full_bf16"):
            for parameter in self.trained.parameters:
                parameter.data = parameter.data.to(torch.bfloat16)
        self.notes: list[str] = []
        self.is_drawing = False

    def forecast(self, shape: Shape, drawn: Shape | None, cached_bytes: int) -> Forecast:
        """Run the phases."""
        self.is_drawing = drawn is not None
        tokens = self._tokens(shape.batch)
        at_once = self.data.text_encoder_batch_size or self.data.train_batch_size
        captions = self._tokens(at_once) if self.data.caches_text and at_once != shape.batch else tokens
        encoding, text = text_bytes(self.arch, self.models.text_encoders, captions)
        if captions is not tokens:
            _, text = text_bytes(self.arch, self.models.text_encoders, tokens)
        pictures = encoding_bytes(self.arch, self.models.vae, self._encoded(shape)) if self.models.vae is not None else 0
        drawing = 0
        if drawn is not None:
            _, prompt = text_bytes(self.arch, self.models.text_encoders, self._tokens(drawn.batch))
            drawing = drawing_bytes(self.arch, self.models, prompt, drawn)
        model, offloaded = self._training_model(shape, text)
        step = step_bytes(model, self.arch, text if self.text_is_cached else tokens, shape, self.trained.parameters)
        step = replace(step, activations=max(0, step.activations - offloaded), working=step.working + self.unpacked)
        states = optimizer_states(self.trained.groups, self.options[OptimizerOptions])
        self.notes += [states.note] if states.note else []
        found = self._parts(step, states, offloaded, cached_bytes)
        parts = tuple(part for part in found if part.bytes and part.place != FREED)
        phases = self._phases(parts, step, states.working, encoding, pictures, drawing)
        facts = MemoryFacts(shape=shape, parts=parts, phases=tuple(phases), notes=tuple(self.notes))
        return Forecast(trained=self.trained, memory=facts)

    # The training step

    def _training_model(self, shape: Shape, text: Any) -> tuple[TrainingModel, int]:
        """The model that trains, and what offloaded checkpoints keep in main memory instead of on the GPU."""
        encoders = [] if self.text_is_cached else self.models.text_encoders
        trained = self.trained
        model = TrainingModel(self.arch, self.models.denoiser, encoders, trained.network, trains_text_encoders=trained.trains_text_encoders)
        trained.network.train()
        if not self.memory.checkpoints:
            return model, 0
        here = replace(self.memory, cpu_offload_checkpointing=False, unsloth_offload_checkpointing=False)
        found: Activations | None = None
        if self.memory.budget is not None or self.memory.offloads:
            found = kept_by_blocks(model, self.arch, text, shape)
        set_checkpointing(model, here, torch.device("cpu"), lambda: _known(found))
        given = sorted((block.given for block in found.blocks), reverse=True) if found is not None and self.memory.offloads else []
        return model, sum(given[1:])  # the block at work has its own on the GPU

    def _parts(self, step: StepBytes, states: States, offloaded: int, cached_bytes: int) -> list[Part]:
        swapped = self._swapped()
        adapter = total_bytes(self.trained.network.parameters()) + total_bytes(self.trained.network.buffers())
        vae = 0 if self.models.vae is None else own_bytes(self.models.vae)
        averaged = 0 if self.options[AverageOptions].ema_decay is None else sum(own.numel() for own in self.trained.parameters)
        return [
            Part(name="denoiser", place=GPU, bytes=self.denoiser - swapped.away, note=self.stored_as),
            Part(name="swapped blocks", place=MAIN, bytes=swapped.home, note=f"{self.memory.blocks_to_swap} blocks"),
            Part(name="text encoders", place=self._rests(self.text_is_cached), bytes=own_bytes(*self.models.text_encoders)),
            Part(name="VAE", place=self._rests(self.data.caches_latents), bytes=vae),
            Part(name="adapter", place=GPU, bytes=adapter),
            Part(name="optimizer", place=GPU, bytes=states.bytes),
            Part(name="average", place=GPU, bytes=averaged * torch.float32.itemsize, note="--ema_decay"),
            Part(name="paged optimizer", place=MAIN, bytes=states.paged),
            Part(name="gradients", place=GPU, bytes=step.gradients, note="those there are at the worst moment"),
            Part(name="activations", place=GPU, bytes=step.activations, note="kept for the backward pass"),
            Part(name="working space", place=GPU, bytes=step.working, note="at the worst moment of the backward pass"),
            Part(name="offloaded checkpoints", place=MAIN, bytes=offloaded),
            Part(name="caches", place=MAIN, bytes=cached_bytes),
            *self._overhead(step),
        ]

    def _overhead(self, step: StepBytes) -> list[Part]:
        if not self.as_on_gpu:
            return []
        slack = int(SLACK * step.peak)
        return [
            Part(name="CUDA and its allocator", place=GPU, bytes=CONTEXT + slack, note="assumed"),
            Part(name="Python and its libraries", place=MAIN, bytes=PROGRAM, note="assumed"),
        ]

    def _phases(self, parts: Sequence[Part], step: StepBytes, stepping: int, text: int, pictures: int, drawing: int) -> list[Phase]:
        """What stands on the GPU in each phase, and what it takes besides."""
        training = sum(part.bytes for part in parts if part.place == GPU)
        standing = training - step.peak
        encoders = own_bytes(*self.models.text_encoders)
        vae = 0 if self.models.vae is None else own_bytes(self.models.vae)
        overhead = CONTEXT if self.as_on_gpu else 0
        denoiser = 0 if self.memory.blocks_to_swap else self.loaded  # it waits in main memory until blocks are swapped
        before = overhead + denoiser + encoders + vae
        phases = [Phase(name="training step", bytes=training), Phase(name="optimizer step", bytes=standing + step.gradients + stepping)]
        if self.data.caches_latents:
            phases.append(Phase(name="caching latents", bytes=before + pictures))
        else:
            phases.append(Phase(name="encoding a batch of images", bytes=standing + pictures))
        if self.data.caches_text:
            phases.append(Phase(name="caching text", bytes=before + text))
        if drawing:
            on_gpu = {part.name for part in parts if part.place == GPU}
            visitors = ("text encoders" not in on_gpu) * encoders + ("VAE" not in on_gpu) * vae
            phases.append(Phase(name="previews", bytes=standing + visitors + drawing))
        return phases

    def _rests(self, is_cached: bool) -> str:
        """Where a model whose output may be cached rests while the run trains; where it was freed, nowhere."""
        keeps = self.memory.highvram or (self.memory.lowram and self.is_drawing)
        return GPU if not is_cached or keeps else MAIN if self.is_drawing else FREED

    # Sizes

    def _encoded(self, shape: Shape) -> Shape:
        return replace(shape, batch=self.data.vae_batch_size) if self.data.caches_latents else shape

    def _tokens(self, batch: int) -> Any:
        known = forecast_of(self.arch, self.model_options)
        if known is None:
            raise ValueError(f"{self.arch.title} does not say what its captions look like before it is loaded")
        return known.tokens(batch)

    def _swapped(self) -> "_Swapped":
        count = self.memory.blocks_to_swap
        if not count:
            return _Swapped()
        blocks = self.arch.blocks(self.models.denoiser)
        check_count(count, len(blocks))
        blocks = blocks[-count:]
        sizes = [own_bytes(block) for block in blocks]
        pinned = sum(
            1 << (math.ceil(each.numel() * each.element_size()) - 1).bit_length() for block in blocks for each in block.parameters()
        )
        return _Swapped(away=sum(sizes) - sum(sorted(sizes)[-2:]), home=pinned)


@dataclass(frozen=True, kw_only=True)
class _Swapped:
    away: int = 0  # bytes that are not on the GPU: two blocks visit it at a time
    home: int = 0  # bytes in pinned main memory, which torch rounds up to powers of two


def _stand_ins(arch: Architecture, model_options: Any, dtype: torch.dtype) -> Models:
    # accelerate's empty weights cannot be made of torch 2.11's fakes
    with unset_fake_temporarily(), torch.autocast("cpu", enabled=False):
        models = arch.outlined(model_options)
    stand_in(models.denoiser, dtype)
    for encoder in models.text_encoders:
        stand_in(encoder, dtype)
    if models.vae is not None:
        stand_in(models.vae, torch.float32 if getattr(model_options, "no_half_vae", False) else dtype)
    return models


def _trained(models: Models, options: OptionSet, text_is_cached: bool) -> TrainedNetwork:
    """The network on fakes. Files and foreign code need real tensors, which fakes then replace."""
    chosen = options[NetworkOptions]
    build = partial(build_trained_network, models, chosen, options[OptimizerOptions], text_is_cached=text_is_cached)
    if chosen.network_weights is None and load_network_module(chosen.network_module).__name__ in network_modules():
        return build()
    with unset_fake_temporarily(), torch.autocast("cpu", enabled=False):
        trained = build()
    turn_fake(trained.network, trained.groups)
    return trained


def _store(denoiser: nn.Module, options: OptionSet) -> tuple[int, int, str]:
    """Store the denoiser as the options say: its bytes, those of the largest weight that is unpacked for use, and the form's name.

    Packed weights stay whole on the fakes: what autograd keeps is the same, since packed layers unpack again in the backward pass.
    """
    values = options.values()
    form = values.get("quantize_base") or ("fp8_scaled" if values.get("fp8_scaled") else None)
    if form is None:
        if values["fp8_base"] or values.get("fp8_base_unet"):
            store_as_fp8(denoiser)
            return own_bytes(denoiser), 0, "fp8"
        return own_bytes(denoiser), 0, str(options[PrecisionOptions].weight_dtype).removeprefix("torch.")
    weights = {id(layer): layer.weight for *_, layer in packable(denoiser)}.values()
    whole = [weight.numel() * weight.element_size() for weight in weights]
    packed = sum(packed_bytes(form, tuple(weight.shape)) for weight in weights)
    return own_bytes(denoiser) - sum(whole) + packed, max(whole, default=0), form


def _known(found: Activations | None) -> Activations:
    assert found is not None, "asked for with a budget only"
    return found
