"""The generation script: options, prompts, networks, files."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from library.core.atomic import writable_folder
from library.core.command_line import parse_command_line
from library.core.devices import best_device
from library.core.log import get_logger, set_up_logging
from library.core.options import OptionError, option
from library.diffusion.samplers import SamplerName
from library.inference.generate import Generator, Request
from library.inference.images import picture_path, save_png, to_images
from library.inference.networks import AttachedNetworks, NetworkFileOptions, attach_networks
from library.inference.not_yet import NOT_YET
from library.inference.prompts import PromptLine, parse_line, read_prompt_file
from library.models.architecture import Architecture, architecture_named

logger = get_logger(__name__)
MAX_SEED = 2**32 - 1


@dataclass(kw_only=True, frozen=True)
class ModelFileOptions:
    """Models."""

    ckpt: str = option(help="model file (.safetensors) or diffusers folder")
    vae: str | None = option(None, help="another VAE than the one in --ckpt")
    tokenizer: str | None = option(None, help="folder with the tokenizer's vocab.json and merges.txt")
    tokenizer_cache_dir: str | None = option(None, help="folder where tokenizers from the hub are kept")
    max_embeddings_multiples: int = option(1, help="chunks of 75 tokens that a prompt may take: 1, 2 or 3")
    sdxl: bool = option(False, help="the model is SDXL; it always is here, accepted for sd-scripts' commands")
    no_half_vae: bool = option(False, help="run the VAE in fp32")
    fp16: bool = option(False, help="run in fp16")
    bf16: bool = option(False, help="run in bf16")

    def check(self) -> Iterable[str]:
        """What is wrong: two precisions, more chunks than a prompt may have."""
        if self.fp16 and self.bf16:
            yield "--fp16 and --bf16 exclude each other"
        if self.max_embeddings_multiples not in (1, 2, 3):
            yield f"--max_embeddings_multiples {self.max_embeddings_multiples}: must be 1, 2 or 3"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the models."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32


@dataclass(kw_only=True, frozen=True)
class PictureOptions:
    """Pictures."""

    prompt: str | None = option(None, help="prompt, with line options behind it")
    from_file: str | None = option(None, help="text file with one prompt a line")
    outdir: str = option("outputs", help="folder for the pictures; made if missing")
    sequential_file_name: bool = option(False, help="number the files instead of dating them")
    images_per_prompt: int = option(1, help="pictures of each prompt")
    n_iter: int = option(1, help="how often to go through all prompts")
    batch_size: int = option(1, help="pictures drawn at once")
    W: int | None = option(None, help="width in pixels; the model's usual size where absent")
    H: int | None = option(None, help="height in pixels; the model's usual size where absent")
    steps: int = option(50, help="number of steps")
    scale: float = option(7.5, help="guidance scale; 1 turns guidance off")
    sampler: SamplerName = option("ddim", help="sampler")
    seed: int | None = option(None, help="seed; drawn where absent. With several pictures each gets a seed drawn from it")

    def check(self) -> Iterable[str]:
        """What is wrong: no prompt or two sources, counts and sizes below one."""
        if (self.prompt is None) == (self.from_file is None):
            yield "give either --prompt or --from_file"
        for name in ("images_per_prompt", "n_iter", "batch_size", "W", "H", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            yield f"--seed {self.seed}: must lie between 0 and {MAX_SEED}"


GROUPS = [ModelFileOptions, PictureOptions, NetworkFileOptions]
"""The option groups of the script, in the order of its help."""


def main(family: str, argv: list[str]) -> list[Path]:
    """Run a family's generation script; returns the files written. Raises `ValueError` for everything the user can mend."""
    arch = architecture_named(family)
    options = parse_command_line(GROUPS, argv, prog="gen_img.py", about=f"Draw pictures with {arch.title} and adapters.", refuse=NOT_YET)
    set_up_logging()
    pictures, files, networks = options[PictureOptions], options[ModelFileOptions], options[NetworkFileOptions]
    requests = list(requests_of(pictures, networks.strengths(), arch))
    folder = writable_folder(pictures.outdir, "--outdir")
    device = best_device()
    if device.type == "cpu" and files.fp16:
        raise ValueError("--fp16: a CPU cannot run these models in fp16; use --bf16, or leave it out")
    model_options = model_options_of(arch, files)
    models = arch.load(model_options, device=device, dtype=files.dtype)
    attached = attach_networks(models, networks)
    generator = Generator(arch=arch, models=models, model_options=model_options, device=device, dtype=files.dtype)
    return list(draw_all(generator, attached, requests, folder, pictures))


def model_options_of(arch: Architecture, files: ModelFileOptions) -> Any:
    """The family's own model options for this script's shorter names."""
    return arch.ModelOptions(
        pretrained_model_name_or_path=files.ckpt,
        vae=files.vae,
        tokenizer=files.tokenizer,
        tokenizer_cache_dir=files.tokenizer_cache_dir,
        max_token_length=75 * files.max_embeddings_multiples,
        no_half_vae=files.no_half_vae,
    )


def requests_of(options: PictureOptions, strengths: tuple[float, ...], arch: Architecture) -> Iterator[Request]:
    """Every picture to draw, in order. Raises `OptionError` for sizes that the family cannot draw."""
    lines = [parse_line(options.prompt, "--prompt")] if options.prompt is not None else read_prompt_file(Path(options.from_file or ""))
    seeds = _seeds(options, single=len(lines) * options.images_per_prompt * options.n_iter == 1)
    requests: list[Request] = []
    for line in lines * options.n_iter:
        requests += _requests_of_line(line, options, strengths, arch, seeds)
    problems = dict.fromkeys(problem for request in requests for problem in _size_problems(request, arch))
    if problems:
        raise OptionError(problems)
    yield from requests


def draw_all(
    generator: Generator, attached: AttachedNetworks, requests: Sequence[Request], folder: Path, options: PictureOptions
) -> Iterator[Path]:
    """Draw the requests in batches of alike ones; yields each file once it is written."""
    index = 0
    for batch in tqdm(_batches(requests, options.batch_size), desc="pictures"):
        attached.set_strengths(batch[0].strengths)
        for request, image in zip(batch, to_images(generator.draw(batch)), strict=True):
            path = picture_path(folder, index, request.seed, sequential=options.sequential_file_name)
            save_png(image, path, parameters_of(request, attached.files))
            index += 1
            yield path


def parameters_of(request: Request, files: Sequence[str]) -> dict[str, str]:
    """The text entries of a picture: all that is needed to draw it again with the same models."""
    entries = {
        "prompt": request.prompt,
        "negative-prompt": request.negative,
        "seed": str(request.seed),
        "sampler": request.sampler,
        "steps": str(request.steps),
        "scale": str(request.scale),
        "width": str(request.width),
        "height": str(request.height),
    }
    if files:
        entries["networks"] = ", ".join(f"{Path(file).name}:{strength:g}" for file, strength in zip(files, request.strengths, strict=True))
    return entries


# From lines to requests


def _requests_of_line(
    line: PromptLine, options: PictureOptions, strengths: tuple[float, ...], arch: Architecture, seeds: Iterator[int]
) -> list[Request]:
    own = line.options
    if own.am and not strengths:
        raise ValueError(f"--am {','.join(map(str, own.am))} in '{line.prompt}': there is no network whose strength it could set")
    if len(own.am) > len(strengths):
        raise ValueError(f"--am in '{line.prompt}' has {len(own.am)} strengths for {len(strengths)} networks")
    request = Request(
        prompt=line.prompt,
        negative=own.n or "",
        width=own.w or options.W or arch.default_resolution,
        height=own.h or options.H or arch.default_resolution,
        steps=own.s or options.steps,
        scale=options.scale if own.l is None else own.l,
        sampler=options.sampler,
        seed=0,
        strengths=own.am + own.am[-1:] * (len(strengths) - len(own.am)) if own.am else strengths,
    )
    count = max(options.images_per_prompt, len(own.d))
    return [replace(request, seed=own.d[index] if index < len(own.d) else next(seeds)) for index in range(count)]


def _seeds(options: PictureOptions, single: bool) -> Iterator[int]:
    """`--seed` itself for a single picture, else 32-bit seeds drawn from it."""
    if options.seed is not None and single:
        yield options.seed
    source = random.Random(options.seed)
    while True:
        yield source.randint(0, MAX_SEED)


def _size_problems(request: Request, arch: Architecture) -> Iterator[str]:
    step = arch.resolution_step
    for name, side in (("width", request.width), ("height", request.height)):
        if side % step:
            yield f"{name} {side}: {arch.title} draws multiples of {step}; try {max(step, round(side / step) * step)}"


def _batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    batches: list[list[Request]] = []
    for request in requests:
        if batches and len(batches[-1]) < size and batches[-1][0].alike(request):
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches
