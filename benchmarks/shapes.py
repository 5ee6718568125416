"""What is measured: the layers of SDXL and Anima with their numbers of tokens, the precisions, the settings, and grids of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.peers import LYCORIS, PACKAGES, Setting


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer and the size of its input: tokens, or for a convolution 3x3 a square of `side` positions."""

    out: int
    inner: int
    tokens: int = 1024
    side: int = 0
    remark: str = ""

    @property
    def title(self) -> str:
        """As tables call it; weights are (out x in)."""
        size = f"conv 3x3 {self.inner}, {self.side} x {self.side}" if self.side else f"{self.out} x {self.inner}, {self.tokens} tokens"
        return f"{size} ({self.remark})" if self.remark else size

    @property
    def positions(self) -> int:
        """Tokens, or positions of the convolution's output."""
        return self.side**2 or self.tokens

    @property
    def is_large(self) -> bool:
        """Whether one step takes so long on a CPU that not everything is tried on it."""
        return self.out * self.inner * self.positions * (9 if self.side else 1) >= 1 << 33

    def layer(self, **factory: torch.dtype | str) -> nn.Module:
        """A layer of this shape."""
        if self.side:
            return nn.Conv2d(self.inner, self.out, 3, padding=1, **factory)  # pyright: ignore[reportArgumentType]
        return nn.Linear(self.inner, self.out, **factory)  # pyright: ignore[reportArgumentType]

    @property
    def input(self) -> tuple[int, ...]:
        """The shape of its input, with a batch of one."""
        return (1, self.inner, self.side, self.side) if self.side else (1, self.tokens, self.inner)

    def cut(self, positions: int) -> "Shape":
        """The same layer with at most so many positions."""
        if self.side:
            return replace(self, side=min(self.side, round(positions**0.5)))
        return replace(self, tokens=min(self.tokens, positions))


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes of the frozen layer with its input and of the factors, and whether forward runs under autocast."""

    title: str
    base: torch.dtype
    factors: torch.dtype
    is_autocast: bool = False


PRECISIONS = {
    precision.title: precision
    for precision in (
        Precision(title="float32", base=torch.float32, factors=torch.float32),
        Precision(title="bfloat16", base=torch.bfloat16, factors=torch.bfloat16),
        Precision(title="autocast", base=torch.bfloat16, factors=torch.float32, is_autocast=True),
    )
}
"""`autocast` is mixed precision as trainers use it: a bfloat16 base and float32 factors."""

SHAPES = (
    Shape(out=64, inner=64, tokens=16, remark="host cost"),
    Shape(out=640, inner=640, tokens=4096, remark="SDXL"),
    Shape(out=1280, inner=1280, remark="SDXL"),
    Shape(out=10240, inner=1280, remark="SDXL"),
    Shape(out=1280, inner=5120, remark="SDXL"),
    Shape(out=1280, inner=2048, tokens=77, remark="SDXL"),
    Shape(out=320, inner=320, side=64, remark="SDXL"),
    Shape(out=1280, inner=1280, side=16, remark="SDXL"),
    Shape(out=2048, inner=2048, remark="Anima"),
    Shape(out=8192, inner=2048, remark="Anima"),
    Shape(out=2048, inner=8192, remark="Anima"),
)
HOST_COST = SHAPES[0]

LORA_16 = Setting(algorithm="lora", rank=16)
LOHA_4, LOHA_8, LOHA_32 = (Setting(algorithm="loha", rank=rank) for rank in (4, 8, 32))
LOKR_8, LOKR_FULL, LOKR_EVEN = (
    Setting(algorithm="lokr", factor=8),
    Setting(algorithm="lokr", factor=8, is_full=True),
    Setting(algorithm="lokr", factor=-1),
)
CORE = (LORA_16, LOHA_8, LOKR_8)
RANKS, FACTORS = (4, 8, 16, 32), (-1, 4, 8, 16)
ALL = (
    *(Setting(algorithm=algorithm, rank=rank) for algorithm in ("lora", "loha") for rank in RANKS),
    *(Setting(algorithm="lokr", factor=factor, rank=rank) for factor in FACTORS for rank in RANKS),
    *(Setting(algorithm="lokr", factor=factor, is_full=True) for factor in FACTORS),
)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Shapes and settings, and the seconds of timing for each shape in each precision.

    `beside`: settings of which only ours and sd-scripts' way are run. Where `is_thinned`, large layers see `CORE` without LyCORIS'
    rebuild mode, which costs what sd-scripts' way does, and LoHa r32 beside.
    """

    shapes: tuple[Shape, ...]
    settings: tuple[Setting, ...]
    beside: tuple[Setting, ...] = ()
    small: tuple[Setting, ...]  # those of which small deltas are followed through half precision
    seconds: float
    positions: int = 4096  # at most, of every shape
    half_positions: int = 64  # the same in half precision on a CPU that has no instructions for it
    is_thinned: bool = True

    def cut(self, shape: Shape, precision: Precision, device: str) -> Shape:
        """A shape at the size at which it is measured."""
        return shape if shape == HOST_COST else shape.cut(self.positions if computes(precision.base, device) else self.half_positions)

    def lineup(self, shape: Shape, ways: tuple[str, ...]) -> Iterator[tuple[Setting, str]]:
        """Who takes part on a shape."""
        is_thin = self.is_thinned and shape.is_large
        settings, beside = (CORE, (LOHA_32,)) if is_thin else (self.settings, self.beside)
        for setting in (*settings, *beside):
            left_out = () if setting in settings and not is_thin else (LYCORIS,) if setting in settings else PACKAGES
            yield from ((setting, way) for way in ways if way not in left_out)


GRIDS = {
    "quick": Grid(
        shapes=(HOST_COST, SHAPES[1], SHAPES[6]),
        settings=CORE,
        beside=(LOHA_32,),
        small=(),
        seconds=2,
        positions=1024,
        half_positions=16,
    ),
    "default": Grid(shapes=SHAPES, settings=(*CORE, LOHA_32, LOKR_FULL), beside=(LOHA_4, LOKR_EVEN), small=(*CORE, LOHA_32), seconds=20),
    "full": Grid(shapes=SHAPES, settings=ALL, small=ALL, seconds=120, is_thinned=False),
}


def computes(dtype: torch.dtype, device: str) -> bool:
    """Whether the device has instructions for products in this dtype."""
    if device != "cpu" or dtype == torch.float32:
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
