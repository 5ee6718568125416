"""Places of Anima: the keys of the original files, whichever class tree the denoiser has, and those of a diffusers folder."""

from pathlib import Path

import pytest
import torch
from torch import nn

from library.core.tensor_file import read_header
from library.models.anima.names import DIT, NAMING, TEXT
from library.models.anima.outline import build_denoiser, build_encoder
from library.models.naming import Place

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "models" / "anima_dit_weights.safetensors"
DIT_SIZE = {
    "in_channels": 17, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2.0,
    "text_embed_dim": 32, "adaln_lora_dim": 8,
}  # fmt: skip
CONDITIONER_SIZE = {
    "source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_attention_heads": 2, "target_vocab_size": 8,
}  # fmt: skip
TEXT_SIZE = {
    "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
SOME = {  # module path in the wrapper -> path in the original
    "transformer.patch_embed.proj": "x_embedder.proj.1",
    "transformer.time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "transformer.time_embed.norm": "t_embedding_norm",
    "transformer.transformer_blocks.1.attn1.to_q": "blocks.1.self_attn.q_proj",
    "transformer.transformer_blocks.1.attn2.to_out.0": "blocks.1.cross_attn.output_proj",
    "transformer.transformer_blocks.1.attn2.norm_k": "blocks.1.cross_attn.k_norm",
    "transformer.transformer_blocks.0.norm2.linear_2": "blocks.0.adaln_modulation_cross_attn.2",
    "transformer.transformer_blocks.0.ff.net.0.proj": "blocks.0.mlp.layer1",
    "transformer.transformer_blocks.0.ff.net.2": "blocks.0.mlp.layer2",
    "transformer.norm_out.linear_1": "final_layer.adaln_modulation.1",
    "transformer.proj_out": "final_layer.linear",
    "text_conditioner.blocks.0.cross_attn.q_proj": "llm_adapter.blocks.0.cross_attn.q_proj",
    "text_conditioner.out_proj": "llm_adapter.out_proj",
}


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    return build_denoiser(DIT_SIZE, CONDITIONER_SIZE)


def keys(place: Place) -> set[str]:
    return {place.key, *(other.key for other in place.others)}


def test_layers_stand_under_their_original_paths_below_any_known_prefix(denoiser: nn.Module):
    places = NAMING.places(DIT, denoiser)
    for module_path, path in SOME.items():
        found = keys(places[f"{module_path}.weight"])
        assert {f"net.{path}.weight", f"model.diffusion_model.{path}.weight", f"{path}.weight"} <= found
        assert f"{module_path.replace('.', '/', 1)}.weight" in found, "the component's folder in diffusers layout"


def test_every_weight_and_bias_has_a_place_of_its_own(denoiser: nn.Module):
    for part, module in ((DIT, denoiser), (TEXT, build_encoder(TEXT_SIZE))):
        places = NAMING.places(part, module)
        assert set(places) == {name for name in module.state_dict() if name.rpartition(".")[2] in ("weight", "bias")}
        assert len({place.key for place in places.values()}) == len(places)


def test_diffusers_transformer_alone_has_the_same_places(denoiser: nn.Module):
    alone = NAMING.places(DIT, denoiser.get_submodule("transformer"))
    inside = NAMING.places(DIT, denoiser)
    assert all(keys(place) == keys(inside[f"transformer.{name}"]) for name, place in alone.items())


def test_the_text_encoder_stands_bare_or_below_model():
    places = NAMING.places(TEXT, build_encoder(TEXT_SIZE))
    found = keys(places["layers.0.self_attn.q_proj.weight"])
    assert {f"{prefix}layers.0.self_attn.q_proj.weight" for prefix in ("", "model.", "text_encoder/", "text_encoder/model.")} <= found


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden data of the workshop are not here")
def test_the_golden_file_has_every_place_and_no_other_parameter():
    stored = {key: info.shape for key, info in read_header(GOLDEN).tensors.items() if "pos_embedder" not in key}
    part, module = NAMING.outline(GOLDEN)[0]
    places = NAMING.places(part, module)
    assert {place.key for place in places.values()} == set(stored)
    state = module.state_dict()
    assert all(place.view(torch.empty(stored[place.key])).shape == state[name].shape for name, place in places.items())
