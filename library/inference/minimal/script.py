"""A minimal generation script of a family: options, models, and the way from its source of prompts to files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from tqdm import tqdm

from library.core.atomic import writable_folder
from library.core.command_line import OptionSet, parse_command_line
from library.core.log import get_logger, set_up_logging
from library.core.options import OptionError
from library.core.rules import without_effect
from library.core.tensor_file import listing
from library.inference.images import to_images
from library.inference.minimal.files import PictureFolder, read_latents
from library.inference.minimal.interactive import converse
from library.inference.minimal.models import DrawingModels, LoadsInParts, Parts, check_machine
from library.inference.minimal.options import (
    GROUPS,
    REFUSED,
    AdapterOptions,
    DrawingOptions,
    MachineOptions,
    OutputOptions,
    PromptOptions,
    device_named,
    rules,
)
from library.inference.minimal.requests import requests_of
from library.inference.minimal.stages import Stages
from library.inference.prompts import DrawingLine, PromptLine, parse_line, read_prompt_file
from library.models.architecture import Architecture, GenerationFiles, architecture_named

logger = get_logger(__name__)


class FilesInParts(GenerationFiles, Protocol):
    """A family's group of files of which only some are needed, for parts of the way."""

    for_drawing: ClassVar[tuple[str, ...]]  # the options that only drawing latents reads
    for_decoding: ClassVar[tuple[str, ...]]  # the options that only decoding them reads

    def missing(self, *, draws: bool, decodes: bool) -> Iterator[str]:
        """What is needed for drawing latents, or for decoding them, and was not given."""
        ...

    def check_models(self, *, decodes: bool) -> None:
        """Raises `ValueError` where files for drawing, and for decoding too, are not whole or do not fit each other."""
        ...


def option_groups(arch: Architecture) -> list[type]:
    """The option groups of a family's minimal script, in the order of its help."""
    return [arch.GenerationFiles, *GROUPS]


def refused(arch: Architecture) -> Mapping[str, str]:
    """The options of sd-scripts that are refused here -> the reason."""
    return {**arch.refused, **REFUSED}


def main(family: str, argv: list[str]) -> list[Path]:
    """Run a family's minimal script; returns the files written. Raises `ValueError` for everything the user can mend."""
    arch = architecture_named(family)
    about = f"Draw pictures with {arch.title} and adapters, with the models loaded one after the other."
    options = parse_command_line(option_groups(arch), argv, prog=f"{family}_minimal_inference.py", about=about, refuse=refused(arch))
    set_up_logging()
    for sentence in without_effect(options, rules(arch.GenerationFiles)):
        logger.warning(sentence)
    _check_files(arch, options)
    device = device_named(options[MachineOptions].device)
    output = options[OutputOptions]
    folder = PictureFolder(writable_folder(output.save_path, "--save_path"), with_metadata=not output.no_metadata)
    if options[PromptOptions].latent_path:
        return _told(list(_decode(arch, options, device, folder)))
    return _draw(arch, options, device, folder)


# Two ways to a picture


def _draw(arch: Architecture, options: OptionSet, device: torch.device, folder: PictureFolder) -> list[Path]:
    prompts, machine = options[PromptOptions], options[MachineOptions]

    def requested(lines: list[PromptLine]) -> Any:
        return requests_of(lines, options[DrawingOptions], prompts.negative_prompt, options[AdapterOptions], arch)

    requests = [] if prompts.interactive else requested(_lines(prompts))
    if options[DrawingOptions].split_guidance and requests and not any(request.guides for request in requests):
        logger.warning("--split_guidance has no effect: no picture is guided")
    check_machine(machine, device, arch)
    stages = _stages(arch, options, device, folder)
    if not prompts.interactive:
        return _told(stages.draw(requests))
    _ = stages.models.denoiser  # loaded before the first prompt: what is wrong with the files is said now
    written: list[Path] = []
    converse(lambda line: written.extend(_told(stages.draw(requested([parse_line(line, "this line", DrawingLine)])))))
    return written


def _decode(arch: Architecture, options: OptionSet, device: torch.device, folder: PictureFolder) -> Iterator[Path]:
    """Pictures of saved latents. Every file is read and checked before the VAE is loaded."""
    files, paths = options[arch.GenerationFiles], [Path(path) for path in options[PromptOptions].latent_path]
    saved = [read_latents(path, arch) for path in paths]
    loader = cast(LoadsInParts, arch)
    vae = loader.load_vae(files.model_options(), device=device, dtype=files.dtype_on(device))
    for path, (latents, parameters) in zip(tqdm(paths, desc="pictures"), saved, strict=True):
        with torch.no_grad():
            [image] = to_images(arch.decode_latents(vae, latents.unsqueeze(0).to(device)))
        yield folder.save_image(image, parameters, ending=f"_{path.stem}")


def _told(paths: list[Path]) -> list[Path]:
    logger.info("wrote %s", listing([str(path) for path in paths], 4))
    return paths


# What they need


def _check_files(arch: Architecture, options: OptionSet) -> None:
    files = cast(FilesInParts, options[arch.GenerationFiles])
    only_decodes, output = bool(options[PromptOptions].latent_path), options[OutputOptions]
    problems = list(files.missing(draws=not only_decodes, decodes=only_decodes or output.writes_images))
    if only_decodes and output.writes_latents:
        problems.append(f"--output_type {output.output_type}: --latent_path has the latents already, and gives images")
    if problems:
        raise OptionError(problems)
    if not only_decodes:
        files.check_models(decodes=output.writes_images)


def _lines(prompts: PromptOptions) -> list[PromptLine]:
    if prompts.from_file is not None:
        return read_prompt_file(Path(prompts.from_file), DrawingLine)
    return [parse_line(prompts.prompt or "", "--prompt", DrawingLine)]


def _stages(arch: Architecture, options: OptionSet, device: torch.device, folder: PictureFolder) -> Stages:
    """The stages, with their models being loaded."""
    files, output, machine = options[arch.GenerationFiles], options[OutputOptions], options[MachineOptions]
    dtype, model_options = files.dtype_on(device), files.model_options()
    parts = Parts(cast(LoadsInParts, arch), model_options, device=device, dtype=dtype)
    text_device = torch.device("cpu") if machine.text_encoder_cpu else device
    parts.begin("text", device=text_device, dtype=files.dtype_on(text_device))
    parts.begin("denoiser")
    if output.writes_images:
        parts.begin("vae")
    adapters = options[AdapterOptions]
    return Stages(
        arch=arch, models=DrawingModels(arch, parts, adapters, machine), model_options=model_options, device=device, dtype=dtype,
        drawing=options[DrawingOptions], output=output, folder=folder, adapter_files=adapters.lora_weight,
        keeps_models=options[PromptOptions].interactive,
    )  # fmt: skip
