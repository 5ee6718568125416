"""From prompt lines and options to the pictures to draw."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

from library.core.log import get_logger, warn_once
from library.core.options import OptionError
from library.inference.generate import Request, size_problems
from library.inference.minimal.options import AdapterOptions, DrawingOptions
from library.inference.prompts import MAX_SEED, DrawingLine, PromptLine
from library.models.architecture import Architecture

logger = get_logger(__name__)
SAMPLER = "euler"


def requests_of(
    lines: Iterable[PromptLine], drawing: DrawingOptions, negative: str, adapters: AdapterOptions, arch: Architecture
) -> list[Request]:
    """Every picture to draw, in order; `negative` is the prompt of lines without one.

    Raises `ValueError` for strengths that cannot be set, and `OptionError` for all sizes that the family cannot draw.
    """
    requests = [request for line in lines for request in _of_line(line, drawing, negative, adapters)]
    problems = dict.fromkeys(problem for request in requests for problem in size_problems(request, arch))
    if problems:
        raise OptionError(problems)
    for request in requests:
        if request.negative and not request.guides:
            warn_once(logger, f"the negative prompt '{request.negative}' has no effect at guidance scale 1")
    return requests


def _of_line(line: PromptLine, drawing: DrawingOptions, negative: str, adapters: AdapterOptions) -> Iterator[Request]:
    own = cast(DrawingLine, line.options)
    strengths = line.strengths(adapters.strengths)
    if strengths != adapters.strengths and not adapters.no_merge:
        raise ValueError(f"--am in '{line.prompt}': merged adapters have a fixed strength; give --no_merge")
    height, width = drawing.image_size
    request = Request(
        prompt=line.prompt,
        negative=negative if own.n is None else own.n,
        width=own.w or width,
        height=own.h or height,
        steps=own.s or drawing.infer_steps,
        scale=drawing.guidance_scale if own.scale is None else own.scale,
        sampler=SAMPLER,
        seed=0,
        strengths=strengths,
        shift=own.fs or drawing.flow_shift,
    )
    seeds = own.d or (drawing.seed if drawing.seed is not None else random.randint(0, MAX_SEED),)
    return (replace(request, seed=seed) for seed in seeds)
