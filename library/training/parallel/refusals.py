"""What no engine can do that shares out the base's weights: everything for which one rank computes while the others do not."""

from collections.abc import Iterator

from library.core.command_line import OptionSet
from library.data.dataset import TrainingData
from library.training.compiling import preserves
from library.training.previews import PreviewOptions


def needs_all_ranks(options: OptionSet, engine: str) -> Iterator[str]:
    """Previews: one rank draws them."""
    if options[PreviewOptions].sample_prompts is not None:
        yield f"--sample_prompts: not with {engine}, where every pass through the base needs all ranks; leave it out, or use FSDP"


def preserved_samples(data: TrainingData) -> Iterator[str]:
    """Preserved samples: their pass through the base is made on the ranks that have some, and would wait for the others."""
    if preserves(data):
        yield "diff_output_preservation: not with FSDP or ZeRO stage 3, where every pass needs all ranks; leave one out"
