"""The generation script: options, prompts, networks, files."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from library.core.atomic import writable_folder
from library.core.command_line import parse_command_line
from library.core.devices import best_device
from library.core.log import get_logger, set_up_logging
from library.core.options import OptionError, option
from library.diffusion.samplers import SamplerName
from library.inference.generate import Generator, Request, batches, size_problems
from library.inference.images import picture_path, save_png, to_images
from library.inference.networks import AttachedNetworks, NetworkFileOptions, attach_networks
from library.inference.not_yet import NOT_YET
from library.inference.prompts import MAX_SEED, PromptLine, infinite, parse_line, read_prompt_file
from library.models.architecture import Architecture, architecture_named

logger = get_logger(__name__)


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
        """What is wrong: no prompt or two sources, counts and sizes below one, an infinite scale."""
        yield from infinite(self, ("scale",))
        if (self.prompt is None) == (self.from_file is None):
            yield "give either --prompt or --from_file"
        for name in ("images_per_prompt", "n_iter", "batch_size", "W", "H", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            yield f"--seed {self.seed}: must lie between 0 and {MAX_SEED}"


def option_groups(arch: Architecture) -> list[type]:
    """The option groups of a family's generation script, in the order of its help."""
    return [arch.GenerationFiles, PictureOptions, NetworkFileOptions]


def main(family: str, argv: list[str]) -> list[Path]:
    """Run a family's generation script; returns the files written. Raises `ValueError` for everything the user can mend."""
    arch = architecture_named(family)
    about, refuse = f"Draw pictures with {arch.title} and adapters.", {**NOT_YET, **arch.refused}
    options = parse_command_line(option_groups(arch), argv, prog="gen_img.py", about=about, refuse=refuse)
    set_up_logging()
    pictures, files, networks = options[PictureOptions], options[arch.GenerationFiles], options[NetworkFileOptions]
    requests = list(requests_of(pictures, networks.strengths(), arch))
    folder = writable_folder(pictures.outdir, "--outdir")
    device = best_device()
    dtype, model_options = files.dtype_on(device), files.model_options()
    models = arch.load(model_options, device=device, dtype=dtype)
    attached = attach_networks(models, networks)
    generator = Generator(arch=arch, models=models, model_options=model_options, device=device, dtype=dtype)
    return list(draw_all(generator, attached, requests, folder, pictures))


def requests_of(options: PictureOptions, strengths: tuple[float, ...], arch: Architecture) -> Iterator[Request]:
    """Every picture to draw, in order. Raises `OptionError` for sizes that the family cannot draw."""
    lines = [parse_line(options.prompt, "--prompt")] if options.prompt is not None else read_prompt_file(Path(options.from_file or ""))
    seeds = _seeds(options, single=len(lines) * options.images_per_prompt * options.n_iter == 1)
    requests: list[Request] = []
    for line in lines * options.n_iter:
        requests += _requests_of_line(line, options, strengths, arch, seeds)
    problems = dict.fromkeys(problem for request in requests for problem in size_problems(request, arch))
    if problems:
        raise OptionError(problems)
    yield from requests


def draw_all(
    generator: Generator, attached: AttachedNetworks, requests: Sequence[Request], folder: Path, options: PictureOptions
) -> Iterator[Path]:
    """Draw the requests in batches of alike ones; yields each file once it is written."""
    index = 0
    for batch in tqdm(batches(requests, options.batch_size), desc="pictures"):
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
    if request.shift is not None:
        entries["flow-shift"] = str(request.shift)
    if files:
        entries["networks"] = ", ".join(f"{Path(file).name}:{strength:g}" for file, strength in zip(files, request.strengths, strict=True))
    return entries


# From lines to requests


def _requests_of_line(
    line: PromptLine, options: PictureOptions, strengths: tuple[float, ...], arch: Architecture, seeds: Iterator[int]
) -> list[Request]:
    own = line.options
    request = Request(
        prompt=line.prompt,
        negative=own.n or "",
        width=own.w or options.W or arch.default_resolution,
        height=own.h or options.H or arch.default_resolution,
        steps=own.s or options.steps,
        scale=options.scale if own.l is None else own.l,
        sampler=options.sampler,
        seed=0,
        strengths=line.strengths(strengths),
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
