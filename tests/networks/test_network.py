"""A network: attached, merged, saved and loaded as a whole; rates; what it says about files for other models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import filled, predict
from torch import nn

from library.core.tensor_file import load_tensors, read_header, save_tensors
from library.models.architecture import Models
from networks import loha, lokr, lora
from networks.network import Network

MODULES = [lora, loha, lokr]


def create(models: Models, module: Any = loha, text: bool = True, **arguments: Any) -> Network:
    encoders = models.text_encoders if text else []
    network = module.create_network(1.0, 2, 1.0, models.vae, encoders, models.denoiser, **arguments)
    for adapter in network.adapters:
        filled(adapter, 0.1)
    return network


def read(models: Models, file: Path, module: Any = loha, **arguments: Any) -> Network:
    return module.create_network_from_weights(1.0, str(file), None, models.text_encoders, models.denoiser, **arguments)[0]


# Acting on the model


@pytest.mark.parametrize("module", MODULES)
def test_a_network_acts_alike_attached_and_merged_and_leaves_no_trace(sdxl: Models, module: Any):
    base = predict(sdxl.denoiser)
    before = {key: value.clone() for key, value in sdxl.denoiser.state_dict().items()}
    network = create(sdxl, module, conv_dim=2).eval()
    network.set_multiplier(0.5)
    network.apply_to(sdxl.text_encoders, sdxl.denoiser)
    attached = predict(sdxl.denoiser)
    assert not torch.allclose(attached, base, atol=1e-3)
    network.merge()
    network.detach()
    torch.testing.assert_close(predict(sdxl.denoiser), attached, rtol=1e-4, atol=1e-4)
    network.unmerge()
    assert torch.equal(predict(sdxl.denoiser), base)
    assert all(torch.equal(value, before[key]) for key, value in sdxl.denoiser.state_dict().items())


def test_the_state_of_a_network_is_the_content_of_its_file(sdxl: Models):
    network = create(sdxl)
    assert set(network.state_dict()) == {f"{a.name}.{key}" for a in network.adapters for key in a.state_dict()}
    assert not any(module in (sdxl.denoiser, *sdxl.denoiser.modules()) for module in network.modules() if module is not network)


def test_the_base_is_not_trained(sdxl: Models):
    network = create(sdxl)
    network.apply_to(sdxl.text_encoders, sdxl.denoiser)
    predict(sdxl.denoiser).square().sum().backward()
    assert all(parameter.grad is None for parameter in sdxl.denoiser.parameters())
    unet = [member.adapter for member in network.members if member.part.is_denoiser]
    assert all(parameter.grad is not None for adapter in unet for parameter in adapter.parameters())


def test_parts_that_are_not_applied_are_dropped(sdxl: Models):
    network = create(sdxl)
    network.apply_to(sdxl.text_encoders, sdxl.denoiser, apply_text_encoder=False)
    assert {key.split("_")[1] for key in network.state_dict()} == {"unet"}
    with pytest.raises(ValueError, match="no adapters remain"):
        network.keep_parts(denoiser=False, text_encoders=True)


def test_the_strength_of_a_merged_network_cannot_be_changed(sdxl: Models):
    network = create(sdxl)
    network.merge()
    with pytest.raises(ValueError, match="unmerge it first"):
        network.set_multiplier(0.5)


def test_merging_without_a_copy_cannot_be_undone(sdxl: Models):
    network = create(sdxl)
    network.merge_to(sdxl.text_encoders, sdxl.denoiser, None, torch.float32, "cpu")
    with pytest.raises(ValueError, match="merged without a kept copy"):
        network.unmerge()


def test_a_packed_weight_is_not_merged_into(sdxl: Models):
    network = create(sdxl)
    layer = network.adapters[0].layer
    layer.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="packed"):
        network.merge()


def test_dropouts_reach_every_adapter(sdxl: Models):
    network = lora.create_network(
        1.0, 2, 1.0, None, None, sdxl.denoiser, neuron_dropout=0.1, rank_dropout=0.2, module_dropout="0.3", dropout=0.1
    )
    assert {(a.dropouts.neuron, a.dropouts.rank, a.dropouts.module) for a in network.adapters} == {(0.1, 0.2, 0.3)}


def test_an_unknown_model_is_refused_with_the_families_there_are():
    with pytest.raises(ValueError, match=r"a Linear of this structure is no model family that Hadron knows \(.*SDXL.*\)"):
        lora.create_network(1.0, 2, 1.0, None, None, nn.Linear(2, 2))


@pytest.mark.parametrize("module", MODULES)
def test_norms_of_deltas_are_bounded(sdxl: Models, module: Any):
    network = create(sdxl, module)
    norms = [float(adapter.direction().norm()) for adapter in network.adapters]
    limit = 1.01 * sorted(norms)[len(norms) // 2]
    shrunk, mean, largest = network.apply_max_norm_regularization(limit)
    found = [float(adapter.direction().norm()) for adapter in network.adapters]
    assert found == pytest.approx([min(norm, limit) for norm in norms], rel=1e-4)
    assert shrunk == sum(norm > limit for norm in norms) > 0
    assert (mean, largest) == pytest.approx((sum(found) / len(found), limit), rel=1e-4)


def test_frozen_deltas_are_not_shrunk(sdxl: Models):
    network = create(sdxl)
    network.parameter_groups(1e-4, None, 0)
    frozen = {member.adapter.name: member.adapter.direction() for member in network.members if not member.part.is_denoiser}
    network.apply_max_norm_regularization(1e-3)
    assert all(
        torch.equal(member.adapter.direction(), frozen[member.adapter.name]) for member in network.members if member.adapter.name in frozen
    )


# Learning rates


def rates(network: Network, **given: Any) -> dict[str, float]:
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(given.get("text"), given.get("unet"), given.get("rate", 1e-4))
    assert sum(len(group["params"]) for group in groups) == len(network.get_trainable_params())
    return dict(zip(names, (group["lr"] for group in groups), strict=True))


def test_parts_have_their_own_rates(sdxl: Models):
    network = create(sdxl)
    assert rates(network) == {"unet": 1e-4, "textencoder 1": 1e-4, "textencoder 2": 1e-4}
    assert rates(network, unet=1e-3, text=[1e-5, 2e-5]) == {"unet": 1e-3, "textencoder 1": 1e-5, "textencoder 2": 2e-5}
    assert rates(network, text=5e-5) == {"unet": 1e-4, "textencoder 1": 5e-5, "textencoder 2": 5e-5}


def test_a_rate_of_zero_freezes_and_is_said(sdxl: Models, caplog: pytest.LogCaptureFixture):
    network = create(sdxl)
    with caplog.at_level("INFO", logger="hadron"):
        assert rates(network, text=[0, 1e-5]) == {"unet": 1e-4, "textencoder 2": 1e-5}
    assert "frozen, because their learning rate is 0: textencoder 1" in caplog.text
    frozen = [member.part.name for member in network.members for p in member.adapter.parameters() if not p.requires_grad]
    assert set(frozen) == {"text encoder 1"}
    assert rates(network) == {"unet": 1e-4, "textencoder 1": 1e-4, "textencoder 2": 1e-4}


def test_all_rates_zero_leave_nothing_to_train(sdxl: Models):
    with pytest.raises(ValueError, match="nothing to train: every learning rate is 0"):
        create(sdxl).parameter_groups(0)


def test_a_wrong_number_of_text_encoder_rates_is_refused(sdxl: Models):
    with pytest.raises(ValueError, match="--text_encoder_lr: 3 rates for 2 text encoders"):
        create(sdxl).parameter_groups(1e-4, None, [1e-4, 1e-4, 1e-4])


@pytest.mark.parametrize(("module", "boosted"), [(lora, "lora_up"), (loha, "hada_w2_a"), (lokr, "lokr_w1")])
def test_lora_plus_boosts_the_documented_factor(sdxl: Models, module: Any, boosted: str):
    network = create(sdxl, module, loraplus_lr_ratio=4, loraplus_unet_lr_ratio="16")
    assert rates(network) == pytest.approx(
        {
            "unet": 1e-4,
            "unet plus": 1.6e-3,
            "textencoder 1": 1e-4,
            "textencoder 1 plus": 4e-4,
            "textencoder 2": 1e-4,
            "textencoder 2 plus": 4e-4,
        }
    )
    plus = next(group for group in network.parameter_groups(1e-4) if group.name == "unet plus")
    expected = [p for m in network.members if m.part.is_denoiser for key, p in m.adapter.named_parameters() if key.startswith(boosted)]
    assert {id(p) for p in plus.parameters} == {id(p) for p in expected}


def test_rates_by_pattern_make_numbered_groups(sdxl: Models):
    network = create(sdxl, text=False, network_reg_lrs=".*attn1.*=1e-5,.*ff.net.*=0")
    assert rates(network) == {"unet": 1e-4, "reg_lr_0": 1e-5}
    assert [group.name for group in network.parameter_groups(None)] == ["unet", "reg_lr_0"]


# Files


@pytest.mark.parametrize("module", MODULES)
def test_a_saved_network_loads_with_no_arguments(sdxl: Models, module: Any, tmp_path: Path):
    network = create(sdxl, module, conv_dim=3, **({"factor": 4} if module is lokr else {}))
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_network_dim": "2"})
    again = read(sdxl, tmp_path / "a.safetensors", lora)
    assert list(again.state_dict()) == list(network.state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())
    other = Network.from_file(tmp_path / "a.safetensors", sdxl.denoiser, sdxl.text_encoders)
    assert [adapter.scale for adapter in other.adapters] == [adapter.scale for adapter in network.adapters]


def test_half_precision_files_keep_alpha_in_float32(sdxl: Models, tmp_path: Path):
    create(sdxl).save_weights(tmp_path / "a.safetensors", torch.float16)
    kinds = {key.split(".")[1]: info.dtype for key, info in read_header(tmp_path / "a.safetensors").tensors.items()}
    assert kinds.pop("alpha") == "F32" and set(kinds.values()) == {"F16"}


def test_hashes_are_of_the_bytes_after_the_header(sdxl: Models, tmp_path: Path):
    import hashlib

    path = tmp_path / "a.safetensors"
    network = create(sdxl)
    network.save_weights(path, None, {"ss_seed": "1", "modelspec.title": "t"})
    content, metadata = path.read_bytes(), read_header(path).metadata
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    network.save_weights(tmp_path / "b.safetensors", None, {"ss_seed": "1", "modelspec.title": "another"})
    again = read_header(tmp_path / "b.safetensors").metadata
    assert [metadata[key] for key in ("sshs_model_hash", "sshs_legacy_hash")] == [
        again[key] for key in ("sshs_model_hash", "sshs_legacy_hash")
    ]
    assert len(metadata["sshs_legacy_hash"]) == 8 and metadata["modelspec.title"] == "t"


def test_only_safetensors_are_written(sdxl: Models, tmp_path: Path):
    with pytest.raises(ValueError, match=r"a.ckpt: adapters are written as .safetensors only"):
        create(sdxl).save_weights(tmp_path / "a.ckpt")


def test_values_that_are_not_finite_are_warned_of(sdxl: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    network = create(sdxl)
    with torch.no_grad():
        next(network.parameters())[0] = float("nan")
    with caplog.at_level("WARNING", logger="hadron"):
        network.save_weights(tmp_path / "a.safetensors")
    assert "1 tensors hold values that are not finite" in caplog.text


def test_values_are_taken_over_from_a_file_with_its_alpha(sdxl: Models, tmp_path: Path):
    create(sdxl).save_weights(tmp_path / "a.safetensors")
    network = loha.create_network(1.0, 2, 2.0, None, sdxl.text_encoders, sdxl.denoiser)
    assert network.load_weights(tmp_path / "a.safetensors") == f"{len(network.members)} adapters"
    assert {adapter.scale for adapter in network.adapters} == {0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": False}, "it adapts lora_te1_text_model_encoder_layers_0_mlp_fc1, .* which the network does not"),
        ({"conv_dim": 2}, "it has nothing for lora_unet_input_blocks_1_0_in_layers_2, .*--dim_from_weights"),
        ({"module": lora}, "it holds LoHa; name its module"),
    ],
)
def test_values_of_a_file_that_does_not_fit_are_refused(sdxl: Models, tmp_path: Path, change: dict[str, Any], words: str):
    create(sdxl).save_weights(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a.safetensors: .*{words}"):
        create(sdxl, **change).load_weights(tmp_path / "a.safetensors")


def test_a_file_of_several_algorithms_is_read_layer_by_layer_and_said(sdxl: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = [create(sdxl, module, text=False).state_dict() for module in MODULES]
    names = list(dict.fromkeys(key.split(".")[0] for key in tensors[0]))
    mixed = {key: value for i, name in enumerate(names) for key, value in tensors[i % 3].items() if key.startswith(f"{name}.")}
    save_tensors(tmp_path / "a.safetensors", mixed)
    with caplog.at_level("INFO", logger="hadron"):
        network = read(sdxl, tmp_path / "a.safetensors", loha)
    assert [adapter.title for adapter in network.adapters[:4]] == ["LoRA", "LoHa", "LoKr", "LoRA"]
    assert "holds LoKr and LoRA, not only LoHa" in caplog.text


def test_arguments_that_the_file_decides_are_said_and_dropouts_kept(sdxl: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    create(sdxl, lokr).save_weights(tmp_path / "a.safetensors")
    with caplog.at_level("WARNING", logger="hadron"):
        network = read(sdxl, tmp_path / "a.safetensors", lokr, factor="8", rank_dropout="0.1", loraplus_lr_ratio="4")
    assert "factor: without effect, the adapter file decides" in caplog.text
    assert network.adapters[0].dropouts.rank == 0.1
    assert "unet plus" in [group.name for group in network.parameter_groups(1e-4)]


def test_text_encoder_adapters_without_a_text_encoder_are_left_out_and_said(sdxl: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    create(sdxl).save_weights(tmp_path / "a.safetensors")
    with caplog.at_level("WARNING", logger="hadron"):
        network = Network.from_file(tmp_path / "a.safetensors", sdxl.denoiser)
    assert all(member.part.is_denoiser for member in network.members)
    assert "36 adapters are left out: no text encoder was given" in caplog.text


def test_names_after_the_class_tree_are_understood(sdxl: Models, tmp_path: Path):
    network = create(sdxl)
    places = {member.adapter.name: f"{member.part.prefix}_{member.target.module_path}".replace(".", "_") for member in network.members}
    renamed = {f"{places[key.split('.', 1)[0]]}.{key.split('.', 1)[1]}": value for key, value in network.state_dict().items()}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in renamed
    save_tensors(tmp_path / "a.safetensors", renamed)
    again = read(sdxl, tmp_path / "a.safetensors")
    assert list(again.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_unet_blocks_0_self_attn_q_proj", "the file seems to be for Anima: "),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "the file seems to be for Stable Diffusion 1 or 2: "),
        ("lora_unet_double_blocks_0_img_attn_proj", "the file seems to be for FLUX: "),
        ("lora_unet_input_blocks_40_1_proj_in", ""),
    ],
)
def test_an_adapter_for_other_layers_is_refused_by_name_and_family(sdxl: Models, tmp_path: Path, name: str, words: str):
    save_tensors(tmp_path / "other.safetensors", {f"{name}.alpha": torch.ones(())})
    told = (
        rf"other.safetensors: {words}1 of 1 adapters are for layers that this SDXL model has not: {name} \(SDXL names look like lora_unet_"
    )
    with pytest.raises(ValueError, match=told):
        read(sdxl, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model": torch.zeros(1)}, "not an adapter: model is not of the form <name>.<parameter>"),
        ({"lora_unet_input_blocks_3_1_proj_in.oft_blocks": torch.zeros(1)}, "proj_in holds oft_blocks, which is not LoHa"),
    ],
)
def test_tensors_of_no_known_algorithm_are_refused(sdxl: Models, tmp_path: Path, tensors: dict[str, torch.Tensor], words: str):
    save_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=words):
        read(sdxl, tmp_path / "a.safetensors")


def test_a_missing_file_is_named(sdxl: Models, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing.safetensors: no such file"):
        Network.from_file(tmp_path / "nothing.safetensors", sdxl.denoiser)


def test_weights_in_hand_come_back_under_canonical_names(sdxl: Models):
    state = create(sdxl).state_dict()
    network, weights = loha.create_network_from_weights(
        0.5, None, None, sdxl.text_encoders, sdxl.denoiser, weights_sd=state, for_inference=True
    )
    assert list(weights) == list(state) and not network.training and network.adapters[0].multiplier == 0.5
    assert network.load_state_dict(weights, False).missing_keys == []


# Full size


def full_size() -> Models:
    """SDXL at full size without memory."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
        )
    return Models(denoiser=unet, text_encoders=[first, second], tokenizers=[], vae=None)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "unet"), [({}, 722), ({"conv_dim": 8}, 788)])
def test_full_size_sdxl_has_the_layers_of_sd_scripts(arguments: dict[str, Any], unet: int):
    models = full_size()
    with torch.device("meta"):
        network = lokr.create_network(1.0, 16, 8, None, models.text_encoders, models.denoiser, **arguments)
    counts = [sum(adapter.name.startswith(prefix) for adapter in network.adapters) for prefix in ("lora_unet_", "lora_te1_", "lora_te2_")]
    assert counts == [unet, 72, 192]
    oracle = Path(__file__).parents[3] / "shared" / "reference" / "keys" / "sdxl_lora_names.json"
    if oracle.is_file():
        wanted = [entry for entry in json.loads(oracle.read_text())["unet"] if arguments or entry["group"] == "default"]
        found = [member for member in network.members if member.part.is_denoiser]
        assert [(m.adapter.name, m.target.path) for m in found] == [(entry["lora_name"], entry["sai_path"]) for entry in wanted]
        assert [m.adapter.shape.weight for m in found] == [tuple(entry["shape"]) for entry in wanted]


def test_the_tensors_of_a_file_survive_a_failed_save(sdxl: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = create(sdxl, text=False)
    path = tmp_path / "a.safetensors"
    network.save_weights(path)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.core.tensor_pack.write_all", full)
    with pytest.raises(ValueError, match="No space left on device"):
        network.save_weights(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert load_tensors(path).keys() == network.state_dict().keys()
