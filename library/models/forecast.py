"""What can be said of a model before it is loaded: how long its captions may be, what its caches take.

A family's answer stands in its `forecast.py`, as a function `forecast(options) -> Forecast`; a family without one is not forecast.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from library.core.log import get_logger
from library.data.inspection.costs import ModelFacts
from library.models.architecture import Architecture, Tokens

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A family's answer for some `ModelOptions`, of which only those about text are read."""

    caption_limit: int  # tokens of a caption that the text encoders read
    text_bytes: Callable[[int], int]  # of the cached states of one caption of so many tokens, for a model of full size
    tokens: Callable[[int], Tokens]  # of so many captions of the longest kind, as `Architecture.tokenize` gives them
    tokenizers: Callable[[], Sequence[Any]]  # for `Architecture.overlong`; `ValueError` where there are none at hand


def model_facts(arch: Architecture, options: Any, *, has_model: bool = True) -> ModelFacts:
    """What an inspection wants to know of a model; its tokenizer counts captions where `has_model` says that its files are named."""
    forecast = forecast_of(arch, options)
    return ModelFacts(
        title=arch.title,
        latent_channels=arch.latent_channels,
        pixels_per_latent=arch.pixels_per_latent,
        caption_limit=None if forecast is None else forecast.caption_limit,
        over=_counter(arch, options, forecast) if forecast is not None and has_model else None,
        text_bytes=None if forecast is None else forecast.text_bytes,
    )


def forecast_of(arch: Architecture, options: Any) -> Forecast | None:
    """The family's answer, or None where it has none."""
    package = type(arch).__module__.rpartition(".")[0]
    if not package or importlib.util.find_spec(f"{package}.forecast") is None:
        return None
    return importlib.import_module(f"{package}.forecast").forecast(options)


def _counter(arch: Architecture, options: Any, forecast: Forecast) -> Callable[[Sequence[str]], list[int]] | None:
    try:
        tokenizers = forecast.tokenizers()
    except ValueError as error:
        logger.warning("the lengths of captions are estimated: %s", error)
        return None
    return lambda captions: arch.overlong(tokenizers, captions, options)
