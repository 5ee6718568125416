"""Block-wise ranks, alphas and learning rates, for families whose denoiser counts its blocks (`Part.blocks`).

The arguments are sd-scripts' (docs/train_network_README, "block-wise learning rates" and "block-wise dims"). A curve runs over the n
blocks of its section, from the first, i = 0, to the last, i = n - 1, in the order of the forward pass:

    cosine            cos(pi/2 * i/(n-1))     1 down to 0
    sine              sin(pi/2 * i/(n-1))     0 up to 1
    linear            i/(n-1)                 0 up to 1
    reverse_linear    1 - i/(n-1)             1 down to 0
    zeros             0

`curve+offset` adds the offset to every value. Blocks outside the three sections have factor 1. Text encoders are unaffected.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from library.core.spelling import unknown
from library.models.naming import Blocks, Naming, Part, Target
from networks.arguments import LR_WEIGHTS, WHERE, NetworkArguments

CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),  # exactly 0 at the end, where cos(pi/2) is not
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
DIMS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


@dataclass(frozen=True, kw_only=True)
class BlockTables:
    """What the arguments say of each block of one denoiser; None where they say nothing."""

    blocks: Blocks
    dims: tuple[int, ...] | None
    alphas: tuple[float, ...] | None
    conv_dims: tuple[int, ...] | None
    conv_alphas: tuple[float, ...] | None
    factors: tuple[float, ...] | None  # on the learning rate; 0 for blocks without adapters

    @classmethod
    def of(cls, arguments: NetworkArguments, part: Part) -> "BlockTables | None":
        """The tables for a part, or None where it has no blocks or the arguments have no tables. Raises `ValueError` as `problems`."""
        if part.blocks is None or not given_names(arguments):
            return None
        return cls(
            blocks=part.blocks,
            dims=arguments.block_dims,
            alphas=arguments.block_alphas,
            conv_dims=arguments.conv_block_dims,
            conv_alphas=arguments.conv_block_alphas,
            factors=lr_factors(arguments, part.blocks),
        )

    def rank(self, target: Target, is_small: bool) -> int | None:
        """The rank in the target's block, 0 for no adapter, or None where no table says."""
        table = self.dims if is_small else self.conv_dims
        return None if table is None else table[self.blocks.number(target.path)]

    def alpha(self, target: Target, is_small: bool) -> float | None:
        """The alpha in the target's block, or None where no table says."""
        table = self.alphas if is_small else self.conv_alphas
        return None if table is None else table[self.blocks.number(target.path)]

    def factor(self, target: Target) -> float | None:
        """The factor on the learning rate in the target's block, or None where no table says."""
        return None if self.factors is None else self.factors[self.blocks.number(target.path)]


def given_names(arguments: NetworkArguments) -> list[str]:
    """The block-wise arguments that are given."""
    return [name for name in (*DIMS, *LR_WEIGHTS) if getattr(arguments, name) is not None]


def problems(arguments: NetworkArguments, naming: Naming) -> Iterable[str]:
    """What is wrong with the block-wise arguments for this family."""
    names = given_names(arguments)
    blocks = next((part.blocks for part in naming.parts if part.is_denoiser), None)
    if names and blocks is None:
        yield (
            f"{WHERE} {', '.join(names)}: the blocks of {naming.title} have no numbers; use network_reg_dims, network_reg_alphas and "
            "network_reg_lrs with patterns such as 'blocks[.][0-7][.].*=8'"
        )
    elif blocks is not None:
        for name in names:
            value = getattr(arguments, name)
            count = blocks.count if name in DIMS else len(_section(blocks, name))
            if isinstance(value, str):
                yield from _curve_problems(name, value)
            elif len(value) != count:
                what = f"{naming.title} has {count} {'' if name in DIMS else name.removesuffix('_lr_weight') + ' '}blocks"
                yield f"{WHERE} {name}: {len(value)} numbers; {what}, and each needs one"


def lr_factors(arguments: NetworkArguments, blocks: Blocks) -> tuple[float, ...] | None:
    """The factor of every block: 1 outside the sections that are given, 0 at or below the threshold; None where no section is given."""
    if all(getattr(arguments, name) is None for name in LR_WEIGHTS):
        return None
    factors = [1.0] * blocks.count
    threshold = arguments.block_lr_zero_threshold or 0.0
    for name in LR_WEIGHTS:
        value, section = getattr(arguments, name), _section(blocks, name)
        if value is not None:
            values = curve(value, len(section)) if isinstance(value, str) else value
            for number, factor in zip(section, values, strict=True):
                factors[number] = factor if factor > threshold else 0.0
    return tuple(factors)


def curve(text: str, count: int) -> list[float]:
    """The values of a curve such as `cosine+.25` over `count` blocks. Raises `ValueError` for a text that is none."""
    name, plus, offset = (word.strip() for word in text.partition("+"))
    if name not in CURVES:
        raise ValueError(f"neither numbers nor a curve: {unknown(name, CURVES, 'curve')}")
    try:
        raised = float(offset) if plus else 0.0
    except ValueError:
        raise ValueError(f"the offset '{offset}' is not a number; write {name}+0.25") from None
    if not 0 <= raised < math.inf:
        raise ValueError(f"the offset {offset} must be a number that is not negative")
    return [CURVES[name](number / max(count - 1, 1)) + raised for number in range(count)]


def _curve_problems(name: str, text: str) -> Iterable[str]:
    try:
        curve(text, 1)
    except ValueError as error:
        yield f"{WHERE} {name} '{text}': {error}"


def _section(blocks: Blocks, name: str) -> range:
    return {"down_lr_weight": blocks.down, "mid_lr_weight": blocks.mid, "up_lr_weight": blocks.up}[name]
