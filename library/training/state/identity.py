"""Which run a state is of: base model, data, network, optimizer, precision and so on, as named fields that are compared one by one.

What cannot change the trained file (folders, saving, logging, previews, workers, caches) is no field. Files count by what they hold.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.command_line import OptionSet
from library.core.options import Declared, declared
from library.data.dataset import TrainingData
from library.diffusion.loss import LossOptions
from library.models.architecture import Architecture, architecture_named, architecture_names
from library.models.digests import digest
from library.training.adapters import NetworkOptions
from library.training.length import Length, RunOptions
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.optimizing.schedule import ScheduleOptions
from library.training.precision import PrecisionOptions
from library.training.reproduction.inputs import FILES, IMAGES, NO_INPUTS, TEXT, Input

FIELDS = {
    "family": "the base model's family",
    "processes": "how many processes share the batches: an epoch's batches are dealt out anew, and some may be seen twice or not at all",
    "length": "the number of optimizer steps: the schedule is from now on that of the new length",
    IMAGES: "images with their captions, masks, repeats and buckets: the order of the epoch in progress is another one",
    "datasets": "what the dataset file says: batch sizes, and how images and captions are shown",
    TEXT: "text encoders, tokenizers and the length of captions",
    "seed": "the seed: noise, order and captions are drawn anew from here on",
}
"""The fields that are no options -> what they are, and what it means to go on with another value."""

COUNTED = (NetworkOptions, OptimizerOptions, ScheduleOptions, LossOptions, PrecisionOptions)
"""Option groups of which every option is a field, as are those of the family's models and noise."""

ALSO = frozenset({
    "gradient_accumulation_steps", "ema_decay", "prior_loss_weight", "masked_loss", "text_cache_variants", "vae_tiling",
})  # fmt: skip
"""Options of other groups that are fields."""

HARMLESS = frozenset({
    *NO_INPUTS, "sdpa", "allow_partial", "vae_disable_cache", "qwen_image_vae_2d", "vae_chunk_size", "attn_mode", "split_attn",
    "fused_backward_pass",
})  # fmt: skip
"""Options of the counted groups that are none: they change nothing, or the last bits at most."""

NOT_OF_STATES = frozenset({"dataset_config", "in_json", "sample_prompts"})
"""Inputs that count by what the run makes of them, or not at all."""

RATES = frozenset({"learning_rate", "unet_lr", "text_encoder_lr"})
"""Fields that set the learning rates of groups."""

PLACES = frozenset({"image_dir", "metadata_file", "conditioning_data_dir", "cache_info"})
"""Options of subsets that say where something is."""

DIGEST, SHOWN = 64, 12  # hex digits of a digest, and how many of them a sentence shows


@dataclass(frozen=True)
class Mismatch:
    """A field whose value in a state is not that of this run."""

    field: str
    then: Any
    now: Any

    def sentence(self) -> str:
        """The field and both values, and what it means where that is not plain."""
        means = FIELDS.get(field_of(self.field))
        return f"{self.field}: the state has {_text(self.then)}, this run has {_text(self.now)}{f' ({means})' if means else ''}"


def identity(
    arch: Architecture, options: OptionSet, data: TrainingData, inputs: Mapping[str, Input], *, seed: int, processes: int
) -> dict[str, Any]:
    """The fields of a run by name, as JSON holds them. `inputs` are its files and images (see `reproduction.inputs.inputs_of`)."""
    length = Length.of(options[RunOptions], data.batches_per_epoch(processes))
    files = {name: _told(found) for name, found in inputs.items() if name not in NOT_OF_STATES}
    told = {field_of(name) for name in files}
    given = {entry.name: _value(options, entry) for entry in _counted(arch, options.groups) if entry.name not in told}
    own = {"family": arch.name, "processes": processes, "seed": seed, "length": length.steps, "datasets": _settled(data)}
    return {**own, **files, **given}


def field_of(name: str) -> str:
    """The field that `--allow_resume_mismatch` names: of several images or files of an option, all of them."""
    return name.partition(":")[0]


def mismatches(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Mismatch]:
    """The fields that differ; one that only one of the two knows (of another version) does where it is not at its rest value."""
    names = dict.fromkeys((*now, *then))
    found = [Mismatch(name, then.get(name), now.get(name)) for name in names]
    return [each for each in found if each.then != each.now and (each.then or each.now)]


def field_names() -> list[str]:
    """Every field that a run of any family may have."""
    families = [architecture_named(name) for name in architecture_names()]
    options = {entry.name for arch in families for group in _groups(arch) for entry in declared(group)} - HARMLESS
    return sorted({*FIELDS, *ALSO, *options, *FILES} - NOT_OF_STATES)


# Options


def _groups(arch: Architecture) -> Sequence[type]:
    return (*COUNTED, arch.ModelOptions, arch.NoiseOptions)


def _counted(arch: Architecture, groups: Iterable[type]) -> Iterator[Declared]:
    whole = _groups(arch)
    for group in groups:
        for entry in declared(group):
            if (group in whole and entry.name not in HARMLESS) or entry.name in ALSO:
                yield entry


def _value(options: OptionSet, entry: Declared) -> Any:
    """An option's value as JSON holds it."""
    value = getattr(options[entry.group], entry.name)
    if isinstance(value, tuple):
        return sorted(value) if entry.name.endswith("_args") else list(value)
    return str(value) if isinstance(value, Path) else value


def _told(found: Input) -> str:
    count = "" if found.images is None else f"{found.images} images, "
    return f"{count}{found.digest}"


def _settled(data: TrainingData) -> str:
    """A digest of every option of datasets and subsets that is no place: those are told by what is there."""
    lines = []
    for dataset in data.datasets:
        for group in (dataset.options, *dataset.subsets):
            values = {entry.name: getattr(group, entry.name) for entry in declared(type(group)) if entry.name not in PLACES}
            lines.append(ascii(sorted(values.items())))
    return digest(lines)


def _text(value: Any) -> str:
    """A value for a sentence, its digests shortened."""
    if isinstance(value, str):
        return " ".join(word[:SHOWN] if len(word) == DIGEST else word for word in value.split(" ")) or "nothing"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "nothing"
    return "nothing" if value is None else str(value)
