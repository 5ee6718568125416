"""The options of a training run that have no effect with the rest of its command."""

from collections.abc import Iterator
from typing import Any

from library.core import rules
from library.core.command_line import OptionSet
from library.core.rules import Rule


def _no_latent_cache(values: dict[str, Any]) -> bool:
    return not (values["cache_latents"] or values["cache_latents_to_disk"])


def _no_text_cache(values: dict[str, Any]) -> bool:
    return not (values["cache_text_encoder_outputs"] or values["cache_text_encoder_outputs_to_disk"])


RULES = (
    Rule(option="max_train_steps", when=lambda v: v["max_train_epochs"], because="--max_train_epochs sets the length of the run"),
    Rule(option="text_encoder_lr", when=lambda v: v["network_train_unet_only"], because="--network_train_unet_only trains no text encoder"),
    Rule(
        option="unet_lr", when=lambda v: v["network_train_text_encoder_only"], because="--network_train_text_encoder_only leaves it alone"
    ),
    Rule(option="network_dim", when=lambda v: v["dim_from_weights"], because="--dim_from_weights takes ranks from the file"),
    Rule(option="network_alpha", when=lambda v: v["dim_from_weights"], because="--dim_from_weights takes alphas from the file"),
    Rule(option="vae_batch_size", when=_no_latent_cache, because="it is for --cache_latents"),
    Rule(option="text_encoder_batch_size", when=_no_text_cache, because="it is for --cache_text_encoder_outputs"),
    Rule(option="text_cache_variants", when=_no_text_cache, because="without a text cache every use draws a caption of its own"),
    Rule(
        option="skip_cache_check",
        when=lambda v: not (v["cache_latents_to_disk"] or v["cache_text_encoder_outputs_to_disk"]),
        because="no cache is kept on disk",
    ),
    Rule(option="persistent_data_loader_workers", when=lambda v: v["max_data_loader_n_workers"] == 0, because="there are no workers"),
    Rule(option="training_comment", when=lambda v: v["no_metadata"], because="--no_metadata leaves it out"),
)


def without_effect(options: OptionSet) -> Iterator[str]:
    """One sentence for every option that was given in vain, by the rules above and those that option groups bring."""
    own = (rule for group in options.groups for rule in getattr(group, "RULES", ()))
    return rules.without_effect(options, (*RULES, *own))
