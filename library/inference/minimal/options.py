"""The options of the minimal generation scripts, but for those that name the family's files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from library.core.devices import best_device
from library.core.options import declared, option
from library.core.rules import Rule
from library.inference.prompts import infinite, seed_problems

OutputType = Literal["images", "latent", "latent_images"]


@dataclass(kw_only=True, frozen=True)
class PromptOptions:
    """Prompts."""

    prompt: str | None = option(None, help="prompt, taken as it is written, with line options behind it")
    negative_prompt: str = option("", help="what the picture shall lead away from")
    from_file: str | None = option(None, help="text file with one prompt a line, each with line options")
    interactive: bool = option(False, help="ask for prompts until an empty line; the models stay loaded")
    latent_path: tuple[str, ...] = option((), help="files of latents to decode; nothing is drawn, and only the VAE is loaded")

    def check(self) -> Iterable[str]:
        """What is wrong: no source of pictures, or several."""
        given = [
            f"--{name}" for name in ("prompt", "from_file", "interactive", "latent_path") if getattr(self, name) not in (None, False, ())
        ]
        if len(given) != 1:
            instead = f", not {' and '.join(given)}" if given else ""
            yield f"give one of --prompt, --from_file, --interactive and --latent_path{instead}"


@dataclass(kw_only=True, frozen=True)
class DrawingOptions:
    """Pictures."""

    image_size: tuple[int, int] = option((1024, 1024), help="height and width in pixels")
    infer_steps: int = option(50, help="number of steps")
    guidance_scale: float = option(3.5, help="guidance scale; 1 turns guidance off")
    flow_shift: float = option(5.0, help="shift of the steps towards the noise; 1 shifts nothing")
    seed: int | None = option(None, help="seed of every picture that has none of its own; drawn where absent")
    batch_size: int = option(1, help="pictures of one size and strength drawn at once; which are beside it changes no picture")
    split_guidance: bool = option(
        False, help="run the prompt and the negative prompt one after the other: less memory, more time, the same picture but for rounding"
    )

    def check(self) -> Iterable[str]:
        """What is wrong: counts and sizes below one, a seed, shift or scale out of bounds."""
        yield from infinite(self, ("guidance_scale", "flow_shift"))
        yield from _below_one(self, ("infer_steps", "batch_size"))
        if min(self.image_size) < 1:
            yield f"--image_size {self.image_size[0]} {self.image_size[1]}: both must be at least 1"
        if not self.flow_shift > 0:
            yield f"--flow_shift {self.flow_shift:g}: must be more than 0"
        if self.seed is not None:
            yield from seed_problems("--seed", self.seed)


@dataclass(kw_only=True, frozen=True)
class OutputOptions:
    """Files."""

    save_path: str = option(help="folder for the pictures; made if missing")
    output_type: OutputType = option("images", help="what is written: pictures, their latents, or both")
    no_metadata: bool = option(False, help="write no prompts and settings into the files")

    @property
    def writes_images(self) -> bool:
        """Are there pictures among the files?"""
        return self.output_type != "latent"

    @property
    def writes_latents(self) -> bool:
        """Are there latents among the files?"""
        return self.output_type != "images"


@dataclass(kw_only=True, frozen=True)
class AdapterOptions:
    """Adapters."""

    lora_weight: tuple[str, ...] = option((), help="adapter files: LoRA, LoHa, LoKr and mixed ones of any tool, found out by themselves")
    lora_multiplier: tuple[float, ...] = option((), help="strength of each adapter file, 1.0 where absent")
    include_patterns: tuple[str, ...] = option(
        (), help="regexes of layers that adapter files may change, by their whole names; by default all"
    )
    exclude_patterns: tuple[str, ...] = option((), help="regexes of layers that adapter files leave alone, by their whole names")
    no_merge: bool = option(
        False, help="apply the adapters beside the weights in every step instead of merging them: slower, exact on fp8 weights, --am works"
    )
    allow_partial: bool = option(False, help="use what fits of an adapter file and say what does not, instead of refusing the file")
    lycoris: bool = option(False, help="accepted for sd-scripts' commands: files of LyCORIS are read like all others")

    def check(self) -> Iterable[str]:
        """What is wrong: more strengths than files, infinite ones."""
        yield from infinite(self, ("lora_multiplier",))
        if len(self.lora_multiplier) > len(self.lora_weight):
            yield f"--lora_multiplier has {len(self.lora_multiplier)} values for {len(self.lora_weight)} --lora_weight"

    @property
    def strengths(self) -> tuple[float, ...]:
        """One strength a file."""
        return self.lora_multiplier + (1.0,) * (len(self.lora_weight) - len(self.lora_multiplier))


@dataclass(kw_only=True, frozen=True)
class MachineOptions:
    """Device and memory."""

    device: str | None = option(None, help="cpu, cuda, cuda:1, mps; the best there is where absent")
    text_encoder_cpu: bool = option(False, help="run the text encoder on the CPU")
    fp8: bool = option(
        False, help="keep the denoiser's matrix weights as float8_e4m3fn: half the memory of bf16, rounded to 3 bits of mantissa"
    )
    compile: bool = option(False, help="compile the denoiser's blocks: slower at first, for each size of picture, then faster")


GROUPS = (PromptOptions, DrawingOptions, OutputOptions, AdapterOptions, MachineOptions)
"""The groups in the order of the help, behind the family's files."""

REFUSED = {
    "fp8_scaled": "fp8 weights are kept without scales here; use --fp8, or --no_merge --fp8 for adapters that stay exact beside them",
}
"""Options of sd-scripts that are refused, whatever the family -> the reason."""


def device_named(name: str | None) -> torch.device:
    """The device of `--device`, tried; the best there is for None. Raises `ValueError` for one that is not there."""
    if name is None:
        return best_device()
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason}); there is {best_device()}") from error
    return torch.device(name)


# Options without effect


def rules(files: Any) -> Iterator[Rule]:
    """The options of this script that have no effect with the rest; `files` is the family's group of files."""
    yield from getattr(files, "RULES", ())
    drawing = [entry.name for group in (PromptOptions, DrawingOptions, AdapterOptions, MachineOptions) for entry in declared(group)]
    for name in (*files.for_drawing, *drawing):
        if name not in ("latent_path", "device", "lycoris"):
            yield Rule(option=name, when=lambda v: v["latent_path"], because="--latent_path only decodes")
    for name in files.for_decoding:
        yield Rule(option=name, when=lambda v: v["output_type"] == "latent" and not v["latent_path"], because="nothing is decoded")
    for name in ("lora_multiplier", "include_patterns", "exclude_patterns", "no_merge", "allow_partial"):
        yield Rule(option=name, when=lambda v: not v["lora_weight"] and not v["latent_path"], because="there is no --lora_weight")
    yield Rule(option="lycoris", when=lambda v: v["lycoris"], because="what an adapter file holds is found out by itself")
    yield Rule(
        option="text_encoder_cpu",
        when=lambda v: v["text_encoder_cpu"] and not v["latent_path"] and device_named(v["device"]).type == "cpu",
        because="everything runs on the CPU",
    )


def _below_one(group: Any, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if getattr(group, name) < 1:
            yield f"--{name} {getattr(group, name)}: must be at least 1"
