"""Block-wise ranks, alphas and learning rates."""

import math
from typing import Any

import pytest

from library.core.options import OptionError
from library.models.architecture import Models
from library.models.naming import Naming, naming_named
from networks import loha
from networks.arguments import NetworkArguments
from networks.blocks import BlockTables, curve, lr_factors, problems
from networks.network import Network

COUNT = 23


@pytest.fixture
def naming() -> Naming:
    return naming_named("sdxl")


def create(models: Models, **arguments: Any) -> Network:
    return loha.create_network(1.0, 4, 2.0, None, None, models.denoiser, **arguments)


def by_block(network: Network, small: bool = True) -> dict[int, set[tuple[int, float]]]:
    """Block -> (rank, alpha) of its layers with small, or with larger kernels."""
    found: dict[int, set[tuple[int, float]]] = {}
    for member in network.members:
        assert member.part.blocks is not None
        if member.adapter.shape.is_pointwise == small:
            number = member.part.blocks.number(member.target.path)
            found.setdefault(number, set()).add((member.adapter.rank, float(member.adapter.alpha)))
    return found


def row(**values: float) -> str:
    """A table of ones but for `b4=8`: block 4 has 8."""
    return ",".join(str(values.get(f"b{number}", 1)) for number in range(COUNT))


def test_each_block_has_its_own_rank_and_alpha(sdxl: Models):
    found = by_block(create(sdxl, block_dims=row(b4=8, b11=3), block_alphas=row(b11=1.5)))
    assert found[4] == {(8, 1.0)} and found[11] == {(3, 1.5)} and found[13] == {(1, 1.0)}


def test_alphas_of_blocks_default_to_the_general_alpha(sdxl: Models):
    assert set().union(*by_block(create(sdxl, block_dims=row())).values()) == {(1, 2.0)}


def test_a_rank_of_zero_leaves_a_block_out(sdxl: Models):
    assert set(by_block(create(sdxl))) - set(by_block(create(sdxl, block_dims=row(b4=0, b13=0)))) == {4, 13}


def test_convolutions_have_their_own_ranks_and_no_block_needs_conv_dim(sdxl: Models):
    network = create(sdxl, conv_block_dims=row(b4=6, b2=0), conv_alpha=3)
    assert set().union(*by_block(network).values()) == {(4, 2.0)}
    found = by_block(network, small=False)
    assert found[4] == {(6, 3.0)} and found[10] == {(1, 3.0)} and 2 not in found
    assert set().union(*by_block(create(sdxl, conv_block_dims=row()), small=False).values()) == {(1, 1.0)}


def test_conv_block_alphas_act_on_convolutions_only(sdxl: Models):
    network = create(sdxl, conv_dim=2, conv_block_alphas=row(b4=5))
    assert by_block(network, small=False)[4] == {(2, 5.0)} and by_block(network)[4] == {(4, 2.0)}


def test_a_pattern_counts_before_the_block(sdxl: Models):
    network = create(sdxl, block_dims=row(b4=0), network_reg_dims="input_blocks.3.1.proj_in=7", network_reg_alphas=".*proj_in=0.5")
    assert by_block(network)[4] == {(7, 0.5)}


def test_text_encoders_have_no_blocks(sdxl: Models):
    network = loha.create_network(1.0, 4, 2.0, None, sdxl.text_encoders, sdxl.denoiser, block_dims=row(), down_lr_weight="zeros")
    assert {member.adapter.rank for member in network.members if not member.part.is_denoiser} == {4}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cosine", [1, math.cos(math.pi / 4), 0]),
        ("sine", [0, math.sin(math.pi / 4), 1]),
        ("linear", [0, 0.5, 1]),
        ("reverse_linear", [1, 0.5, 0]),
        ("zeros", [0, 0, 0]),
        ("linear + .25", [0.25, 0.75, 1.25]),
    ],
)
def test_a_curve_runs_over_its_section(text: str, expected: list[float]):
    assert curve(text, 3) == pytest.approx(expected)
    assert [value == 0 for value in curve(text, 3)] == [value == 0 for value in expected]


def test_a_curve_over_one_block_is_its_beginning():
    assert curve("linear+1", 1) == [1.0]


def test_sections_that_are_not_given_keep_their_rate(naming: Naming):
    blocks = naming.parts[0].blocks
    assert blocks is not None
    factors = lr_factors(NetworkArguments(mid_lr_weight=(0.5, 2.0, 3.0)), blocks)
    assert factors == (*[1.0] * 10, 0.5, 2.0, 3.0, *[1.0] * 10)


def test_blocks_at_or_below_the_threshold_get_no_adapter(sdxl: Models):
    weights = {"down_lr_weight": "1,1,1,0.1,1,0.2,1,1,1", "block_lr_zero_threshold": "0.1"}
    assert set(by_block(create(sdxl))) - set(by_block(create(sdxl, **weights))) == {4}
    assert set(by_block(create(sdxl))) - set(by_block(create(sdxl, down_lr_weight="zeros"))) == {4, 6}


def test_a_rate_by_pattern_keeps_a_layer_in_a_block_without_rate(sdxl: Models):
    network = create(sdxl, down_lr_weight="zeros", network_reg_lrs="input_blocks.3.1.proj_in=1e-5")
    assert [member.target.path for member in network.members if member.target.path.startswith("input")] == ["input_blocks.3.1.proj_in"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"block_dims": "1,2,3"}, "block_dims: 3 numbers; SDXL has 23 blocks, and each needs one"),
        ({"mid_lr_weight": "1"}, "mid_lr_weight: 1 numbers; SDXL has 3 mid blocks, and each needs one"),
        ({"up_lr_weight": "1," * 8}, "up_lr_weight: 8 numbers; SDXL has 9 up blocks"),
        ({"block_dims": row(b3=-1)}, "must not be negative"),
        ({"block_dims": row(b3=1.5)}, "block_dims: '1.5' is not a whole number"),
        ({"down_lr_weight": "cosin"}, "down_lr_weight 'cosin': neither numbers nor a curve: unknown curve 'cosin'; did you mean 'cosine'?"),
        ({"down_lr_weight": "cosine+x"}, "the offset 'x' is not a number; write cosine+0.25"),
        ({"down_lr_weight": "cosine+-1"}, "must be a number that is not negative"),
        ({"block_dims": row(**{f"b{n}": 0 for n in range(COUNT)})}, "the patterns and block_dims leave no layer of SDXL to adapt"),
    ],
)
def test_a_table_that_does_not_fit_the_blocks_is_refused(sdxl: Models, given: dict[str, Any], words: str):
    with pytest.raises(OptionError) as caught:
        create(sdxl, **given)
    assert words in "\n".join(caught.value.problems)


class WithoutBlocks:
    """A family whose denoiser counts no blocks."""

    title = "Other"
    parts = ()


def test_a_family_without_blocks_is_told_of_patterns():
    arguments = NetworkArguments(block_dims=(1,), up_lr_weight="sine")
    (problem,) = problems(arguments, WithoutBlocks())  # pyright: ignore[reportArgumentType]
    assert "block_dims, up_lr_weight: the blocks of Other have no numbers; use network_reg_dims" in problem


def test_without_block_arguments_there_are_no_tables(naming: Naming):
    assert BlockTables.of(NetworkArguments(), naming.parts[0]) is None
    assert BlockTables.of(NetworkArguments(block_dims=(1,) * COUNT), naming.parts[1]) is None
