"""Which parameters share a learning rate, and how patterns, blocks and LoRA+ go together."""

from typing import Any

import pytest

from library.models.architecture import Models
from networks import loha, lokr, lora
from networks.network import Network
from networks.rates import ParameterGroup, parameter_groups


def create(models: Models, module: Any = lora, text: bool = False, **arguments: Any) -> Network:
    return module.create_network(1.0, 2, 1.0, None, models.text_encoders if text else [], models.denoiser, **arguments)


def groups(network: Network, *rates: Any) -> list[ParameterGroup]:
    found = parameter_groups(network.members, network.arguments, *(rates or (1e-4,)))
    assert sum(len(group.parameters) for group in found) == len(list(network.parameters()))
    return found


def rates(network: Network, *given: Any) -> dict[str, float | None]:
    return {group.name: group.rate for group in groups(network, *given)}


def boosted(network: Network) -> set[str]:
    names = {id(parameter): name.split(".", 1)[1] for name, parameter in network.named_parameters()}
    return {names[id(parameter)] for group in groups(network) if group.name.endswith("plus") for parameter in group.parameters}


def test_each_block_learns_at_its_own_rate(sdxl: Models):
    found = rates(create(sdxl, text=True, mid_lr_weight="1,0.5,2", up_lr_weight="linear+.5"), 1e-4, 2e-4, 1e-5)
    assert {"unet block 4": 2e-4, "unet block 11": 1e-4, "textencoder 1": 1e-5, "textencoder 2": 1e-5}.items() <= found.items()
    assert found["unet block 13"] == pytest.approx(1e-4)
    assert found["unet block 14"] == pytest.approx(2e-4 * (0.5 + 1 / 8))
    assert "unet" not in found


def test_a_pattern_counts_before_the_block_and_both_before_lora_plus(sdxl: Models):
    found = rates(
        create(sdxl, down_lr_weight="2,2,2,2,2,2,2,2,2", network_reg_lrs="input_blocks.3.*attn1.*=1e-5", loraplus_lr_ratio=10), 1e-4
    )
    assert {name: rate for name, rate in found.items() if name.startswith(("reg", "unet block 4", "unet block 6"))} == pytest.approx(
        {"unet block 4": 2e-4, "unet block 4 plus": 2e-3, "reg_lr_0": 1e-5, "reg_lr_0 plus": 1e-4}
        | {"unet block 6": 2e-4, "unet block 6 plus": 2e-3}
    )


def test_a_block_of_a_file_whose_factor_is_zero_is_frozen(sdxl: Models, tmp_path: Any):
    create(sdxl).save_weights(tmp_path / "a.safetensors")
    network, _ = lora.create_network_from_weights(
        1.0, tmp_path / "a.safetensors", None, [], sdxl.denoiser, down_lr_weight="zeros+.1", block_lr_zero_threshold=0.1
    )
    assert {name: rate for name, rate in rates(network).items() if rate == 0} == {"unet block 4": 0, "unet block 6": 0}


@pytest.mark.parametrize(
    ("module", "targets", "expected"),
    [
        (lokr, "lokr_w2,lokr_w2_b", {"lokr_w2_b"}),
        (lora, "lora_down", {"lora_down.weight"}),
        (loha, ["hada_w1_a", "hada_w2_a"], {"hada_w1_a", "hada_w2_a"}),
        (lokr, (), {"lokr_w1"}),
    ],
)
def test_lora_plus_boosts_what_is_named(sdxl: Models, module: Any, targets: Any, expected: set[str]):
    network = create(sdxl, module, loraplus_lr_ratio=4, loraplus_targets=targets)
    assert boosted(network) == expected


def test_lora_plus_says_once_what_it_boosts(sdxl: Models, caplog: pytest.LogCaptureFixture):
    network = create(sdxl, text=True, loraplus_lr_ratio=4, loraplus_unet_lr_ratio=16)
    with caplog.at_level("INFO", logger="hadron"):
        groups(network)
    assert [record.getMessage() for record in caplog.records if "LoRA+" in record.getMessage()] == [
        "LoRA+: lora_up of the denoiser at 16 times the learning rate",
        "LoRA+: lora_up of the text encoders at 4 times the learning rate",
    ]


def test_a_parameter_that_no_adapter_has_is_not_boosted_silently(sdxl: Models):
    network = create(sdxl, lokr, loraplus_lr_ratio=4, loraplus_targets="lokr_w1_a")
    with pytest.raises(ValueError, match="loraplus_targets: no adapter of the denoiser has lokr_w1_a"):
        groups(network)


@pytest.mark.parametrize("arguments", [{"loraplus_lr_ratio": 4}, {"mid_lr_weight": "1,0.5,1"}])
def test_a_factor_needs_a_rate_to_act_on(sdxl: Models, arguments: dict[str, Any]):
    with pytest.raises(ValueError, match="multiplies a learning rate by .*; give the rate with --learning_rate"):
        groups(create(sdxl, **arguments), None)


def test_a_factor_of_one_leaves_the_optimizers_own_rate(sdxl: Models):
    assert set(rates(create(sdxl, mid_lr_weight="1,1,1"), None).values()) == {None}


def test_a_rate_by_pattern_without_an_adapter_is_said(sdxl: Models, caplog: pytest.LogCaptureFixture):
    network = create(sdxl, text=True, network_reg_lrs="text_model.*=1e-5")
    network.keep_parts(denoiser=True, text_encoders=False)
    groups(network)
    assert "network_reg_lrs 'text_model.*': there is no adapter that it matches" in caplog.text


def test_a_text_encoder_keeps_its_own_rate_where_another_has_no_adapter(sdxl: Models):
    network = create(sdxl, text=True)
    network.members = [member for member in network.members if member.target.name.startswith("lora_te2_")]
    assert [(group.name, group.rate) for group in network.parameter_groups(1e-4, None, [1e-5, 2e-5])] == [("textencoder 2", 2e-5)]
