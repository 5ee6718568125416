"""What adapters of every algorithm may have besides their factors: scalars, Tucker cores, bounded norms, another rank dropout."""

from dataclasses import replace

import pytest
import torch
from adapter_cases import KINDS, Case, filled, has_arguments, relative_error
from torch import nn

from networks.base import Adapter
from networks.extras import Dropouts
from networks.layers import LayerShape, fold_core
from networks.lokr import LoKr, LoKrArguments, Split
from networks.members import algorithms

TITLES = [algorithm.title for algorithm in algorithms()]


def made(algorithm: type[Adapter], kind: str = "conv3x3", rank: int = 2, **arguments: object) -> Adapter:
    torch.manual_seed(1)
    return algorithm.fresh("lora_unet_x", KINDS[kind].make(), rank, 1.0, algorithm.Arguments(**arguments))


def test_a_file_holds_the_same_delta_without_a_scalar(case: Case):
    adapter = filled(case.adapter)
    tensors = adapter.file_tensors()
    assert "scalar" not in tensors
    again = type(adapter).from_tensors("lora_unet_x", case.layer, tensors)
    torch.testing.assert_close(again.delta_weight(), adapter.delta_weight())
    assert again.scalar is None


def test_a_file_without_scalar_continues_training_with_one(case: Case):
    adapter = filled(case.adapter)
    network = case.fresh(case.layer)
    network.load(adapter.file_tensors())
    torch.testing.assert_close(network.delta_weight(), adapter.delta_weight())


@pytest.mark.parametrize("algorithm", algorithms(), ids=TITLES)
def test_with_a_scalar_only_the_scalar_is_zero_at_the_start(algorithm: type[Adapter]):
    for rank in (2, 100):
        adapter = made(algorithm, "linear", rank, use_scalar=True)
        zeros = [name for name, value in adapter.named_parameters() if not value.any()]
        assert zeros == ["scalar"]


@pytest.mark.parametrize("arguments", [{}, {"use_tucker": True}], ids=["flat", "tucker"])
@pytest.mark.parametrize("algorithm", algorithms(), ids=TITLES)
def test_without_a_scalar_one_factor_is_zero_at_the_start(algorithm: type[Adapter], arguments: dict[str, bool]):
    zeros = [name for name, value in made(algorithm, **arguments).named_parameters() if not value.any()]
    assert len(zeros) == 1


@pytest.mark.parametrize("algorithm", algorithms(), ids=TITLES)
def test_a_tucker_core_is_for_kernels_larger_than_one(algorithm: type[Adapter]):
    for kind in KINDS:
        keys = set(made(algorithm, kind, use_tucker=True).state_dict())
        has_core = bool(keys & {"lora_mid.weight", "hada_t1", "lokr_t2"})
        assert has_core == ("conv" in kind and kind != "conv1x1")


def test_tucker_factors_have_the_layout_of_lycoris():
    shapes = {key: tuple(value.shape) for algorithm in algorithms() for key, value in made(algorithm, use_tucker=True).state_dict().items()}
    lora = {"alpha": (), "lora_down.weight": (2, 12, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (18, 2, 1, 1)}
    loha = (
        {f"hada_w{n}_a": (2, 18) for n in (1, 2)} | {f"hada_w{n}_b": (2, 12) for n in (1, 2)} | {f"hada_t{n}": (2, 2, 3, 3) for n in (1, 2)}
    )
    lokr = {"lokr_w1": (3, 3), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 6), "lokr_w2_b": (2, 4)}
    assert shapes == lora | loha | lokr


def test_a_core_ties_its_first_axis_to_the_outputs():
    core, outer, inner = torch.randn(2, 2, 3), torch.randn(2, 5), torch.randn(2, 4)
    flat = outer.T @ fold_core(core, inner)
    torch.testing.assert_close(flat.reshape(5, 4, 3), torch.einsum("xyk,xp,yq->pqk", core, outer, inner))


def test_the_norm_of_a_delta_is_that_of_its_direction(case: Case):
    adapter = filled(case.adapter)
    torch.testing.assert_close(adapter.delta_norm(), adapter.direction().norm())


def test_shrinking_scales_the_delta(case: Case):
    adapter = filled(case.adapter)
    before = adapter.direction().clone()
    adapter.shrink(0.3)
    torch.testing.assert_close(adapter.direction(), before * 0.3)


def test_rows_can_be_dropped_instead_of_ranks(case: Case):
    adapter = filled(case.adapter)
    adapter.dropouts = Dropouts(rank=0.5, rank_mode="rows")
    if adapter.extras.magnitude:
        adapter.dora_scale = None
        adapter.extras = replace(adapter.extras, magnitude=None)
    expected = adapter.eval()(case.x)
    torch.manual_seed(0)
    dropped = adapter.train()(case.x).movedim(adapter.shape.channel, -1).flatten(1, -2)
    whole = expected.movedim(adapter.shape.channel, -1).flatten(1, -2)
    is_zero = (dropped == 0).all(dim=1)
    assert 0.2 < is_zero.float().mean() < 0.8
    torch.testing.assert_close(dropped, torch.where(is_zero.unsqueeze(1), 0, 2 * whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "rank", "expected"),
    [
        ({}, 2, Split(a=6, b=8, c=8, d=8, rank2=2)),
        ({}, 4, Split(a=6, b=8, c=8, d=8)),
        ({"factor": 4}, 4, Split(a=4, b=4, c=12, d=16, rank2=4)),
        ({"decompose_both": True}, 2, Split(a=6, b=8, c=8, d=8, rank1=2, rank2=2)),
        ({"decompose_both": True, "factor": 4}, 2, Split(a=4, b=4, c=12, d=16, rank2=2)),
        ({"full_matrix": True}, 1, Split(a=6, b=8, c=8, d=8)),
        ({"unbalanced_factorization": True}, 3, Split(a=8, b=8, c=6, d=8, rank2=3)),
        ({"network_reg_factors": ".*to_q=2"}, 4, Split(a=2, b=2, c=24, d=32, rank2=4)),
    ],
)
def test_a_split_is_that_of_lycoris(arguments: dict[str, object], rank: int, expected: Split):
    from library.models.naming import Target

    target = Target(name="lora_unet_to_q", path="blocks.0.to_q", module_path="x", group="", container="")
    given = LoKrArguments(**arguments).at(target)
    assert Split.asked(LayerShape.of(nn.Linear(64, 48)), rank, given) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"factor": 0}, "factor=0: must be -1"),
        ({"network_reg_factors": "a=1.5"}, "a factor must be -1 \\(as even as possible\\) or at least 1"),
        ({"full_matrix": True, "decompose_both": True}, "decompose_both: contradicts full_matrix"),
        ({"full_matrix": True, "use_tucker": True, "conv_dim": 2}, "use_tucker: contradicts full_matrix"),
    ],
)
def test_arguments_of_lokr_that_make_no_sense_are_refused(arguments: dict[str, object], words: str):
    problems = "\n".join(LoKrArguments(**arguments).check())
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problems)


@pytest.mark.parametrize("rank2", [None, 2])
def test_a_first_factor_with_a_rank_means_alpha_over_that_rank(rank2: int | None):
    split = Split(a=6, b=8, c=8, d=8, rank1=2, rank2=rank2)
    adapter = filled(LoKr("x", nn.Linear(64, 48), split=split, rank=2, alpha=1))
    assert adapter.scale == 0.5
    state = dict(adapter.named_parameters())
    w2 = state["lokr_w2"] if rank2 is None else state["lokr_w2_a"] @ state["lokr_w2_b"]
    assert relative_error(adapter.delta_weight(), 0.5 * torch.kron(state["lokr_w1_a"] @ state["lokr_w1_b"], w2)) < 1e-6
    assert LoKr.from_tensors("x", adapter.layer, adapter.state_dict()).split == split


def test_every_algorithm_knows_the_common_arguments():
    assert all(has_arguments(algorithm, {"use_tucker": 1, "use_scalar": 1, "dora_wd": 1}) for algorithm in algorithms())
