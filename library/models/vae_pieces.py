"""A VAE that takes its input in pieces, whatever its family: the pictures of a batch one by one, large ones in overlapping tiles.

Slices change nothing. Tiles do: a VAE's norms and attention look at the whole picture, and in a tile they see only that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

TILE = 64  # side of a tile in latent positions: 512 pixels
OVERLAP = 16  # what neighbouring tiles share, and are blended over
ATTRIBUTE = "pieces"


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How a VAE's input is cut. `tile` is the side of a tile in latent positions, None for whole pictures."""

    one_by_one: bool = False
    tile: int | None = None
    overlap: int = 0

    def __post_init__(self) -> None:
        assert self.tile is None or 0 <= self.overlap < self.tile


def set_pieces(vae: nn.Module, *, one_by_one: bool, in_tiles: bool) -> None:
    """Let a VAE take its input in pieces from now on."""
    setattr(vae, ATTRIBUTE, Pieces(one_by_one=one_by_one, tile=TILE if in_tiles else None, overlap=OVERLAP))


def encode_in_pieces(vae: nn.Module, pixels: Tensor, encode: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """What `encode` gives for pixels (batch, channels, height, width), one position for a square of `side` pixels; as `set_pieces` says."""
    pieces = getattr(vae, ATTRIBUTE, Pieces())
    tile, overlap = None if pieces.tile is None else side * pieces.tile, side * pieces.overlap
    return _one_by_one(pieces, pixels, partial(_in_tiles, compute=encode, tile=tile, overlap=overlap, up=1, down=side))


def decode_in_pieces(vae: nn.Module, latents: Tensor, decode: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """What `decode` gives for latents (batch, channels, height, width), squares of `side` pixels for a position; as `set_pieces` says."""
    pieces = getattr(vae, ATTRIBUTE, Pieces())
    return _one_by_one(pieces, latents, partial(_in_tiles, compute=decode, tile=pieces.tile, overlap=pieces.overlap, up=side, down=1))


def _one_by_one(pieces: Pieces, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([compute(one) for one in x.split(1)]) if pieces.one_by_one and len(x) > 1 else compute(x)


def _in_tiles(x: Tensor, *, compute: Callable[[Tensor], Tensor], tile: int | None, overlap: int, up: int, down: int) -> Tensor:
    """The tiles' outputs, each weighed less towards its edges. An output's sides are `up / down` times those of its input."""
    height, width = x.shape[-2:]
    if tile is None or max(height, width) <= tile:
        return compute(x)
    found: Tensor | None = None
    weights = torch.zeros(height * up // down, width * up // down, device=x.device)
    for rows, columns in product(_spans(height, tile, overlap, down), _spans(width, tile, overlap, down)):
        part = compute(x[..., slice(*rows), slice(*columns)])
        place = (..., *(slice(start * up // down, end * up // down) for start, end in (rows, columns)))
        vertical, horizontal = (_ramp(size, overlap * up // down).to(part.device) for size in part.shape[-2:])
        weight = vertical[:, None] * horizontal
        if found is None:
            found = part.new_zeros((*part.shape[:2], *weights.shape), dtype=torch.float32)
        found[place] += part * weight
        weights[place] += weight
    assert found is not None, "a picture has at least one tile"
    return (found / weights).to(x.dtype)


def _spans(length: int, tile: int, overlap: int, step: int) -> list[tuple[int, int]]:
    """Starts and ends of the fewest tiles that cover a length, spread evenly, at multiples of `step`."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [(length - tile) * n // (count - 1) // step * step for n in range(count)]
    return [(start, start + tile) for start in starts]


def _ramp(size: int, overlap: int) -> Tensor:
    """Weights (size,) that rise from an edge over `overlap` positions, and are 1 between."""
    distance = torch.arange(1, size + 1, dtype=torch.float32)
    return (torch.minimum(distance, distance.flip(0)) / (overlap + 1)).clamp(max=1)
