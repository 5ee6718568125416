"""A family with groups that an argument turns on, default excludes and one text encoder: nothing is tied to SDXL."""

from types import SimpleNamespace

import pytest
import torch
from adapter_cases import filled
from torch import nn

from library.core.options import OptionError
from library.core.tensor_file import save_tensors
from library.models.naming import Part, Target
from networks import lora
from networks.network import Network

DENOISER = Part(
    name="dit",
    prefix="lora_unet",
    is_denoiser=True,
    default_groups=("Block",),
    extra_groups={"train_llm_adapter": ("LLMAdapter",)},
    default_excludes=(".*_norm.*",),
)
ENCODER = Part(name="text encoder", prefix="lora_te", is_denoiser=False, default_groups=("Block",))


class Family:
    title = "Other"
    parts = (DENOISER, ENCODER)

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        """Every Linear; the group is told by the first word of the path."""
        paths = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        return [
            Target(
                name=f"{part.prefix}_{path.replace('.', '_')}",
                path=path,
                module_path=path,
                group="LLMAdapter" if path.startswith("llm") else "Block",
                container="",
            )
            for path in paths
        ]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr("networks.any_model.naming_of", lambda denoiser: Family())
    denoiser = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)]), "my_norm": nn.Linear(4, 4), "llm": nn.Linear(4, 4)}
    )
    return SimpleNamespace(denoiser=denoiser, encoder=nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])}))


def names(models: SimpleNamespace, **arguments: str) -> list[str]:
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


def test_lycoris_spelling_of_a_single_text_encoder_is_read(models: SimpleNamespace, tmp_path):
    network = lora.create_network(1.0, 2, 1.0, None, models.encoder, models.denoiser)
    state = {key.replace("lora_te_", "lora_te1_"): filled(a).state_dict()[key.split(".", 1)[1]] for a in network.adapters
             for key in (f"{a.name}.{parameter}" for parameter in a.state_dict())}  # fmt: skip
    save_tensors(tmp_path / "a.safetensors", state)
    again = Network.from_file(tmp_path / "a.safetensors", models.denoiser, [models.encoder])
    assert [adapter.name for adapter in again.adapters] == [adapter.name for adapter in network.adapters]
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())
