"""What a saved file says of its making: sd-scripts' `ss_*` entries and modelspec 1.0.1 (https://github.com/Stability-AI/ModelSpec).

All values are strings as `str()` gives them (`None`, `True`), because that is what readers of these files expect.
"""

import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from library.core.command_line import OptionSet
from library.core.options import declared, option, pairs
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture
from library.training.adapters import NetworkOptions
from networks.factory import DEFAULT_ALPHA, DEFAULT_DIM

OPTION_ENTRIES = """
        learning_rate unet_lr max_grad_norm lr_warmup_steps lr_scheduler gradient_checkpointing gradient_accumulation_steps
        network_module network_dropout mixed_precision fp8_base cache_latents loss_type prior_loss_weight
        caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate output_name training_comment
        max_validation_steps validate_every_n_epochs validate_every_n_steps
    """.split()
"""Options written as they are, under `ss_<name>`."""

ABSENT_ENTRIES = {
    "ss_lowram": "False", "ss_full_fp16": "False", "ss_fp8_base_unet": "False", "ss_noise_offset": "None",
    "ss_noise_offset_random_strength": "False", "ss_adaptive_noise_scale": "None", "ss_multires_noise_iterations": "None",
    "ss_multires_noise_discount": "0.3", "ss_zero_terminal_snr": "False", "ss_min_snr_gamma": "None", "ss_ip_noise_gamma": "None",
    "ss_ip_noise_gamma_random_strength": "False", "ss_debiased_estimation": "False",
    "ss_huber_schedule": "None", "ss_huber_scale": "None", "ss_huber_c": "None",
}  # fmt: skip
"""Entries of features that no run of this version uses; readers look for them."""

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
    kind = type(getattr(facts.optimizer, "optimizer", facts.optimizer))  # accelerate wraps the optimizer
    entries = {
        **ABSENT_ENTRIES,
        **{f"ss_{name}": values[name] for name in OPTION_ENTRIES},
        **{f"ss_{entry.name}": values[entry.name] for entry in declared(facts.arch.NoiseOptions)},
        "ss_session_id": random.Random(time.time_ns()).randint(0, 2**32),
        "ss_training_started_at": time.time(),
        "ss_seed": facts.seed,
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
    entries = {**run, "ss_training_finished_at": str(time.time()), "ss_steps": str(steps), "ss_epoch": str(epoch)}
    entries["modelspec.date"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    if no_metadata:
        return {key: value for key, value in entries.items() if key in KEPT_WITHOUT_METADATA or key.startswith("modelspec.")}
    return entries


def _known(network: NetworkOptions, given: float | None, default: float) -> float | None:
    """What the network was made with; None where a file of `--dim_from_weights` decided."""
    return default if given is None and not network.dim_from_weights else given


def _modelspec(facts: Facts, options: MetadataOptions, output_name: str | None) -> dict[str, str]:
    given = {
        "author": options.metadata_author,
        "description": options.metadata_description,
        "license": options.metadata_license,
        "tags": options.metadata_tags,
        "trigger_phrase": options.metadata_trigger_phrase,
    }
    width, height = facts.resolution
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.arch.modelspec_architecture}/lora",
        "modelspec.implementation": facts.arch.modelspec_implementation,
        "modelspec.title": options.metadata_title or output_name or "last",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": facts.process.prediction_type,
        **{f"modelspec.{key}": value for key, value in given.items() if value is not None},
    }
