"""Which layers are adapted, with which rank and rate, and what is said about arguments that make no sense."""

from typing import Any

import pytest
from torch import nn

from library.core.options import OptionError
from library.models.architecture import Models
from networks import loha, lokr, lora
from networks.network import Network

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
        sdxl, module=module, dim=0, alpha=-1, neuron_dropout=1.0, conv_dmi=4, rank_dropout="1", preset="full", train_llm_adapter="True"
    )
    assert found == [
        "--network_dim 0: must be a whole number of at least 1",
        "--network_alpha -1: must be a number that is not negative",
        "--network_dropout 1.0: must be at least 0 and less than 1",
        "--network_args conv_dmi: unknown network argument 'conv_dmi'; did you mean 'conv_dim'?",
        "--network_args preset: belongs to lycoris.kohya; here target_modules, only_patterns and exclude_patterns choose the layers, "
        "conv_dim adds convolutions",
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
        ({"only_patterns": "down_blocks.1.attention.0.proj_in"}, "did you mean 'down_blocks.1.attentions.0.proj_in'?"),
        ({"network_reg_alphas": "zzz=1"}, "network_reg_alphas 'zzz': matches no layer (the whole dotted name must fit); names look like"),
        ({"module": lokr, "network_reg_factors": "zzz=4"}, "network_reg_factors 'zzz': matches no layer"),
        ({"include_patterns": "time_embed.0"}, "not adapted by default, such as 'time_embed.0'; target_modules takes any layer"),
        ({"target_modules": "['to_qq']"}, "the end of no Linear or Conv layer's name, and no regex that fits one; did you mean 'to_q'?"),
        ({"target_modules": "['to_q', 'qqq']"}, "target_modules 'qqq'"),
        ({"target_modules": "to_q", "exclude_patterns": ".*to_k"}, "matches only layers that target_modules does not choose"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(sdxl: Models, arguments: dict[str, Any], words: str):
    assert words in "\n".join(problems(sdxl, **arguments))


def test_only_narrows_what_would_be_adapted(sdxl: Models):
    assert list(ranks(create(sdxl, only_patterns=f"['{ATTENTION}', '.*norm.*|.*ff.*']", exclude_patterns=".*ff.*"))) == [ATTENTION]
    both = ranks(create(sdxl, only_patterns=".*attn1.*", exclude_patterns=".*", include_patterns=".*to_q"))
    assert both and all(path.endswith("attn1.to_q") for path in both)


def test_patterns_see_module_paths_as_well(sdxl: Models):
    found = ranks(create(sdxl, network_reg_dims="down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q=7"))
    assert [path for path, rank in found.items() if rank == 7] == [ATTENTION]


def test_alphas_by_pattern_stand_beside_ranks(sdxl: Models):
    network = create(sdxl, 4, 2.0, network_reg_dims='{".*attn1[.]to_{1,1}[qk]": 8}', network_reg_alphas={".*attn1.*": 3, ".*": 5})
    found = {member.target.path: (member.adapter.rank, float(member.adapter.alpha)) for member in network.members}
    assert found[ATTENTION] == (8, 3.0)
    assert found[ATTENTION.replace("attn1", "attn2")] == (4, 5.0)


def test_factors_by_pattern_reach_their_layers(sdxl: Models):
    network = create(sdxl, module=lokr, factor=4, network_reg_factors=".*attn1.to_q=2")
    sizes = {member.target.path: tuple(member.adapter.state_dict()["lokr_w1"].shape) for member in network.members}
    assert sizes[ATTENTION] == (2, 2) and sizes[ATTENTION.replace("to_q", "to_k")] == (4, 4)


@pytest.mark.parametrize(("alpha", "scale"), [(3.0, 1.5), (0, 2.0)])
def test_rank_stabilised_scales_divide_by_the_root_of_the_rank(sdxl: Models, alpha: float, scale: float):
    adapters = create(sdxl, 4, alpha, rs_lora=True).adapters
    assert {adapter.scale for adapter in adapters} == {scale}
    assert {float(adapter.alpha) / adapter.rank for adapter in adapters} == {scale}


def test_target_modules_replace_the_choice_of_the_family(sdxl: Models):
    network = create(sdxl, 4, 2.0, target_modules=["to_q", "time_embed.0", "conv_in", ".*emb_layers.*"], exclude_patterns=".*attn2.*")
    found = {member.target.path: (member.adapter.rank, float(member.adapter.alpha)) for member in network.members}
    assert ATTENTION in found and not any("attn2" in path or "to_k" in path for path in found)
    assert {"time_embed.0", "input_blocks.0.0"} <= set(found) and set(found.values()) == {(4, 2.0)}
    assert list(found)[-2:] == ["time_embed.0", "input_blocks.0.0"]
    assert any("emb_layers" in path for path in found)


def test_convolutions_that_target_modules_names_take_conv_dim_where_it_is_given(sdxl: Models):
    network = create(sdxl, 4, 2.0, target_modules="conv_in, proj_in", conv_dim=3, conv_alpha=1.5)
    values = {member.adapter.shape.is_pointwise: (member.adapter.rank, float(member.adapter.alpha)) for member in network.members}
    assert values == {True: (4, 2.0), False: (3, 1.5)}


def test_arguments_for_convolutions_that_are_not_adapted_are_said(sdxl: Models, caplog: pytest.LogCaptureFixture):
    create(sdxl, target_modules="to_q", conv_dim=3, use_tucker=True)
    assert "conv_dim, use_tucker: without effect, since no convolution larger than 1x1 is adapted" in caplog.text
    caplog.clear()
    create(sdxl, conv_dim=3)
    assert "without effect" not in caplog.text


def test_all_linear_takes_every_linear_layer(sdxl: Models):
    linear = sum(isinstance(layer, nn.Linear) for model in (sdxl.denoiser, *sdxl.text_encoders) for layer in model.modules())
    assert len(create(sdxl, target_modules="all-linear").members) == linear


def test_verbose_lists_the_layers(sdxl: Models, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="hadron"):
        create(sdxl, verbose="true")
    assert any(f"{ATTENTION}: rank 4, alpha 1" in record.getMessage() for record in caplog.records)


def test_too_many_text_encoders_are_refused(sdxl: Models):
    with pytest.raises(ValueError, match="3 text encoders were given; SDXL has 2"):
        loha.create_network(1.0, 4, 1.0, None, [*sdxl.text_encoders, sdxl.text_encoders[0]], sdxl.denoiser)
