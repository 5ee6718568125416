"""Fixtures: small models of both families with filled adapters, to be spelt as other tools spell them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_cases import filled
from torch import nn

from library.models.naming import Naming, Part, naming_named
from networks import loha, lokr, lora
from networks.members import Member

Parts = list[tuple[Part, nn.Module]]
ALGORITHMS = {"lora": lora.LoRA, "loha": loha.LoHa, "lokr": lokr.LoKr}


class Small:
    """A family's small models, and adapters on some of their layers."""

    def __init__(self, naming: Naming, parts: Parts) -> None:
        self.naming, self.parts = naming, parts

    def members(self, algorithm: str = "lora", *, part: int | None = 0, only: str = "", rank: int = 2, **arguments: Any) -> list[Member]:
        """Filled adapters on the layers whose path holds `only`: of one part by its number, or of all for None."""
        torch.manual_seed(3)
        kind = ALGORITHMS[algorithm]
        chosen = self.parts if part is None else [self.parts[part]]
        return [
            Member(
                adapter=filled(kind.fresh(target.name, module.get_submodule(target.module_path), rank, 1.5, kind.Arguments(**arguments))),
                part=own,
                target=target,
            )
            for own, module in chosen
            for target in self.naming.targets(own, module)
            if only in target.path
        ]


@pytest.fixture(scope="session")
def sdxl(small_sdxl_modules: SimpleNamespace) -> Small:
    naming = naming_named("sdxl")
    modules = (small_sdxl_modules.unet, small_sdxl_modules.text_encoder_1, small_sdxl_modules.text_encoder_2)
    return Small(naming, list(zip(naming.parts, modules, strict=True)))


@pytest.fixture(scope="session")
def anima(small_anima_modules: SimpleNamespace) -> Small:
    naming = naming_named("anima")
    return Small(naming, list(zip(naming.parts, (small_anima_modules.denoiser, small_anima_modules.text_encoder), strict=True)))
