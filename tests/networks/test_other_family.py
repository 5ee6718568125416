"""A family with groups that an argument turns on, default excludes and one text encoder: nothing is tied to SDXL."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_cases import filled
from torch import nn

from library.core.options import OptionError
from library.core.tensor_file import save_tensors
from library.models.naming import Blocks, Naming, Part, Target
from networks import lora
from networks.network import Network

DENOISER = Part(
    name="dit",
    prefix="lora_unet",
    is_denoiser=True,
    default_groups=("Block",),
    extra_groups={"train_llm_adapter": ("LLMAdapter",)},
    default_excludes=(".*_norm.*",),
    blocks=Blocks(count=3, down=range(1), mid=range(1, 2), up=range(2, 3), number=lambda path: 2 if path == "llm" else int(path[-1])),
)
ENCODER = Part(name="text encoder", prefix="lora_te", is_denoiser=False, default_groups=("Block",))
GROUPS = {"blocks": "Block", "my_norm": "Block", "layers": "Block", "llm": "LLMAdapter"}  # by the first word of a path


class Family(Naming):
    """Every Linear but those of the head."""

    name = "other"
    title = "Other"
    parts = (DENOISER, ENCODER)

    def recognises(self, denoiser: nn.Module) -> bool:
        return True

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        return [
            Target(
                name=f"{part.prefix}_{path.replace('.', '_')}", path=path, module_path=path, group=GROUPS[path.split(".")[0]], container=""
            )
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and path != "head"
        ]

    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        raise NotImplementedError


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr("library.models.naming.naming_names", lambda: ["other"])
    monkeypatch.setattr("library.models.naming.naming_named", lambda name: Family())
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)])
    denoiser = nn.ModuleDict({"blocks": blocks, "my_norm": nn.Linear(4, 4), "llm": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    return SimpleNamespace(denoiser=denoiser, encoder=nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])}))


def names(models: SimpleNamespace, **arguments: Any) -> list[str]:
    return [adapter.name for adapter in lora.create_network(1.0, 2, 1.0, None, None, models.denoiser, **arguments).adapters]


def test_default_excludes_hold_until_a_pattern_includes(models: SimpleNamespace):
    assert names(models) == ["lora_unet_blocks_0", "lora_unet_blocks_1"]
    assert names(models, include_patterns="my_norm") == ["lora_unet_blocks_0", "lora_unet_blocks_1", "lora_unet_my_norm"]


@pytest.mark.parametrize(("word", "extra"), [("True", ["lora_unet_llm"]), ("false", [])])
def test_an_argument_of_the_family_turns_a_group_on(models: SimpleNamespace, word: str, extra: list[str]):
    assert names(models, train_llm_adapter=word) == ["lora_unet_blocks_0", "lora_unet_blocks_1", *extra]


def test_an_argument_of_the_family_is_checked(models: SimpleNamespace):
    with pytest.raises(OptionError, match="--network_args train_llm_adapter: 'perhaps' is not true or false"):
        names(models, train_llm_adapter="perhaps")


def test_a_pattern_for_layers_of_such_a_group_is_told_of_the_argument(models: SimpleNamespace):
    with pytest.raises(OptionError, match="matches only layers of LLMAdapter that are not adapted; train_llm_adapter=True turns them on"):
        names(models, network_reg_dims="llm=4")


def test_named_layers_need_neither_group_nor_table_nor_include(models: SimpleNamespace):
    assert names(models, target_modules="llm,head,my_norm") == ["lora_unet_my_norm", "lora_unet_llm", "lora_unet_head"]
    with pytest.raises(OptionError, match="not adapted by default, such as 'head'; target_modules takes any layer"):
        names(models, include_patterns="head")
    with pytest.raises(OptionError, match="train_llm_adapter: is without effect beside target_modules, which names the layers"):
        names(models, target_modules="head", train_llm_adapter="True")


def test_blocks_are_counted_as_the_family_counts_them(models: SimpleNamespace):
    network = lora.create_network(1.0, 2, 1.0, None, None, models.denoiser, block_dims="3,5,0", mid_lr_weight="0.5", train_llm_adapter="1")
    assert {member.target.path: member.adapter.rank for member in network.members} == {"blocks.0": 3, "blocks.1": 5}
    assert {group.name: group.rate for group in network.parameter_groups(1e-4)} == {"unet block 0": 1e-4, "unet block 1": 5e-5}
    with pytest.raises(OptionError, match="block_dims: 2 numbers; Other has 3 blocks"):
        names(models, block_dims="3,5")


def test_lycoris_spelling_of_a_single_text_encoder_is_read(models: SimpleNamespace, tmp_path):
    network = lora.create_network(1.0, 2, 1.0, None, models.encoder, models.denoiser)
    state = {key.replace("lora_te_", "lora_te1_"): filled(a).state_dict()[key.split(".", 1)[1]] for a in network.adapters
             for key in (f"{a.name}.{parameter}" for parameter in a.state_dict())}  # fmt: skip
    save_tensors(tmp_path / "a.safetensors", state)
    again = Network.from_file(tmp_path / "a.safetensors", models.denoiser, [models.encoder])
    assert [adapter.name for adapter in again.adapters] == [adapter.name for adapter in network.adapters]
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())
