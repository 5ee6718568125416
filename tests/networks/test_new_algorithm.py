"""A new algorithm is one file: put into the package, it can be named, trained, saved, read, merged and converted."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from adapter_cases import predict, relative_error

import networks
from library.models.architecture import Models
from networks.members import algorithms
from networks.network import Network
from networks.protocol import load_network_module
from networks.rewriting.conversion import as_lora

FILE = '''
"""Dyad: dW = alpha/r * w_out w_in, the outer product of two vectors; a rank of one whatever is asked."""

import torch
from torch import nn

from networks.arguments import NetworkArguments
from networks.base import Adapter
from networks.extras import Extras
from networks.factory import factory
from networks.layers import LayerShape


class Dyad(Adapter):
    """One outer product."""

    title = "Dyad"
    signature = ("dyad_out", "dyad_in")
    boosted = ("dyad_out",)
    folds_into = ("dyad_out",)
    Arguments = NetworkArguments

    def __init__(self, name, layer, *, rank, alpha, extras=None):
        super().__init__(name, layer, rank=1, alpha=alpha, extras=extras)
        self.dyad_out = nn.Parameter(torch.empty(self.shape.out))
        self.dyad_in = nn.Parameter(torch.empty(self.shape.fan_in))

    @classmethod
    def designed(cls, name, layer, rank, alpha, arguments):
        return cls(name, layer, rank=1, alpha=alpha, extras=Extras.asked(arguments))

    @classmethod
    def from_tensors(cls, name, layer, tensors):
        adapter = cls(name, layer, rank=1, alpha=0, extras=Extras.found(name, LayerShape.of(layer), tensors))
        adapter.load(tensors)
        return adapter

    def initialise(self):
        nn.init.normal_(self.dyad_in)
        self.begin(self.dyad_out, nn.init.normal_)

    def formula(self):
        return torch.outer(self.wide(self.dyad_out), self.wide(self.dyad_in))

    @property
    def dtype(self):
        return self.dyad_in.dtype


create_network, create_network_from_weights = factory(Dyad)
'''


@pytest.fixture
def dyad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the new algorithm, beside the others."""
    (tmp_path / "dyad.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    algorithms.cache_clear()
    yield load_network_module("networks.dyad")
    algorithms.cache_clear()
    sys.modules.pop("networks.dyad")
    vars(networks).pop("dyad")


def test_a_new_algorithm_is_one_file(dyad: ModuleType, sdxl: Models, tmp_path: Path):
    network = dyad.create_network(1.0, 4, 1.0, None, None, sdxl.denoiser, conv_dim="4", dora_wd="True")
    with torch.no_grad():
        for adapter in network.adapters:
            torch.nn.init.normal_(adapter.dyad_out, std=0.1)
    network.save_weights(tmp_path / "a.safetensors")
    again = Network.from_file(tmp_path / "a.safetensors", sdxl.denoiser).eval()
    assert {adapter.title for adapter in again.adapters} == {"Dyad"} and len(again.members) == len(network.members)
    again.attach()
    attached = predict(sdxl.denoiser)
    again.merge()
    torch.testing.assert_close(predict(sdxl.denoiser), attached, rtol=1e-4, atol=1e-4)


def test_a_new_algorithm_becomes_a_lora(dyad: ModuleType):
    layer = torch.nn.Conv2d(6, 8, 3)
    adapter = dyad.Dyad.fresh("x", layer, 1, 2.0, dyad.Dyad.Arguments())
    torch.nn.init.normal_(adapter.dyad_out)
    lora, error = as_lora(adapter)
    assert error < 1e-5 and relative_error(lora.delta_weight(), adapter.delta_weight()) < 1e-5
