"""A VAE in pieces: slices give the same numbers, tiles give them wherever the function looks at little."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from library.models import vae_pieces
from library.models.architecture import Architecture, architecture_named, architecture_names
from library.models.vae_pieces import Pieces, decode_in_pieces, encode_in_pieces, set_pieces

SIDE = 8
CPU = torch.device("cpu")


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def shrunk(pixels: Tensor) -> Tensor:
    return functional.avg_pool2d(pixels, SIDE)


def grown(latents: Tensor) -> Tensor:
    return functional.interpolate(latents, scale_factor=SIDE)


def vae_with(**pieces: Any) -> nn.Module:
    vae = nn.Identity()
    setattr(vae, vae_pieces.ATTRIBUTE, Pieces(**pieces))
    return vae


@pytest.mark.parametrize("size", [(40, 40), (64, 24), (24, 136), (88, 72)])
def test_tiles_of_a_function_of_single_places_give_the_whole(size: tuple[int, int]) -> None:
    vae, pixels, latents = vae_with(tile=4, overlap=2), rand(2, 3, *size), rand(2, 4, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(encode_in_pieces(vae, pixels, shrunk, SIDE), shrunk(pixels))
    torch.testing.assert_close(decode_in_pieces(vae, latents, grown, SIDE), grown(latents))


def test_no_tile_is_larger_than_asked_and_neighbours_overlap() -> None:
    seen: list[tuple[int, ...]] = []

    def noted(pixels: Tensor) -> Tensor:
        seen.append(tuple(pixels.shape[-2:]))
        return shrunk(pixels)

    encode_in_pieces(vae_with(tile=4, overlap=2), rand(1, 3, 64, 24), noted, SIDE)
    assert seen == [(32, 24)] * 3


@pytest.mark.parametrize("length", range(5, 40))
def test_tiles_cover_a_length_without_gaps(length: int) -> None:
    spans = vae_pieces._spans(length, tile=4, overlap=2, step=1)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(end - start == 4 for start, end in spans)
    assert all(after[0] <= before[1] - 2 for before, after in pairwise(spans))


def test_edges_between_tiles_are_blended() -> None:
    """Tiles that know nothing of each other make no step where they meet: each gives its own mean here."""

    def mean(latents: Tensor) -> Tensor:
        return grown(latents.mean(dim=(2, 3), keepdim=True).expand_as(latents))

    latents = torch.linspace(0, 1, 14).expand(1, 1, 8, 14)
    row = decode_in_pieces(vae_with(tile=8, overlap=2), latents, mean, SIDE)[0, 0, 0]
    hard = mean(latents[..., -8:])[0, 0, 0, 0] - mean(latents[..., :8])[0, 0, 0, 0]
    assert 0 < row.diff().max() < hard / 10


def test_a_picture_that_fits_a_tile_is_taken_whole() -> None:
    pixels = rand(1, 3, 32, 32)
    assert torch.equal(encode_in_pieces(vae_with(tile=4, overlap=2), pixels, shrunk, SIDE), shrunk(pixels))


def test_slices_hand_on_one_picture_at_a_time() -> None:
    seen: list[int] = []

    def noted(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return shrunk(pixels)

    pixels = rand(3, 3, 16, 16)
    assert torch.equal(encode_in_pieces(vae_with(one_by_one=True), pixels, noted, SIDE), shrunk(pixels)) and seen == [1, 1, 1]


# Every family


Loaded = tuple[Architecture, nn.Module]


@pytest.fixture(params=architecture_names())
def loaded(request: pytest.FixtureRequest, small_model_options: Callable[[str], tuple[str, ...]]) -> Loaded:
    """A family and its tiny VAE."""
    from library.core.command_line import parse_command_line

    arch = architecture_named(request.param)
    options = parse_command_line([arch.ModelOptions], small_model_options(request.param), prog="test", about="test")
    return arch, arch.load_vae(options[arch.ModelOptions], device=CPU, dtype=torch.float32)


def both(arch: Architecture, vae: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Latents of two pictures, and the pixels they become again."""
    latents = arch.encode_images(vae, rand(2, 3, size, size), None)
    return latents, arch.decode_latents(vae, latents)


def test_a_family_s_vae_gives_the_same_in_slices(loaded: Loaded) -> None:
    arch, vae = loaded
    whole = both(arch, vae, 64)
    set_pieces(vae, one_by_one=True, in_tiles=False)
    for found, expected in zip(both(arch, vae, 64), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_family_s_vae_takes_large_pictures_in_tiles_only(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, vae = loaded
    fits, large = both(arch, vae, 64), both(arch, vae, 96)
    monkeypatch.setattr(vae_pieces, "TILE", 8)
    monkeypatch.setattr(vae_pieces, "OVERLAP", 2)
    set_pieces(vae, one_by_one=False, in_tiles=True)
    assert all(torch.equal(found, expected) for found, expected in zip(both(arch, vae, 64), fits, strict=True))
    for found, expected in zip(both(arch, vae, 96), large, strict=True):
        assert found.shape == expected.shape and not torch.equal(found, expected)
