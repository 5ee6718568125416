"""Layers by name in models that no family recognises."""

from typing import Any

import pytest
from torch import nn

from library.core.options import OptionError
from networks.any_model import AnyModel, naming_for
from networks.arguments import NetworkArguments
from networks.selection import LayerPlan, parts_of, plan_layers


class OwnLinear(nn.Linear):
    """A subclass, as quantisation libraries make them."""


class Attention(nn.Module):
    """Projections by diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = OwnLinear(4, 4), nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    """Two blocks, a convolution, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.words = nn.Embedding(4, 4)
        self.shared = self.blocks[0].to_q


def plan(model: nn.Module, encoders: tuple[nn.Module, ...] = (), **arguments: Any) -> list[LayerPlan]:
    naming = AnyModel(model, encoders)
    return plan_layers(naming, parts_of(naming, encoders, model), dim=4, alpha=2.0, arguments=NetworkArguments(**arguments))


def paths(*args: Any, **arguments: Any) -> list[str]:
    return [plan.target.path for plan in plan(*args, **arguments)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("to_q", "conv_in"), ["conv_in", "blocks.0.to_q", "blocks.1.to_q"]),
        ("blocks.1.to_q", ["blocks.1.to_q"]),
        ("to_out.0", ["blocks.0.to_out.0", "blocks.1.to_out.0"]),
        (r"blocks\.\d\.to_(q|k)", ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q", "blocks.1.to_k"]),
        ("to_q, to_k", ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q", "blocks.1.to_k"]),
        ("all-linear", [f"blocks.{n}.{name}" for n in (0, 1) for name in ("to_q", "to_k", "to_out.0")]),
    ],
)
def test_layers_are_chosen_by_name_end_or_regex(targets: Any, expected: list[str]):
    assert paths(Model(), target_modules=targets) == expected


def test_patterns_narrow_the_choice():
    assert paths(Model(), target_modules="all-linear", exclude_patterns=".*[.]0[.].*", only_patterns=".*to_[qk]") == [
        "blocks.1.to_q",
        "blocks.1.to_k",
    ]


def test_a_convolution_needs_no_conv_dim():
    (one,) = plan(Model(), target_modules="conv_in")
    assert (one.rank, one.alpha) == (4, 2.0)
    (other,) = plan(Model(), target_modules="conv_in", conv_dim=3)
    assert (other.rank, other.alpha) == (3, 1.0)


def test_names_say_which_model_a_layer_is_of():
    model, encoder = Model(), Model()
    assert plan(model, target_modules="blocks.0.to_q")[0].target.name == "lora_unet_blocks_0_to_q"
    assert {plan.target.name for plan in plan(model, (encoder,), target_modules="conv_in")} == {"lora_unet_conv_in", "lora_te_conv_in"}
    names = [plan.target.name for plan in plan(model, (encoder, Model()), target_modules="conv_in")]
    assert names == ["lora_unet_conv_in", "lora_te1_conv_in", "lora_te2_conv_in"]


def test_a_model_may_be_a_layer_itself():
    (one,) = plan(nn.Linear(2, 2), target_modules="all-linear")
    assert one.target.name == "lora_unet"


def test_the_projection_that_multihead_attention_never_calls_is_no_layer():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1), "out_proj": nn.Linear(4, 4)})
    assert paths(model, target_modules="out_proj") == ["out_proj"]


def test_without_names_the_error_lists_what_there_is():
    with pytest.raises(OptionError) as caught:
        plan(Model(), (nn.Dropout(),))
    message = str(caught.value)
    assert "a Model of this structure is no model family that Hadron knows (" in message and "SDXL" in message
    assert "1 Conv2d (such as 'conv_in'), 2 OwnLinear (such as 'blocks.0.to_q'), 4 Linear (such as 'blocks.0.to_k')" in message
    assert "names end in to_q (2), to_k (2), to_out.0 (2), conv_in (1)" in message
    assert "the text encoder 1 (Dropout) has no Linear or Conv layer" in message


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            ("to_qq",),
            "target_modules 'to_qq': is the end of no Linear or Conv layer's name, and no regex that fits one; did you mean 'to_q'?",
        ),
        (("norm",), "target_modules 'norm'"),
        (("words", "to_q"), "target_modules 'words'"),
        (("to_q", "zzz"), "names look like 'conv_in'"),
    ],
)
def test_a_name_that_no_layer_has_is_refused(targets: tuple[str, ...], words: str):
    with pytest.raises(OptionError) as caught:
        plan(Model(), target_modules=targets)
    assert words in str(caught.value)


def test_two_layers_of_one_adapter_name_are_refused():
    model = nn.Module()
    model.add_module("a", nn.ModuleDict({"b_c": nn.Linear(2, 2)}))
    model.add_module("a_b", nn.ModuleDict({"c": nn.Linear(2, 2)}))
    with pytest.raises(OptionError, match=r"'a.b_c' and 'a_b.c' would both be named lora_unet_a_b_c in a file; exclude one of them"):
        plan(model, target_modules="all-linear")


def test_a_model_of_a_family_keeps_its_names(sdxl: Any):
    assert naming_for(sdxl.denoiser).name == "sdxl"
    assert isinstance(naming_for(Model()), AnyModel)


def test_a_model_of_no_family_has_no_outline():
    with pytest.raises(ValueError, match="has no outline"):
        AnyModel(Model()).outline()
