"""SDXL checkpoints: single files in the original layout, of any size, precision and kind of damage."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.core.tensor_file import load_tensors, save_tensors
from library.models.filling import Component, plan
from library.models.sdxl.checkpoint import CONSTANTS, Loaded, load_checkpoint, load_vae, single_file_state_dict
from library.models.sdxl.components import COMPONENTS, TEXT_2, UNET, VAE

CPU = torch.device("cpu")
SHAPES = Path(__file__).parent / "data" / "checkpoint_shapes.json.gz"
Change = Callable[[dict[str, Tensor]], object]


def load(path: Path, dtype: torch.dtype = torch.float32, **more) -> Loaded:
    return load_checkpoint(path, dtype=dtype, device=CPU, **more)


def outputs(models: Any) -> dict[str, Tensor]:
    """What each of the four models answers to one fixed random input."""
    generator = torch.Generator().manual_seed(1)
    noisy, text, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 77, 192), (2, 128)))
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[1024, 768, 0, 16, 1024, 1024]] * 2)}
    ids = torch.randint(0, 500, (2, 77), generator=generator)
    ids[:, 30:] = models.text_encoder_1.config.eos_token_id
    first, second = (encoder(ids, output_hidden_states=True) for encoder in (models.text_encoder_1, models.text_encoder_2))
    return {
        "unet": models.unet(noisy, torch.tensor([10, 900]), encoder_hidden_states=text, added_cond_kwargs=conditions).sample,
        "encode": models.vae.encode(torch.randn((1, 3, 64, 64), generator=generator)).latent_dist.mode(),
        "decode": models.vae.decode(torch.randn((1, 4, 8, 8), generator=generator)).sample,
        "text 1": first.hidden_states[-2],
        "text 2": second.hidden_states[-2],
        "pooled": second.text_embeds,
    }


def changed(path: Path, folder: Path, change: Change) -> Path:
    """A copy of the checkpoint after `change` of its tensors."""
    tensors = load_tensors(path)
    change(tensors)
    copy = folder / "changed.safetensors"
    save_tensors(copy, tensors)
    return copy


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.title)
def test_every_tensor_of_the_real_checkpoint_has_its_place(component: Component):
    shapes = {key: tuple(shape) for key, shape in json.loads(gzip.decompress(SHAPES.read_bytes())).items() if not CONSTANTS.fullmatch(key)}
    mine = {key: shape for key, shape in shapes.items() if key.startswith(component.prefix)}
    planned = plan(component, {key.removeprefix(component.prefix): shape for key, shape in mine.items()})
    state = planned.module.state_dict()
    assert planned.sources.keys() == state.keys()
    places = {component.prefix + source.key: source.form.shape(tuple(state[name].shape)) for name, source in planned.sources.items()}
    assert places == mine


def test_loaded_models_answer_as_the_source_models(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path):
    expected = outputs(small_sdxl_modules)
    for name, answer in outputs(load(small_sdxl_file)).items():
        assert torch.equal(answer, expected[name]), name


def test_loaded_models_answer_as_those_of_the_diffusers_loader(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    small_sdxl_modules.unet.save_config(tmp_path / "unet")
    small_sdxl_modules.vae.save_config(tmp_path / "vae")
    how: dict[str, Any] = {"config": str(tmp_path), "local_files_only": True}
    theirs = SimpleNamespace(**vars(small_sdxl_modules))
    theirs.unet = UNet2DConditionModel.from_single_file(str(small_sdxl_file), subfolder="unet", **how).eval()
    theirs.vae = AutoencoderKL.from_single_file(str(small_sdxl_file), subfolder="vae", **how).eval()
    with torch.no_grad():
        expected, answers = outputs(theirs), outputs(load(small_sdxl_file))
    assert all(torch.equal(answers[name], expected[name]) for name in ("unet", "encode", "decode"))


def test_writing_the_loaded_models_gives_the_file_again(small_sdxl_file: Path):
    again = single_file_state_dict(**vars(load(small_sdxl_file)), dtype=torch.float32)
    tensors = load_tensors(small_sdxl_file)
    assert again.keys() == tensors.keys()
    assert all(again[key].dtype == tensor.dtype and torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_the_file_stores_what_multiplies_the_pooled_state_from_the_right(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path):
    projection = load_tensors(small_sdxl_file)["conditioner.embedders.1.model.text_projection"]
    pooled = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small_sdxl_modules.text_encoder_2.text_projection(pooled), pooled @ projection)


def test_text_encoder_2_computes_openclip_s_residual_blocks(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path):
    prefix = "conditioner.embedders.1.model.transformer.resblocks.0."
    block = {key.removeprefix(prefix): tensor for key, tensor in load_tensors(small_sdxl_file).items() if key.startswith(prefix)}
    attention = nn.MultiheadAttention(128, 2, batch_first=True)
    attention.load_state_dict({key.removeprefix("attn."): tensor for key, tensor in block.items() if key.startswith("attn.")})
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))

    normed = F.layer_norm(x, (128,), block["ln_1.weight"], block["ln_1.bias"])
    middle = x + attention(normed, normed, normed, need_weights=False)[0]
    normed = F.layer_norm(middle, (128,), block["ln_2.weight"], block["ln_2.bias"])
    inner = F.gelu(F.linear(normed, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
    expected = middle + F.linear(inner, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])

    layer = small_sdxl_modules.text_encoder_2.text_model.encoder.layers[0]
    torch.testing.assert_close(layer(x, None), expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tensors_are_cast_from_any_stored_precision(small_sdxl_file: Path, tmp_path: Path, stored: torch.dtype):
    path = changed(small_sdxl_file, tmp_path, lambda t: t.update({key: x.to(stored) for key, x in t.items() if x.is_floating_point()}))
    loaded = load(path, torch.bfloat16)
    assert {parameter.dtype for model in vars(loaded).values() for parameter in model.parameters()} == {torch.bfloat16}
    kept = load_tensors(small_sdxl_file)["model.diffusion_model.out.2.weight"].to(stored).to(torch.bfloat16)
    assert torch.equal(loaded.unet.get_parameter("conv_out.weight"), kept)


def test_a_file_of_mixed_precisions_loads(small_sdxl_file: Path, tmp_path: Path):
    halves = (torch.float16, torch.bfloat16, torch.float32)
    path = changed(
        small_sdxl_file,
        tmp_path,
        lambda t: t.update({k: x.to(halves[n % 3]) for n, (k, x) in enumerate(t.items()) if x.is_floating_point()}),
    )
    assert {parameter.dtype for parameter in load(path).unet.parameters()} == {torch.float32}


def test_the_vae_may_keep_another_precision(small_sdxl_file: Path):
    loaded = load(small_sdxl_file, torch.bfloat16, vae_dtype=torch.float32)
    assert (next(loaded.vae.parameters()).dtype, next(loaded.unet.parameters()).dtype) == (torch.float32, torch.bfloat16)


def test_models_come_frozen_in_eval_mode_with_real_buffers(small_sdxl_file: Path):
    for model in vars(load(small_sdxl_file)).values():
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_tensors_that_carry_nothing_are_ignored(small_sdxl_file: Path, tmp_path: Path):
    names = (
        "model_ema.decay",
        "denoiser.sigmas",
        "alphas_cumprod",
        "betas",
        "conditioner.embedders.0.logit_scale",
        "first_stage_model.loss.logvar",
    )
    path = changed(small_sdxl_file, tmp_path, lambda t: t.update({name: torch.zeros(3) for name in names}))
    assert torch.equal(outputs(load(path))["unet"], outputs(load(small_sdxl_file))["unet"])


def test_ignored_weights_are_said_once(small_sdxl_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = changed(small_sdxl_file, tmp_path, lambda t: t.update({f"model_ema.{n}": torch.zeros(1) for n in range(3)}))
    load(path)
    assert [record.getMessage() for record in caplog.records] == ["the tensors under 'model_ema.' of the checkpoint are ignored"]


def test_a_checkpoint_that_predicts_velocity_is_refused(small_sdxl_file: Path, tmp_path: Path) -> None:
    path = changed(small_sdxl_file, tmp_path, lambda t: t.update({"v_pred": torch.zeros(0)}))
    with pytest.raises(ValueError, match="predicts velocity .*'v_pred'"):
        load(path)


def test_a_projection_written_as_a_linear_is_not_transposed(small_sdxl_file: Path, tmp_path: Path):
    key = "conditioner.embedders.1.model.text_projection"
    path = changed(small_sdxl_file, tmp_path, lambda t: t.update({key + ".weight": t.pop(key).t().contiguous()}))
    assert torch.equal(outputs(load(path))["pooled"], outputs(load(small_sdxl_file))["pooled"])


def _drop(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _drop("model.diffusion_model.middle_block.1.proj_in.weight"),
            "missing tensors: model.diffusion_model.middle_block.1.proj_in.weight",
        ),
        (_drop("model.diffusion_model.out.2.weight"), "no tensor 'out.2.weight'"),
        (_drop("first_stage_model.decoder.mid.attn_1.q.bias"), "missing tensors: first_stage_model.decoder.mid.attn_1.q.bias"),
        (lambda t: t.update({"model.diffusion_model.new.weight": torch.zeros(2)}), "extra tensors: model.diffusion_model.new.weight"),
        (lambda t: t.update({"something.else": torch.zeros(2)}), "belong to no part of SDXL: something.else"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}), r"model.diffusion_model.out.2.bias \[5\] for \[4\]"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int8)}), "quantised .*out.2.bias"),
        (
            _drop("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"),
            "text encoder 1: 1 missing .*final_layer_norm.weight",
        ),
        (_drop("conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"), "resblocks.2.attn.in_proj_weight"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(small_sdxl_file: Path, tmp_path: Path, change: Change, said: str):
    with pytest.raises(ValueError, match=said):
        load(changed(small_sdxl_file, tmp_path, change))


def test_faults_of_all_parts_are_said_at_once(small_sdxl_file: Path, tmp_path: Path):
    gone = ("model.diffusion_model.out.0.bias", "first_stage_model.decoder.conv_in.bias", "conditioner.embedders.1.model.ln_final.bias")
    with pytest.raises(ValueError) as error:
        load(changed(small_sdxl_file, tmp_path, lambda t: [t.pop(key) for key in gone]))
    assert all(key in str(error.value) for key in gone)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("net.blocks.0.adaln_modulation_self_attn.1.weight", "an Anima DiT; that is a file for anima_train_network.py"),
        ("llm_adapter.blocks.0.norm.weight", "an llm adapter; .* anima_train_network.py"),
        ("model.diffusion_model.input_blocks.0.0.weight cond_stage_model.transformer.text_model.x", "Stable Diffusion 1.x"),
        ("model.diffusion_model.input_blocks.0.0.weight cond_stage_model.model.x", "Stable Diffusion 2.x"),
        ("model.diffusion_model.label_emb.0.0.weight conditioner.embedders.0.model.ln_final.bias", "an SDXL refiner"),
        ("lora_unet_input_blocks_1_0.lora_down.weight", "an adapter"),
        ("lora_unet_x.hada_w1_a", "an adapter"),
        ("lora_unet_x.lokr_w1", "an adapter"),
        ("unet.down_blocks.0.lora_A.weight", "an adapter"),
        ("encoder.down.0.block.0.conv1.weight decoder.mid.attn_1.q.weight", "a VAE .*--vae"),
        ("encoder.downsamples.0.residual.0.gamma", "Qwen-Image .* anima_train_network.py"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers layout"),
        ("model.diffusion_model.input_blocks.0.0.weight model.diffusion_model.label_emb.0.0.weight", "U-Net without its text encoders"),
        ("model.diffusion_model.input_blocks.0.0.weight first_stage_model.encoder.down.0.x", "U-Net without its text encoders"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model"),
        ("model.layers.0.self_attn.q_norm.weight", "a Qwen3 text encoder"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
    ],
)
def test_a_file_of_another_kind_is_recognised(tmp_path: Path, keys: str, said: str):
    save_tensors(tmp_path / "other.safetensors", {key: torch.zeros(2, 2) for key in keys.split()})
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "other.safetensors")


def test_a_truncated_file_is_refused(small_sdxl_file: Path, tmp_path: Path):
    (tmp_path / "cut.safetensors").write_bytes(small_sdxl_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated"):
        load(tmp_path / "cut.safetensors")


def test_a_pickle_is_refused(tmp_path: Path):
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="pickle"):
        load(tmp_path / "old.ckpt")


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.safetensors"):
        load(Path("nowhere.safetensors"))


# Pruned relatives


def _shrunk(small_sdxl_modules: SimpleNamespace, **config: Any) -> SimpleNamespace:
    from diffusers import UNet2DConditionModel

    names = (
        "block_out_channels layers_per_block down_block_types up_block_types transformer_layers_per_block attention_head_dim "
        "cross_attention_dim use_linear_projection addition_embed_type addition_time_embed_dim projection_class_embeddings_input_dim"
    )
    given = {name: small_sdxl_modules.unet.config[name] for name in names.split()} | config
    unet = UNet2DConditionModel(**given).eval().requires_grad_(False)
    return SimpleNamespace(**vars(small_sdxl_modules) | {"unet": unet})


@pytest.mark.parametrize(
    "config",
    [
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {"layers_per_block": 2},
        {"layers_per_block": (1, 2, 1)},
        {"transformer_layers_per_block": [1, [2], 3], "reverse_transformer_layers_per_block": [[2, 3], [1, 4], 1]},
        {"use_linear_projection": False},
        {"time_embedding_dim": 96},
        {
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (64, 64, 32),
            "mid_block_type": None,
        },
    ],
    ids=str,
)
def test_relatives_of_other_structure_load_by_the_same_rules(small_sdxl_modules: SimpleNamespace, tmp_path: Path, config: dict):
    modules = _shrunk(small_sdxl_modules, **config)
    save_tensors(tmp_path / "relative.safetensors", single_file_state_dict(**vars(modules), dtype=torch.float32))
    assert torch.equal(outputs(load(tmp_path / "relative.safetensors"))["unet"], outputs(modules)["unet"])


def test_attention_at_a_width_without_whole_heads_is_refused():
    shapes = {"input_blocks.1.0.out_layers.3.weight": (96, 96, 3, 3), "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (96, 96)}
    with pytest.raises(ValueError, match="attention at width 96"):
        plan(UNET, shapes)


def test_a_text_encoder_of_another_width_does_not_fit(small_sdxl_modules: SimpleNamespace, tmp_path: Path):
    modules = _shrunk(small_sdxl_modules, cross_attention_dim=256)
    save_tensors(tmp_path / "misfit.safetensors", single_file_state_dict(**vars(modules), dtype=torch.float32))
    with pytest.raises(ValueError, match="attends to 256 channels of text, the encoders give 192"):
        load(tmp_path / "misfit.safetensors")


# VAE files and folders


def _vae_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    return {prefix + key.removeprefix(VAE.prefix): tensor for key, tensor in load_tensors(path).items() if key.startswith(VAE.prefix)}


@pytest.mark.parametrize("layout", ["bare", "prefixed", "whole checkpoint", "diffusers file", "diffusers folder", "diffusers root"])
def test_a_separate_vae_loads_from_every_layout(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, layout: str):
    path = tmp_path / "vae.safetensors"
    if layout in ("bare", "prefixed"):
        save_tensors(path, _vae_tensors(small_sdxl_file, "" if layout == "bare" else VAE.prefix))
    elif layout == "diffusers file":
        save_tensors(path, small_sdxl_modules.vae.state_dict())
    elif layout == "whole checkpoint":
        path = small_sdxl_file
    else:
        path = tmp_path
        small_sdxl_modules.vae.save_pretrained(path / "vae" if layout == "diffusers root" else path)
    state = load_vae(path, dtype=torch.float32, device=CPU).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in small_sdxl_modules.vae.state_dict().items())


def test_a_given_vae_replaces_that_of_the_checkpoint(small_sdxl_file: Path, tmp_path: Path):
    tensors = _vae_tensors(small_sdxl_file, "")
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + 1
    save_tensors(tmp_path / "vae.safetensors", tensors)
    replaced, kept = (outputs(load(small_sdxl_file, vae=vae))["decode"] for vae in (tmp_path / "vae.safetensors", None))
    torch.testing.assert_close(replaced, kept + 1)


def test_a_checkpoint_without_vae_asks_for_one(small_sdxl_file: Path, tmp_path: Path):
    path = changed(small_sdxl_file, tmp_path, lambda t: [t.pop(key) for key in list(t) if key.startswith(VAE.prefix)])
    with pytest.raises(ValueError, match="has no VAE .*--vae"):
        load(path)
    assert load(path, vae=small_sdxl_file).vae is not None


def test_a_vae_with_other_latents_does_not_fit(small_sdxl_file: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=16)
    save_tensors(tmp_path / "vae.safetensors", vae.state_dict())
    with pytest.raises(ValueError, match="takes 4 channels, the VAE gives 16"):
        load(small_sdxl_file, vae=tmp_path / "vae.safetensors")


def test_a_file_that_is_no_vae_is_refused(tmp_path: Path):
    save_tensors(tmp_path / "qwen.safetensors", {"encoder.downsamples.0.residual.0.gamma": torch.zeros(4)})
    with pytest.raises(ValueError, match="not a VAE of SDXL.*Qwen-Image"):
        load_vae(tmp_path / "qwen.safetensors", dtype=torch.float32, device=CPU)


@pytest.fixture
def small_sdxl_folder(small_sdxl_modules: SimpleNamespace, tmp_path: Path) -> Path:
    """The tiny model as diffusers and transformers save it."""
    folders = {"unet": "unet", "vae": "vae", "text_encoder_1": "text_encoder", "text_encoder_2": "text_encoder_2"}
    for name, folder in folders.items():
        vars(small_sdxl_modules)[name].save_pretrained(tmp_path / folder)
    return tmp_path


def test_a_diffusers_folder_answers_as_the_single_file(small_sdxl_folder: Path, small_sdxl_file: Path):
    expected = outputs(load(small_sdxl_file))
    for name, answer in outputs(load(small_sdxl_folder)).items():
        assert torch.equal(answer, expected[name]), name


def test_a_folder_in_shards_and_half_precision_names_loads(small_sdxl_folder: Path, small_sdxl_file: Path):
    whole = small_sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = list(load_tensors(whole).items())
    whole.unlink()
    for n, part in enumerate((tensors[:20], tensors[20:]), start=1):
        save_tensors(whole.with_name(f"diffusion_pytorch_model.fp16-{n:05d}-of-00002.safetensors"), dict(part))
    assert torch.equal(outputs(load(small_sdxl_folder))["unet"], outputs(load(small_sdxl_file))["unet"])


def test_a_folder_with_the_legacy_end_token_pools_at_the_first_end(small_sdxl_folder: Path, small_sdxl_file: Path):
    path = small_sdxl_folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    assert torch.equal(outputs(load(small_sdxl_folder))["pooled"], outputs(load(small_sdxl_file))["pooled"])


def test_a_folder_without_a_part_is_refused(small_sdxl_folder: Path):
    (small_sdxl_folder / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"text_encoder_2.config\.json: no such file"):
        load(small_sdxl_folder)


def test_a_folder_of_another_vae_scale_does_not_fit(small_sdxl_folder: Path):
    path = small_sdxl_folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.18215}))
    with pytest.raises(ValueError, match=r"scales its latents by 0\.18215"):
        load(small_sdxl_folder)


def test_only_the_second_encoder_has_a_projection(small_sdxl_file: Path):
    assert [name for name in single_file_state_dict(**vars(load(small_sdxl_file)), dtype=torch.float16) if "projection" in name] == [
        TEXT_2.prefix + "text_projection"
    ]
