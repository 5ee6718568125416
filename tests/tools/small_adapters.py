"""Adapters of a small SDXL as files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from library.models.naming import naming_named
from networks import loha, lokr, lora
from networks.base import Adapter
from networks.members import Member
from networks.network import Network

SOME = ("attn1", "layers.0.self_attn")
ALGORITHMS: dict[str, type[Adapter]] = {"lora": lora.LoRA, "loha": loha.LoHa, "lokr": lokr.LoKr}


def write_adapter(path: Path, modules: SimpleNamespace, algorithm: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Network:
    """A filled adapter of some attention layers of a small SDXL, in its native names."""
    naming = naming_named("sdxl")
    parts: list[tuple[Any, nn.Module]] = list(
        zip(naming.parts, (modules.unet, modules.text_encoder_1, modules.text_encoder_2), strict=True)
    )
    kind, generator = ALGORITHMS[algorithm], torch.Generator().manual_seed(0)
    members = []
    for part, module in parts:
        for target in naming.targets(part, module):
            if any(words in target.path for words in SOME):
                adapter = kind.fresh(target.name, module.get_submodule(target.module_path), 2, 1.0, kind.Arguments(**arguments))
                with torch.no_grad():
                    for name, parameter in adapter.named_parameters():
                        noise = torch.randn(parameter.shape, generator=generator) * 0.1
                        parameter.copy_(parameter * (1 + noise) if name == "dora_scale" else noise.to(dtype))
                members.append(Member(adapter=adapter, part=part, target=target))
    network = Network(members, naming, parts)
    network.save_weights(path, dtype, {"ss_output_name": "style", "ss_network_module": f"networks.{algorithm}"})
    return network
