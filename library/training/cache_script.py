"""Filling the caches on disk without training: the scripts behind `tools.cache_latents` and `tools.cache_text_encoder_outputs`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from accelerate import Accelerator

from library.core.command_line import OptionSet, parse_command_line
from library.core.log import get_logger
from library.core.options import OptionError
from library.data.dataset import TrainingData
from library.data.options import DataOptions
from library.models.architecture import Architecture, architecture_named, architecture_names
from library.models.presets import presets
from library.models.vae_pieces import set_pieces
from library.training.adapters import NetworkOptions, merge_base_weights
from library.training.caching import cache_latents, cache_text
from library.training.memory.options import MemoryOptions
from library.training.precision import PrecisionOptions
from library.training.prepare import load_data, load_models, make_accelerator, resolved_seed
from library.training.retired import refused_options
from library.training.run import RunOptions, option_groups
from library.training.tracking.options import LogOptions

logger = get_logger(__name__)
What = Literal["latents", "text"]
TOOLS = {"latents": ("cache_latents", "images"), "text": ("cache_text_encoder_outputs", "captions")}
NOT_NEEDED = ("--network_module", "networks.lora", "--output_dir", ".")
"""What the training script requires, and no cache depends on."""


def main(what: What, argv: Sequence[str]) -> None:
    """Fill one cache with the options of the training script. Raises `ValueError` for everything the user can mend."""
    family, rest = _family(argv)
    arch = architecture_named(family)
    tool, things = TOOLS[what]
    given = parse_command_line(
        option_groups(arch),
        [*NOT_NEEDED, *rest],
        prog=f"python -m tools.{tool} --family {family}",
        about=f"Encode the {things} of a dataset for {arch.title}; takes the options of the training script.",
        refuse=refused_options(arch),
        presets=presets(arch),
    )
    fill(what, arch, options_for(what, given))


def options_for(what: What, given: OptionSet) -> OptionSet:
    """A training run's options, as they are for one that keeps just this cache on disk.

    Raises `OptionError` where the cache depends on the seed, and none is given.
    """
    data, latents = given[DataOptions], what == "latents"
    if not latents and data.text_cache_variants > 1 and given[RunOptions].seed is None:
        raise OptionError(["--text_cache_variants: the forms of captions are drawn by the seed; give the --seed of the training run"])
    changed = {
        DataOptions: replace(
            data,
            cache_latents=False,
            cache_latents_to_disk=latents,
            cache_text_encoder_outputs=False,
            cache_text_encoder_outputs_to_disk=not latents,
            text_cache_variants=1 if latents else data.text_cache_variants,
        ),
        NetworkOptions: replace(given[NetworkOptions], network_train_unet_only=True, network_train_text_encoder_only=False),
    }
    return OptionSet({group: changed.get(group, given[group]) for group in given.groups}, given.given)


def fill(what: What, arch: Architecture, options: OptionSet) -> None:
    """Read the data, load the models that encode, and encode what is not in the cache."""
    accelerator = make_accelerator(options)
    options[LogOptions].set_up(is_main=accelerator.is_main_process)
    data = load_data(arch, options, resolved_seed(options[RunOptions].seed))
    if what == "latents":
        dtype = options[PrecisionOptions].weight_dtype
        vae = arch.load_vae(options[arch.ModelOptions], device=accelerator.device, dtype=dtype)
        memory = options[MemoryOptions]
        set_pieces(vae, one_by_one=memory.vae_slicing, in_tiles=memory.vae_tiling)
        cache_latents(arch, vae, data, options, accelerator)
    else:
        _fill_text(arch, data, options, accelerator)
    accelerator.end_training()


def _fill_text(arch: Architecture, data: TrainingData, options: OptionSet, accelerator: Accelerator) -> None:
    network = options[NetworkOptions]
    if network.base_weights:
        models = load_models(arch, options, accelerator.device)
        merge_base_weights(models, network)
        encoders, tokenizers = models.text_encoders, models.tokenizers
    else:
        dtype = options[PrecisionOptions].weight_dtype
        encoders, tokenizers = arch.load_text(options[arch.ModelOptions], device=accelerator.device, dtype=dtype)
    cache_text(arch, encoders, tokenizers, data, options, accelerator)


def _family(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of `--family`, and the other arguments."""
    rest = list(argv)
    for index, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name == "--family" and (equals or index + 1 < len(rest)):
            return (value, rest[:index] + rest[index + 1 :]) if equals else (rest[index + 1], rest[:index] + rest[index + 2 :])
    raise OptionError([f"--family is required: the model family, one of {', '.join(architecture_names())}"])
