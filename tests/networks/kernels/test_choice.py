"""Which way is taken: by the cost model, by measurement, by what the user says."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from adapter_cases import filled
from torch import nn
from torch.utils.checkpoint import checkpoint

import networks
from networks.base import Adapter
from networks.kernels import autotune
from networks.kernels.autotune import Tuner
from networks.kernels.choice import Choice
from networks.kernels.cost import CPU, MATERIALISE, HadamardWays, KroneckerWays, Setting, cheapest, way_at
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA

FLOAT32 = Setting.of("cpu", torch.float32, joins=True)


@dataclass(frozen=True)
class TwoWays:
    """One way that costs 100, and one that costs a token each."""

    def costs(self, tokens: int, setting: Setting) -> dict[str, float]:
        return {MATERIALISE: 100.0, "factored": float(tokens)}


def small_network(**arguments: object) -> networks.network.Network:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    return networks.create_network(model, "loha", rank=4, target_modules="all-linear", **arguments)  # pyright: ignore[reportArgumentType]


def test_the_ranges_change_where_the_costs_cross():
    ranges = cheapest(TwoWays(), FLOAT32, "auto")
    assert [way_at(ranges, tokens) for tokens in (1, 99, 100, 101, 10**9)] == ["factored"] * 3 + [MATERIALISE] * 2


@pytest.mark.parametrize(("path", "expected"), [("factored", "factored"), ("materialise", MATERIALISE)])
def test_a_path_leaves_its_ways_only(path: str, expected: str):
    assert {way for _, way in cheapest(TwoWays(), FLOAT32, path)} == {expected}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("rank", "expected"), [(4, "khatri_rao"), (32, MATERIALISE)])
def test_loha_is_a_low_rank_product_at_small_ranks_and_its_weight_at_large_ones(rank: int, expected: str):
    assert way_at(cheapest(HadamardWays(1280, 1280, rank), FLOAT32, "auto"), 4096) == expected


def test_lokr_never_takes_the_whole_weight_for_many_tokens():
    for sides, rank in (((8, 8, 160, 160), 16), ((8, 8, 160, 160), None), ((32, 32, 40, 40), None), ((8, 8, 1280, 160), None)):
        assert way_at(cheapest(KroneckerWays(sides, rank), FLOAT32, "auto"), 4096) != MATERIALISE


@pytest.mark.parametrize(("sides", "expected"), [((8, 8, 1280, 160), "w1_first"), ((8, 8, 160, 640), "w2_first")])
def test_lokr_mixes_the_narrower_side(sides: tuple[int, int, int, int], expected: str):
    assert way_at(cheapest(KroneckerWays(sides, None), FLOAT32, "auto"), 4096) == expected


def test_a_product_costs_at_least_its_traffic():
    assert CPU.product(4096, 1, 4096) >= 4096 * 4096 * 4 / CPU.bandwidth


def test_the_network_argument_forces_a_path_and_the_network_tells():
    network, x = small_network(path="materialise"), torch.randn(5, 64)
    network.attach()
    network.parts[0][1](x)
    assert network.ways_taken() == {"LoHa materialise": 2}


@pytest.mark.parametrize(
    ("algorithm", "groups", "is_whole"), [(LoRA, 2, True), (LoHa, 2, True), (LoKr, 4, True), (LoKr, 2, False)]
)  # LoKr's w1 has 2 rows
def test_grouped_convolutions_are_materialised_unless_groups_divide_the_first_factor(algorithm: type[Adapter], groups: int, is_whole: bool):
    layer = nn.Conv1d(8, 8, 3, groups=groups).requires_grad_(False)
    adapter = algorithm.fresh("x", layer, 2, 1.0, algorithm.Arguments())
    adapter.choice = Choice("factored")
    adapter.attach()
    layer(torch.randn(1, 8, 4))
    assert (adapter.choice.taken == MATERIALISE) is is_whole


def test_a_wrong_path_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="path: unknown choice 'fatcored'; did you mean 'factored'"):
        small_network(path="fatcored")


# Measuring


def tuned(tmp_path: Path, algorithm: type[Adapter] = LoHa, path: str = "auto") -> Adapter:
    adapter = filled(algorithm.fresh("x", nn.Linear(32, 32).requires_grad_(False), 4, 1.0, algorithm.Arguments()))
    adapter.choice = Choice(path, Tuner(tmp_path / "folder" / "ways.json"))  # pyright: ignore[reportArgumentType]
    adapter.attach()
    return adapter


def test_the_fastest_measured_way_is_taken_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = iter((2.0, 1.0))
    monkeypatch.setattr(autotune, "_median_time", lambda step, device: step() or next(times))
    adapter = tuned(tmp_path)
    adapter.layer(torch.randn(5, 32))
    assert adapter.choice.taken == MATERIALISE
    ((key, found),) = json.loads((tmp_path / "folder" / "ways.json").read_text()).items()
    assert found == {"khatri_rao": 2.0, MATERIALISE: 1.0} and "8 tokens" in key and "float32" in key


def test_layers_that_are_computed_differently_are_measured_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autotune, "_median_time", lambda step, device: 1.0)
    for use_tucker in (False, True):
        layer = nn.Conv2d(8, 8, 3).requires_grad_(False)
        adapter = LoRA.fresh("x", layer, 2, 1.0, LoRA.Arguments(use_tucker=use_tucker))
        adapter.choice = Choice("auto", Tuner(tmp_path / "ways.json"))
        adapter.attach()
        layer(torch.randn(1, 8, 4, 4))
    assert len(json.loads((tmp_path / "ways.json").read_text())) == 2


def test_what_was_measured_before_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autotune, "_median_time", lambda step, device: 1.0)
    tuned(tmp_path).layer(torch.randn(5, 32))
    monkeypatch.setattr(autotune, "_median_time", lambda step, device: pytest.fail("measured again"))
    adapter = tuned(tmp_path)
    adapter.layer(torch.randn(6, 32))  # the same power of two
    assert adapter.choice.taken == "khatri_rao"


def test_measuring_leaves_no_gradient_and_no_other_output(tmp_path: Path):
    adapter, x = tuned(tmp_path, LoKr), torch.randn(5, 32, requires_grad=True)
    first = adapter.layer(x)
    assert x.grad is None and all(parameter.grad is None for parameter in adapter.parameters())
    adapter.choice = Choice()
    torch.testing.assert_close(adapter.layer(x), first)


def test_a_damaged_file_is_told_and_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "ways.json").write_text("[1, 2", encoding="utf-8")
    tuned(tmp_path).layer(torch.randn(5, 32))
    assert "not a file of measured ways" in caplog.text
    assert json.loads((tmp_path / "folder" / "ways.json").read_text())


def test_a_path_limits_what_is_measured(tmp_path: Path):
    adapter = tuned(tmp_path, path="factored")
    adapter.layer(torch.randn(5, 32))
    assert adapter.choice.taken == "khatri_rao"
    assert [list(found) for found in json.loads((tmp_path / "folder" / "ways.json").read_text()).values()] == [["khatri_rao"]]


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_measuring_within_a_checkpoint_leaves_it_alone(is_reentrant: bool, tmp_path: Path):
    adapter, x = tuned(tmp_path), torch.randn(5, 32, requires_grad=True)
    output = checkpoint(adapter.layer, x, use_reentrant=is_reentrant)
    found = torch.autograd.grad(output.sum(), x)[0] if not is_reentrant else output.sum().backward() or x.grad
    torch.testing.assert_close(found, torch.autograd.grad(adapter.layer(x).sum(), x)[0])


def test_measuring_is_possible_in_inference_mode(tmp_path: Path):
    adapter = tuned(tmp_path)
    with torch.inference_mode():
        adapter.layer(torch.randn(5, 32))
    assert adapter.choice.taken is not None


def test_no_tokens_are_not_measured(tmp_path: Path):
    adapter = tuned(tmp_path)
    assert adapter.layer(torch.randn(0, 32)).shape == (0, 32)
    assert not (tmp_path / "folder").exists()


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "folder").write_text("a file in the place of the folder", encoding="utf-8")
    adapter = tuned(tmp_path)
    for tokens in (5, 50):
        adapter.layer(torch.randn(tokens, 32))
    assert caplog.text.count("what is measured holds for this run only") == 1


def test_kernels_are_not_tried_without_a_gpu():
    assert not autotune.has_kernels(torch.device("cpu"))
