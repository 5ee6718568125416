"""Pictures drawn while training, the same prompts and seeds each time: one sees what the network learns.

They are drawn as the generation scripts draw, latents and steps in float32. They never disturb the run: their noise comes from generators
of their own, the global ones are put back, and what fails is said and left.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from library.core.clock import dated
from library.core.keyed_random import keyed_seed
from library.core.log import get_logger
from library.core.options import OptionError, option
from library.core.random_state import kept_random_state
from library.core.rules import Rule
from library.data.batch import TextStates
from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import SamplerName
from library.inference.generate import Generator, Request, size_problems
from library.inference.images import save_png, to_images
from library.inference.prompts import MAX_SEED, PromptLine
from library.inference.script import parameters_of
from library.models.architecture import Architecture
from library.training.preview_prompts import PreviewLine, read_preview_prompts
from networks.protocol import TrainableNetwork

logger = get_logger(__name__)
SIDE, STEPS, SCALE = 512, 30, 7.5  # of a line that says nothing else, as in sd-scripts
INTERVALS = ("sample_every_n_steps", "sample_every_n_epochs")


@dataclass(kw_only=True, frozen=True)
class PreviewOptions:
    """Previews."""

    sample_prompts: str | None = option(
        None, help="pictures drawn while training: a text file with one prompt a line and its line options, or a .toml or .json file"
    )
    sample_every_n_steps: int | None = option(None, help="draw them after every n optimizer steps")
    sample_every_n_epochs: int | None = option(None, help="draw them after every n epochs")
    sample_at_first: bool = option(False, help="draw them before the first step too")
    sample_strengths: tuple[float, ...] = option((), help="draw each of them at these strengths of the network, such as 0 0.5 1")
    sample_sampler: SamplerName | None = option(
        None, help="sampler of the previews (--ss in a prompt line); the family's own where absent: ddim, or euler for a flow"
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(option=name, when=lambda v: v["sample_prompts"] is None, because="there are no --sample_prompts")
            for name in ("sample_sampler", "sample_strengths")
        ),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: intervals below one or without prompts, prompts that nothing draws."""
        given = [name for name in (*INTERVALS, "sample_at_first") if getattr(self, name)]
        for name in INTERVALS:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
        if self.sample_prompts is None:
            yield from (f"--{name} has no effect without --sample_prompts" for name in given)
        elif not given:
            yield "--sample_prompts has no effect without --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first"


@dataclass(kw_only=True)
class Previews:
    """What is drawn, when, and into which files."""

    options: PreviewOptions
    requests: list[Request]
    folder: Path
    name: str
    _texts: dict[int, list[TextStates]] = field(default_factory=dict)  # of requests by number, where no text encoder is trained

    @classmethod
    def of(
        cls, options: PreviewOptions, arch: Architecture, output: Path, name: str | None, seed: int, model_options: Any = None
    ) -> "Previews":
        """The previews of a run, in `sample/` of its folder. Raises `ValueError` for prompts that cannot be read or drawn."""
        if options.sample_prompts is None:
            return cls(options=options, requests=[], folder=output, name="")
        process, requests = arch.noise_process(model_options=model_options), []
        for index, line in enumerate(read_preview_prompts(Path(options.sample_prompts))):
            try:
                requests += _requests(line, process, options.sample_sampler, seed, index)
            except ValueError as error:
                raise ValueError(f"--sample_prompts {options.sample_prompts} prompt {index + 1}: {error}") from error
        problems = [problem for request in requests for problem in size_problems(request, arch)]
        if problems:
            raise OptionError(f"--sample_prompts {options.sample_prompts}: {problem}" for problem in dict.fromkeys(problems))
        return cls(options=options, requests=requests, folder=output / "sample", name=name or "last")

    def due_at_first(self) -> bool:
        """Are they drawn before the first step?"""
        return self.options.sample_at_first

    def due_after_step(self, step: int) -> bool:
        """Are they drawn after this optimizer step?"""
        return bool(self.options.sample_every_n_steps) and step % (self.options.sample_every_n_steps or 1) == 0

    def due_after_epoch(self, epoch: int) -> bool:
        """Are they drawn after this epoch, counted from 1?"""
        return bool(self.options.sample_every_n_epochs) and epoch % (self.options.sample_every_n_epochs or 1) == 0

    def draw(
        self,
        generator: Generator,
        network: TrainableNetwork,
        moment: str,
        *,
        text_is_fixed: bool,
        asked_to_end: Callable[[], bool] = lambda: False,
    ) -> list[Path]:
        """Draw every request and write it as `<name>_<moment>_<number>_<date>_<seed>.png`; returns the files.

        With `--sample_strengths` each is drawn at all of them, and `x<strength>` follows its number.
        `text_is_fixed` where no text encoder is trained: then the prompts are encoded once. A picture that fails is a warning, and the
        next one is tried. Between pictures `asked_to_end` is asked whether the run shall end; then the rest is left.
        """
        was_training, files = network.training, []
        network.eval()
        try:
            with kept_random_state(generator.device), torch.no_grad():
                for number, request in enumerate(self.requests):
                    if asked_to_end():
                        logger.info("previews: %d of %d are left out, since the run ends", len(self.requests) - number, len(self.requests))
                        break
                    files += self._at_strengths(generator, network, number, request, moment, text_is_fixed)
        finally:
            network.train(was_training)
        return files

    def _at_strengths(
        self, generator: Generator, network: TrainableNetwork, number: int, request: Request, moment: str, text_is_fixed: bool
    ) -> list[Path]:
        """One picture as the network trains, or one at each strength that is asked for."""
        place, strengths = f"{moment}_{number:02d}", self.options.sample_strengths
        if not strengths:
            return self._attempt(generator, number, request, place, text_is_fixed)
        files = []
        try:
            for strength in strengths:
                network.set_multiplier(strength)
                files += self._attempt(generator, number, request, f"{place}_x{strength:g}", text_is_fixed)
        finally:
            network.set_multiplier(1.0)
        return files

    def _attempt(self, generator: Generator, number: int, request: Request, place: str, text_is_fixed: bool) -> list[Path]:
        """The file of one picture, or none where anything failed: that is said, and the memory that it took is free again."""
        try:
            return [self._draw_one(generator, number, request, place, text_is_fixed)]
        except Exception as error:  # whatever it was, a picture is not worth a run
            reason = str(error) or type(error).__name__
            logger.debug("preview %d", number, exc_info=True)
        logger.warning("previews: number %d was not drawn, the run goes on: %s", number, reason)
        if generator.device.type == "cuda":
            torch.cuda.empty_cache()
        return []

    def _draw_one(self, generator: Generator, number: int, request: Request, place: str, text_is_fixed: bool) -> Path:
        latents = generator.sample([request], self._text(generator, number, request, text_is_fixed))
        with _vae_on_device(generator):
            (image,) = to_images(generator.decode(latents))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}_{place}_{dated('%Y%m%d%H%M%S')}_{request.seed}.png"
        save_png(image, path, parameters_of(request, ()))
        return path

    def _text(self, generator: Generator, number: int, request: Request, text_is_fixed: bool) -> list[TextStates]:
        if number in self._texts:
            return self._texts[number]
        states = [{name: state.to(generator.device) for name, state in text.items()} for text in generator.encode([request])]
        if text_is_fixed:
            self._texts[number] = states
        return states


def _requests(line: PromptLine, process: NoiseProcess, sampler: str | None, seed: int, index: int) -> Iterator[Request]:
    own = cast(PreviewLine, line.options)
    line.strengths(())
    sampler = own.ss or sampler or process.preview_sampler
    process.sampler(sampler, own.s or STEPS, own.fs or process.preview_shift)  # says what it cannot do now, not in the run
    request = Request(
        prompt=line.prompt,
        negative=own.n or "",
        width=own.w or SIDE,
        height=own.h or SIDE,
        steps=own.s or STEPS,
        scale=SCALE if own.scale is None else own.scale,
        sampler=sampler,
        seed=keyed_seed(seed, "preview", index) % (MAX_SEED + 1),
        shift=own.fs or process.preview_shift,
    )
    return (replace(request, seed=own_seed) for own_seed in own.d or (request.seed,))


@contextmanager
def _vae_on_device(generator: Generator) -> Iterator[None]:
    """The VAE on the generator's device, then back where it was: caching may have sent it away."""
    vae = generator.models.vae
    assert vae is not None
    home = next(vae.parameters()).device
    vae.to(generator.device)
    try:
        yield
    finally:
        vae.to(home)
