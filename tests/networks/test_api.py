"""The Python API: its documented examples run, and what it says where it is used wrongly."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import networks
from library.core.options import OptionError

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
EXAMPLES = re.findall(r"^## (Example \d).*?```python example\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[title for title, _ in EXAMPLES])
def test_a_documented_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(EXAMPLES) == 3
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {})


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).requires_grad_(False)


def test_a_name_is_given_once():
    plain = model()
    networks.create_network(plain, name="a", target_modules="all-linear").attach()
    with pytest.raises(ValueError, match="a network named 'a' is attached to this model already"):
        networks.create_network(plain, name="a", target_modules=["2"]).attach()


def test_an_unknown_name_is_answered_with_the_nearest():
    plain = model()
    networks.create_network(plain, name="style", target_modules="all-linear").attach()
    with pytest.raises(ValueError, match=r"unknown attached network 'stile'; did you mean 'style'\?"):
        networks.set_adapters(plain, {"stile": 1.0})


def test_an_unknown_algorithm_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown algorithm 'lohr'; did you mean 'lo"):
        networks.create_network(model(), "lohr")


def test_a_model_of_no_family_without_targets_is_told_what_there_is():
    with pytest.raises(OptionError, match=r"target_modules.*2 Linear \(such as '0'\)"):
        networks.create_network(model())


def test_alpha_is_the_rank_unless_given():
    assert networks.create_network(model(), rank=2, target_modules="all-linear").adapters[0].scale == 1
    assert networks.create_network(model(), rank=2, alpha=1, target_modules="all-linear").adapters[0].scale == 0.5


def test_a_detached_network_is_neither_named_nor_switched():
    plain = model()
    network = networks.create_network(plain, name="style", target_modules="all-linear")
    network.attach()
    network.detach()
    assert networks.attached_names(plain) == []
    networks.set_adapters(plain, {})
    assert all(adapter.enabled for adapter in network.adapters)


def test_the_package_says_what_it_has():
    with pytest.raises(AttributeError, match="module 'networks' has no attribute 'nothing'"):
        networks.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": "8"}, "--network_dim 8: must be a whole number of at least 1"),
        ({"rank": 4.5}, "--network_dim 4.5: must be a whole number"),
        ({"rank": 0}, "--network_dim 0: must be a whole number of at least 1"),
        ({"alpha": "8"}, "--network_alpha 8: must be a number that is not negative"),
        ({"alpha": float("nan")}, "--network_alpha nan: must be a number"),
        ({"algorithm": None}, "unknown algorithm 'None'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(arguments: Any, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        networks.create_network(model(), target_modules="all-linear", **arguments)


@pytest.mark.parametrize(("encoders", "count"), [(None, 0), (model(), 1), ([model(), model()], 2)])
def test_text_encoders_are_none_one_or_several(encoders: Any, count: int):
    network = networks.create_network(model(), text_encoders=encoders, target_modules="all-linear")
    assert len({member.part.name for member in network.members}) == 1 + count


def test_a_merged_network_is_not_switched_silently():
    plain = model()
    network = networks.create_network(plain, name="style", target_modules="all-linear")
    network.attach()
    network.merge()
    for switch in (lambda: networks.set_adapters(plain, {}), lambda: networks.set_adapters(plain, {"style": 0.5})):
        with pytest.raises(ValueError, match="merged into the weights, and not to be switched until it is unmerged: style"):
            switch()
    with pytest.raises(ValueError, match="a merged network cannot be switched"):
        network.set_enabled(False)
    network.unmerge()
    networks.set_adapters(plain, {})
    assert not any(adapter.enabled for adapter in network.adapters)
