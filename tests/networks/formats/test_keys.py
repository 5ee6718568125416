"""Keys are split into the layer's name and our name of the parameter, however a tool spells both."""

import pytest

from networks.formats.keys import by_name, split_key

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("key", "layer", "parameter"),
    [
        ("lora_unet_a_b.lora_down.weight", "lora_unet_a_b", "lora_down.weight"),
        ("lora_unet_a_b.lora_mid.weight", "lora_unet_a_b", "lora_mid.weight"),
        ("lora_unet_a_b.alpha", "lora_unet_a_b", "alpha"),
        ("lora_unet_a_b.dora_scale", "lora_unet_a_b", "dora_scale"),
        ("lora_unet_a_b.w_norm", "lora_unet_a_b", "w_norm"),
        ("diffusion_model.a.0.diff_b", "diffusion_model.a.0", "diff_b"),
        ("diffusion_model.a.0.lokr_w1", "diffusion_model.a.0", "lokr_w1"),
        ("base_model.model.a.0.lora_A.weight", "base_model.model.a.0", "lora_down.weight"),
        ("base_model.model.a.0.lora_B.default.weight", "base_model.model.a.0", "lora_up.weight"),
        ("base_model.model.a.0.lora_B.my-style.weight", "base_model.model.a.0", "lora_up.weight"),
        ("base_model.model.a.0.hada_w1_a", "base_model.model.a.0", "hada_w1_a"),
        ("base_model.model.a.0.lokr_t2.default", "base_model.model.a.0", "lokr_t2"),
        ("base_model.model.a.0.lora_magnitude_vector", "base_model.model.a.0", "magnitude"),
        ("base_model.model.a.0.lora_magnitude_vector.default.weight", "base_model.model.a.0", "magnitude"),
        ("transformer.a.magnitude", "transformer.a", "magnitude"),
        ("unet.a.lora.up.weight", "unet.a", "lora_up.weight"),
        ("text_encoder.a.lora_linear_layer.up.weight", "text_encoder.a", "lora_up.weight"),
        (f"{LAYER}.processor.to_q_lora.down.weight", f"{LAYER}.to_q", "lora_down.weight"),
        (f"{LAYER}.processor.to_out_lora.up.weight", f"{LAYER}.to_out.0", "lora_up.weight"),
        (f"{LAYER}.processor.to_out_lora.alpha", f"{LAYER}.to_out.0", "alpha"),
        (f"{LAYER}.to_out.0.lora_A.weight", f"{LAYER}.to_out.0", "lora_down.weight"),
        ("lora_unet_a.oft_blocks", "lora_unet_a", "oft_blocks"),
        ("lora_unet_a.a1.weight", "lora_unet_a", "a1.weight"),
        ("unet.a.b.oft_blocks", "unet.a.b", "oft_blocks"),
        ("base_model.model.a.lora_B.bias", "base_model.model.a", "lora_B.bias"),
        ("lone", "", "lone"),
        (".alpha", "", "alpha"),
    ],
)
def test_a_key_is_a_layer_and_a_parameter(key: str, layer: str, parameter: str):
    assert split_key(key) == (layer, parameter)


def test_every_key_is_somewhere():
    keys = ["a.alpha", "a.lora_A.one.weight", "a.lora_A.two.weight", "lone", "b.x"]
    layers = by_name(keys)
    assert layers.keys == {"a": {"alpha": "a.alpha", "lora_down.weight": "a.lora_A.one.weight"}, "b": {"x": "b.x"}}
    assert (layers.bare, layers.twice) == (["lone"], ["a.lora_A.two.weight"])
