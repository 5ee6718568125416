"""What a saved file says of its making: sd-scripts' `ss_*` entries and modelspec 1.0.1 (https://github.com/Stability-AI/ModelSpec).

All values are strings as `str()` gives them (`None`, `True`), because that is what readers of these files expect.
"""

import base64
import io
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch.optim import Optimizer

from library.core.clock import PINNED, dated, now
from library.core.command_line import OptionSet
from library.core.keyed_random import keyed_seed
from library.core.options import declared, option, pairs
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture
from library.training.adapters import NetworkOptions
from library.training.optimizing.averaging import innermost
from networks.factory import DEFAULT_ALPHA, DEFAULT_DIM

OPTION_ENTRIES = """
        learning_rate unet_lr max_grad_norm lr_warmup_steps gradient_checkpointing gradient_accumulation_steps
        network_module network_dropout mixed_precision full_bf16 fp8_base fp8_base_unet cache_latents lowram prior_loss_weight
        caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate output_name training_comment
        max_validation_steps validate_every_n_epochs validate_every_n_steps loss_type huber_schedule huber_scale huber_c
    """.split()
"""Options written as they are, under `ss_<name>`."""

OTHER_NAMES = {"debiased_estimation_loss": "ss_debiased_estimation"}
"""Options whose entry has another name."""

ABSENT_ENTRIES = {
    "ss_full_fp16": "False", "ss_noise_offset": "None", "ss_noise_offset_random_strength": "False", "ss_adaptive_noise_scale": "None",
    "ss_multires_noise_iterations": "None", "ss_multires_noise_discount": "0.3", "ss_zero_terminal_snr": "False",
    "ss_min_snr_gamma": "None", "ss_ip_noise_gamma": "None", "ss_ip_noise_gamma_random_strength": "False",
    "ss_debiased_estimation": "False",
}  # fmt: skip
"""Entries of features that a family may not have; readers look for them."""

THUMBNAIL_SIDE = 256  # pixels
SPEC_TEXTS = (
    "title", "author", "description", "license", "tags", "trigger_phrase", "usage_hint", "merged_from", "preprocessor",
    "is_negative_embedding",
)  # fmt: skip

KEPT_WITHOUT_METADATA = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class MetadataOptions:
    """Metadata."""

    no_metadata: bool = option(False, help="write only what is needed to load the file, nothing about its making")
    training_comment: str | None = option(None, help="free text kept in the file as ss_training_comment")
    metadata_title: str | None = option(None, help="title; the output name where absent")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="licence")
    metadata_tags: str | None = option(None, help="tags, separated by commas")
    metadata_trigger_phrase: str | None = option(None, help="words that call the trained look up")
    metadata_usage_hint: str | None = option(None, help="how the file is meant to be used")
    metadata_thumbnail: str | None = option(None, help="picture that stands for the file: an image file, or a data: URL")
    metadata_merged_from: str | None = option(None, help="what the file was merged from")
    metadata_preprocessor: str | None = option(None, help="preprocessor that the file's use needs")
    metadata_is_negative_embedding: Literal["true", "false"] | None = option(None, help="is it meant for negative prompts")

    def check(self) -> Iterable[str]:
        """What is wrong: a thumbnail that is no picture."""
        try:
            thumbnail(self.metadata_thumbnail)
        except (OSError, ValueError) as error:
            yield f"--metadata_thumbnail {self.metadata_thumbnail}: {getattr(error, 'strerror', None) or error}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run only once it is set up."""

    arch: Architecture
    process: NoiseProcess
    options: OptionSet
    seed: int
    network: NetworkOptions
    optimizer: Optimizer
    optimizer_arguments: Mapping[str, Any]
    total_steps: int
    epochs: int
    batches_per_epoch: int
    model_entries: Mapping[str, str]  # from Architecture.metadata
    data_entries: Mapping[str, str]  # from the training data
    resolution: tuple[int, int]


def run_metadata(facts: Facts) -> dict[str, str]:
    """Everything that holds for all files of a run; `file_metadata` adds what differs from file to file."""
    values = facts.options.values()
    arguments = ",".join(f"{key}={value}" for key, value in facts.optimizer_arguments.items())
    kind = type(innermost(facts.optimizer))
    entries = {
        **ABSENT_ENTRIES,
        **{f"ss_{name}": values[name] for name in OPTION_ENTRIES if name in values},
        **{OTHER_NAMES.get(entry.name, f"ss_{entry.name}"): values[entry.name] for entry in declared(facts.arch.NoiseOptions)},
        "ss_session_id": _session_id(facts.seed),
        "ss_training_started_at": now(),
        "ss_seed": facts.seed,
        "ss_lr_scheduler": values["lr_scheduler_type"] or values["lr_scheduler"],
        "ss_text_encoder_lr": list(values["text_encoder_lr"]) or None,
        "ss_optimizer": f"{kind.__module__}.{kind.__name__}({arguments})",
        "ss_network_dim": _known(facts.network, facts.network.network_dim, DEFAULT_DIM),
        "ss_scale_weight_norms": str(facts.network.scale_weight_norms),
        "ss_network_alpha": _known(facts.network, facts.network.network_alpha, DEFAULT_ALPHA),
        "ss_max_train_steps": facts.total_steps,
        "ss_num_epochs": facts.epochs,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        **facts.model_entries,
        **facts.data_entries,
    }
    if values["network_args"]:
        entries["ss_network_args"] = json.dumps({given.name: given.value for given in pairs(values["network_args"], "--network_args")})
    entries |= _modelspec(facts, facts.options[MetadataOptions], values["output_name"])
    return {key: str(value) for key, value in entries.items()}


def file_metadata(run: Mapping[str, str], *, steps: int, epoch: int, no_metadata: bool) -> dict[str, str]:
    """The metadata of one file of a run. `no_metadata` keeps what loading needs, and modelspec."""
    entries = {**run, "ss_training_finished_at": str(now()), "ss_steps": str(steps), "ss_epoch": str(epoch)}
    entries["modelspec.date"] = dated("%Y-%m-%dT%H:%M:%S")
    if no_metadata:
        return {key: value for key, value in entries.items() if key in KEPT_WITHOUT_METADATA or key.startswith("modelspec.")}
    return entries


def _session_id(seed: int) -> int:
    """A number for the run, up to 2^32: another one each time, unless the time is pinned."""
    return keyed_seed(seed, "session", int(now()) if PINNED in os.environ else time.time_ns()) % (2**32 + 1)


def _known(network: NetworkOptions, given: float | None, default: float) -> float | None:
    """What the network was made with; None where a file of `--dim_from_weights` decided."""
    return default if given is None and not network.dim_from_weights else given


def thumbnail(given: str | None) -> str | None:
    """A picture file as a data: URL of a small JPEG; a data: URL as it is. Raises `OSError` for a file that is no picture."""
    if given is None or given.startswith("data:"):
        return given
    with Image.open(Path(given)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _modelspec(facts: Facts, options: MetadataOptions, output_name: str | None) -> dict[str, str]:
    values = facts.options.values()
    given = {name: values[f"metadata_{name}"] for name in SPEC_TEXTS}
    given |= {"title": given["title"] or output_name or "last", "thumbnail": thumbnail(options.metadata_thumbnail)}
    if values.get("min_timestep") is not None or values.get("max_timestep") is not None:
        given["timestep_range"] = ",".join(map(str, facts.options[facts.arch.NoiseOptions].bounds))
    width, height = facts.resolution
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.arch.modelspec_architecture}/lora",
        "modelspec.implementation": facts.arch.modelspec_implementation,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": facts.process.prediction_type,
        **{f"modelspec.{key}": value for key, value in given.items() if value is not None},
    }
