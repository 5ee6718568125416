"""Keys of a dataset file that have no effect beside the others: each is said, none is silently ignored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from library.data.config import Dataset
from library.data.options import DataOptions, dataset_keys


@dataclass(frozen=True, kw_only=True)
class Idle:
    """`keys`, where they differ from their defaults, have no effect if `when` holds for the options of their table."""

    keys: tuple[str, ...]
    when: Callable[[Any], Any]
    because: str


OF_DATASETS = (
    Idle(
        keys=("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
        when=lambda options: not options.enable_bucket,
        because="enable_bucket is not on",
    ),
    Idle(
        keys=("min_bucket_reso", "max_bucket_reso"),
        when=lambda options: options.enable_bucket and options.bucket_no_upscale,
        because="with bucket_no_upscale buckets follow the sizes of the images",
    ),
)
OF_SUBSETS = (
    Idle(
        keys=("keep_tokens",),
        when=lambda options: not (options.shuffle_caption or options.caption_tag_dropout_rate or options.token_warmup_step),
        because="nothing shuffles, drops or warms up the parts of captions",
    ),
    Idle(keys=("token_warmup_min",), when=lambda options: not options.token_warmup_step, because="token_warmup_step is not given"),
    Idle(keys=("validation_seed",), when=lambda options: not options.validation_split, because="validation_split is not given"),
)


def idle_keys(datasets: Sequence[Dataset], options: DataOptions) -> Iterator[str]:
    """One sentence for every key that is given in vain, with the place that gave it or the subset it holds for."""
    for dataset in datasets:
        for key, because in _idle(dataset.options, OF_DATASETS):
            yield f"{dataset.where[key]} has no effect: {because}"
        for subset in dataset.subsets:
            for key, because in _idle(subset, OF_SUBSETS):
                yield f"{subset.name}: {key} has no effect: {because}"
    if options.prior_loss_weight != 1 and not any(subset.is_reg for dataset in datasets for subset in dataset.subsets):
        yield "--prior_loss_weight has no effect: there are no regularisation images"


def _idle(options: Any, table: Sequence[Idle]) -> Iterator[tuple[str, str]]:
    keys = dataset_keys()
    for idle in table:
        if idle.when(options):
            yield from ((key, idle.because) for key in idle.keys if getattr(options, key) != keys[key].default)
