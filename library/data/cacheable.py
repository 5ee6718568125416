"""Which options keep latents or text states from being cached: those whose effect differs from use to use."""

from collections.abc import Sequence

from library.data.captions.composing import varying_options
from library.data.config import Dataset
from library.data.options import DataOptions, SubsetOptions

OF_PIXELS = ("random_crop", "color_aug", "face_crop_aug_range")
WITH_VARIANTS = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")  # may be drawn from fixed forms of a caption
FINITE = ("enable_wildcard",)  # every caption that may be read can be written down


def cache_problems(datasets: Sequence[Dataset], options: DataOptions) -> list[str]:
    """Everything about the datasets that the caches asked for cannot hold, one line each."""
    latents = latent_problems(datasets) if options.caches_latents else []
    return latents + (text_problems(datasets, options.text_cache_variants) if options.caches_text else [])


def latent_problems(datasets: Sequence[Dataset]) -> list[str]:
    """What a cache of latents cannot hold, one line each."""
    return [problem for dataset in datasets for subset in dataset.subsets for problem in _of_latents(subset)]


def text_problems(datasets: Sequence[Dataset], variants: int) -> list[str]:
    """What a cache of text states with so many forms of each caption cannot hold, one line each."""
    return [problem for dataset in datasets for subset in dataset.subsets for problem in _of_text(subset, variants)]


def _of_latents(subset: SubsetOptions) -> list[str]:
    names = [name for name in OF_PIXELS if getattr(subset, name)]
    return [f"{subset.name}: {name} reads the images anew at each use; remove it, or --cache_latents" for name in names]


def _of_text(subset: SubsetOptions, variants: int) -> list[str]:
    problems = []
    for name in varying_options(subset):
        if name in (FINITE if variants == 1 else WITH_VARIANTS):
            continue
        several = ", or draw from fixed forms of each caption with --text_cache_variants 8" if name in WITH_VARIANTS else ""
        problems.append(f"{subset.name}: {name} changes captions from use to use; remove it, or --cache_text_encoder_outputs{several}")
    return problems
