"""Fixtures: one adapter on one layer for every algorithm and kind of layer, and the models of a small SDXL."""

import copy
from types import SimpleNamespace

import pytest
import torch
from adapter_cases import CASES, KINDS, Case
from torch import nn

from library.models.architecture import Models
from networks.base import Adapter


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    algorithm, rank, kind, arguments = request.param
    torch.manual_seed(1)
    layer = KINDS[kind].make().requires_grad_(False)

    def fresh(layer: nn.Module) -> Adapter:
        return algorithm.fresh("lora_unet_x", layer, rank, 1.5, algorithm.Arguments(**arguments))

    return Case(adapter=fresh(layer), layer=layer, x=torch.randn(KINDS[kind].input_shape), fresh=fresh)


@pytest.fixture
def sdxl(small_sdxl_modules: SimpleNamespace) -> Models:
    """The models of a small SDXL, this test's own."""
    own = copy.deepcopy(small_sdxl_modules)
    return Models(denoiser=own.unet, text_encoders=[own.text_encoder_1, own.text_encoder_2], tokenizers=[], vae=None)
