"""Which layers are adapted, with which rank and rate, and what is said about arguments that make no sense."""

from typing import Any

import pytest

from library.core.options import OptionError
from library.models.architecture import Models
from networks import loha, lokr, lora
from networks.network import Network
from networks.patterns import pattern_list, pattern_table

ATTENTION = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"


def create(models: Models, dim: Any = 4, alpha: Any = 1.0, module: Any = loha, **arguments: Any) -> Network:
    return module.create_network(1.0, dim, alpha, models.vae, models.text_encoders, models.denoiser, **arguments)


def ranks(network: Network) -> dict[str, int]:
    return {member.target.path: member.adapter.rank for member in network.members}


def problems(models: Models, **arguments: Any) -> list[str]:
    with pytest.raises(OptionError) as caught:
        create(models, **arguments)
    return caught.value.problems


def test_without_conv_dim_only_transformers_and_text_encoders_are_adapted(sdxl: Models):
    groups = {member.target.group for member in create(sdxl).members}
    assert groups == {"Transformer2DModel", "CLIPAttention", "CLIPMLP"}


def test_conv_dim_is_the_rank_of_kernels_larger_than_one_only(sdxl: Models):
    network = create(sdxl, 4, 2.0, conv_dim="3", conv_alpha="1.5")
    assert "ResnetBlock2D" in {member.target.group for member in network.members}
    for member in network.members:
        expected = (4, 2.0) if member.adapter.shape.is_pointwise else (3, 1.5)
        assert (member.adapter.rank, float(member.adapter.alpha)) == expected


def test_defaults_are_those_of_sd_scripts(sdxl: Models):
    adapters = create(sdxl, None, None, conv_dim=2).adapters
    assert {adapter.rank for adapter in adapters if adapter.shape.is_pointwise} == {4}
    assert {float(adapter.alpha) for adapter in adapters} == {1.0}
    assert {adapter.scale for adapter in create(sdxl, 4, 0).adapters} == {1.0}


def test_adapters_stand_in_the_order_of_the_tables(sdxl: Models):
    from library.models.architecture import architecture_named

    names = [
        target.name for part in architecture_named("sdxl").parts[:1] for target in architecture_named("sdxl").targets(part, sdxl.denoiser)
    ]
    assert [adapter.name for adapter in create(sdxl, conv_dim=2).adapters][: len(names)] == names


def test_an_excluded_layer_can_be_included_again(sdxl: Models):
    paths = ranks(create(sdxl, exclude_patterns="['.*attn1.*', r'.*ff\\.net.*']", include_patterns=f"['{ATTENTION}']"))
    assert [path for path in paths if "attn1" in path] == [ATTENTION]
    assert not any("ff.net" in path for path in paths)


def test_ranks_by_pattern_take_the_first_match_and_keep_alpha(sdxl: Models):
    network = create(sdxl, 4, 2.0, network_reg_dims=".*attn1.to_q=2,.*attn1.*=3")
    found = ranks(network)
    assert found[ATTENTION] == 2
    assert {rank for path, rank in found.items() if "attn1.to_k" in path} == {3}
    assert {float(adapter.alpha) for adapter in network.adapters} == {2.0}


@pytest.mark.parametrize("module", [lora, loha, lokr])
def test_everything_wrong_is_said_at_once(sdxl: Models, module: Any):
    found = problems(
        sdxl, module=module, dim=0, alpha=-1, neuron_dropout=1.0, conv_dmi=4, rank_dropout="1", use_tucker="True", train_llm_adapter="True"
    )
    assert found == [
        "--network_dim 0: must be at least 1",
        "--network_alpha -1: must be a number that is not negative",
        "--network_dropout 1.0: must be at least 0 and less than 1",
        "--network_args conv_dmi: unknown network argument 'conv_dmi'; did you mean 'conv_dim'?",
        "--network_args use_tucker: not supported by Hadron's modules yet; use --network_module lycoris.kohya for it",
        "--network_args train_llm_adapter: SDXL has no such layers",
        "--network_args rank_dropout=1.0: must be at least 0 and less than 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank_dropout": "1"}, "--network_args rank_dropout=1.0: must be at least 0 and less than 1"),
        ({"module_dropout": -0.1}, "--network_args module_dropout=-0.1: must be at least 0 and less than 1"),
        ({"conv_dim": "0"}, "--network_args conv_dim=0: must be at least 1"),
        ({"conv_dim": "four"}, "--network_args conv_dim: 'four' is not a whole number"),
        ({"conv_alpha": "1"}, "--network_args conv_alpha=1.0: is without effect unless conv_dim is given too"),
        ({"loraplus_lr_ratio": "0"}, "--network_args loraplus_lr_ratio=0.0: must be more than 0"),
        ({"exclude_patterns": "['.*(']"}, "--network_args exclude_patterns '.*(': not a regular expression"),
        ({"network_reg_dims": ".*attn1.*"}, "--network_args network_reg_dims '.*attn1.*': must be of the form regex=number,regex=number"),
        ({"network_reg_dims": ".*attn1.*=0"}, "--network_args network_reg_dims '.*attn1.*': a rank must be a whole number of at least 1"),
        ({"network_reg_lrs": ".*attn1.*=-1"}, "--network_args network_reg_lrs '.*attn1.*': a learning rate must not be negative"),
        ({"network_reg_lrs": ".*attn1.*=fast"}, "--network_args network_reg_lrs '.*attn1.*': 'fast' is not a number"),
        ({"exclude_patterns": "input_blocks.3.1.tranformer_blocks.0.attn1.to_q"}, f"did you mean '{ATTENTION}'?"),
        (
            {"include_patterns": "input_blocks.1.0.in_layers.2"},
            "layers of ResnetBlock2D that are not adapted; conv_dim turns convolutions on",
        ),
        ({"exclude_patterns": ".*"}, "the patterns leave no layer of SDXL to adapt"),
        ({"module": lokr, "factor": "0"}, "--network_args factor=0: must be -1 (as even as possible) or at least 1"),
        ({"factor": "4"}, "--network_args factor: unknown network argument 'factor'"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(sdxl: Models, arguments: dict[str, Any], words: str):
    assert words in "\n".join(problems(sdxl, **arguments))


def test_a_table_of_patterns_may_hold_commas_and_equals_signs():
    entries = pattern_table("a{1,2}=8, (?=b)b.*=1e-4", "here").entries
    assert [(entry.regex.pattern, entry.value) for entry in entries] == [("a{1,2}", 8.0), ("(?=b)b.*", 1e-4)]


def test_one_pattern_needs_no_list_even_if_it_begins_with_a_bracket():
    assert [entry.regex.pattern for entry in pattern_list("[ab].*{1,2}", "here").entries] == []
    assert [entry.regex.pattern for entry in pattern_list("[ab]x{1,2}", "here").entries] == ["[ab]x{1,2}"]


def test_verbose_lists_the_layers(sdxl: Models, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="hadron"):
        create(sdxl, verbose="true")
    assert any(f"{ATTENTION}: rank 4, alpha 1" in record.getMessage() for record in caplog.records)


def test_too_many_text_encoders_are_refused(sdxl: Models):
    with pytest.raises(ValueError, match="3 text encoders were given; SDXL has 2"):
        loha.create_network(1.0, 4, 1.0, None, [*sdxl.text_encoders, sdxl.text_encoders[0]], sdxl.denoiser)
