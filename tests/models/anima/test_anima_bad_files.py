"""Files that Anima cannot use are refused by name: broken, incomplete, of another kind, or not fitting each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_anima import SmallAnima, SmallFiles, build_small_anima, write_small_anima
from torch import Tensor

from library.core.tensor_file import load_tensors, save_tensors
from library.models.anima.checkpoint import check_files, load_denoiser, load_text_encoder, load_vae
from library.models.sdxl.checkpoint import load_checkpoint

Change = Callable[[dict[str, Tensor]], object]
Load = Callable[..., Any]
FP32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
KINDS: dict[str, Load] = {"dit": load_denoiser, "qwen3": load_text_encoder, "vae": load_vae}


@pytest.fixture(scope="module")
def models() -> SmallAnima:
    return build_small_anima()


@pytest.fixture(scope="module")
def files(models: SmallAnima, tmp_path_factory: pytest.TempPathFactory) -> SmallFiles:
    return write_small_anima(tmp_path_factory.mktemp("anima"), models)


def changed(path: Path, folder: Path, change: Change) -> Path:
    """A copy of the file after `change` of its tensors."""
    tensors = load_tensors(path)
    change(tensors)
    save_tensors(folder / path.name, tensors)
    return folder / path.name


def _drop(*keys: str) -> Change:
    return lambda tensors: [tensors.pop(key) for key in keys]


def _put(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.update({key: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("dit", _drop("net.blocks.1.mlp.layer2.weight"), r"not a complete transformer .*missing tensors: net\.blocks\.1\.mlp"),
        ("dit", _drop("net.final_layer.linear.weight"), r"transformer \(under 'net\.'\) has no tensor 'final_layer\.linear\.weight'"),
        ("dit", _drop("net.llm_adapter.norm.weight"), r"llm adapter: 1 missing tensors: net\.llm_adapter\.norm\.weight"),
        ("dit", _put("net.blocks.0.new.weight", 2), r"transformer: 1 extra tensors: net\.blocks\.0\.new\.weight"),
        ("dit", _put("net.t_embedding_norm.weight", 5), r"misshapen tensors: net\.t_embedding_norm\.weight \[5\] for \[32\]"),
        ("dit", _put("other.weight", 2), r"holds 1 tensors that belong to no part of Anima: other\.weight"),
        ("dit", _put("net.blocks.0.self_attn.q_norm.weight", 7), "32 channels cannot be divided into heads of 7"),
        ("dit", _put("net.x_embedder.proj.1.weight", 32), r"'x_embedder\.proj\.1\.weight' has the shape \[32\]; a matrix was expected"),
        ("dit", _put("net.blocks.0.self_attn.q_norm.weight", 0), r"has no tensor 'blocks\.0\.self_attn\.q_norm\.weight', or an empty one"),
        ("dit", _put("net.proj.weight", 2, dtype=torch.int8), r"holds quantised or integer weights, .*: net\.proj\.weight"),
        ("dit", _put("net.blocks.0.mlp.layer1.scale_weight", 1), r"holds scaled weights; .*: net\.blocks\.0\.mlp\.layer1\.scale_weight"),
        ("qwen3", _drop("norm.weight"), r"not a complete text encoder .*missing tensors: norm\.weight"),
        ("qwen3", _drop("embed_tokens.weight"), r"the text encoder has no tensor 'embed_tokens\.weight'"),
        ("vae", _drop("decoder.middle.1.proj.bias", "conv1.bias"), r"VAE: 2 missing tensors: conv1\.bias, decoder\.middle\.1\.proj\.bias"),
        ("vae", _put("encoder.conv1.weight", 8), r"'encoder\.conv1\.weight' has the shape \[8\]; a convolution in three dimensions"),
        ("vae", _put("encoder.downsamples.0.residual.6.weight"), r"has no tensor 'encoder\.downsamples\.0\.residual\.6\.weight', or an"),
        ("vae", _put("conv2.weight", 8, 8, 1, 1, 1), "has 8 latent channels at 1/8 of the size"),
        ("vae", _drop("encoder.downsamples.2.residual.6.weight"), r"has no tensor 'encoder\..* in level 1 of its encoder"),
    ],
)  # fmt: skip
def test_missing_extra_and_misshapen_tensors_are_named(files: SmallFiles, tmp_path: Path, kind: str, change: Change, said: str):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        KINDS[kind](changed(getattr(files, kind), tmp_path, change), **FP32)


def test_faults_of_all_files_are_said_at_once(files: SmallFiles, tmp_path: Path):
    gone = {
        "dit": ("net.final_layer.adaln_modulation.1.weight", "net.llm_adapter.out_proj.bias"),
        "qwen3": ("layers.1.self_attn.k_norm.weight",),
        "vae": ("decoder.head.0.gamma",),
    }
    paths = {kind: changed(getattr(files, kind), tmp_path, _drop(*keys)) for kind, keys in gone.items()}
    with pytest.raises(ValueError) as error:
        check_files(paths["dit"], paths["qwen3"], paths["vae"])
    said = str(error.value)
    assert all(key in said for keys in gone.values() for key in keys)
    assert all(str(path) in said for path in paths.values())


def test_whole_files_pass_the_check(files: SmallFiles):
    check_files(files.dit, files.qwen3, files.vae)
    check_files(files.dit, files.qwen3, llm_adapter=files.dit)


# Of another kind

OTHERS = [
    ("model.diffusion_model.input_blocks.0.0.weight conditioner.embedders.0.transformer.x", "an SDXL checkpoint; .* sdxl_train_network.py"),
    ("input_blocks.0.0.weight cond_stage_model.transformer.x", "a Stable Diffusion 1.x checkpoint; Anima needs a DiT, a Qwen3-0.6B"),
    ("encoder.down.0.block.0.conv1.weight decoder.mid.attn_1.q.weight", "a VAE of Stable Diffusion .* sdxl_train_network.py"),
    ("encoder.down_blocks.0.resnets.0.conv1.weight encoder.conv_in.weight", "a VAE of Stable Diffusion"),
    ("encoder.downsamples.0.downsamples.0.residual.2.weight", "a Wan 2.2 VAE"),
    ("lora_unet_blocks_0_self_attn_q_proj.lora_down.weight", "an adapter; give adapters to --network_weights"),
    ("diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight", "an adapter"),
    ("lora_unet_blocks_0_mlp_layer1.lokr_w1", "an adapter"),
    ("blocks.0.self_attn.q.weight", "a Wan transformer"),
    ("transformer_blocks.0.img_mod.1.weight", "a Qwen-Image transformer"),
    ("double_blocks.0.img_attn.qkv.weight", "a Stable Diffusion 3, Flux or similar transformer"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 model"),
    ("model.visual.blocks.0.attn.qkv.weight model.layers.0.self_attn.q_proj.weight", "a vision and language model"),
    ("model.layers.0.self_attn.q_proj.weight", "a language model"),
    ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
    ("transformer_blocks.0.norm1.linear_1.weight", "a transformer in diffusers layout; give the folder"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "said"), OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_recognised(tmp_path: Path, kind: str, keys: str, said: str):
    save_tensors(tmp_path / "other.safetensors", {key: torch.zeros(2, 2) for key in keys.split()})
    with pytest.raises(ValueError, match=rf"other\.safetensors: not an? .*it has no tensor '.*'; it seems to be {said}"):
        KINDS[kind](tmp_path / "other.safetensors", **FP32)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("dit", "qwen3", "a Qwen3 text encoder; give it to --qwen3"),
        ("dit", "vae", "a Qwen-Image or Wan 2.1 VAE; give it to --vae"),
        ("qwen3", "dit", "an Anima DiT; give it to --pretrained_model_name_or_path"),
        ("qwen3", "vae", "a Qwen-Image or Wan 2.1 VAE"),
        ("vae", "dit", "an Anima DiT"),
        ("vae", "qwen3", "a Qwen3 text encoder"),
    ],
)
def test_the_models_of_anima_are_told_apart(files: SmallFiles, kind: str, given: str, said: str):
    with pytest.raises(ValueError, match=f"it seems to be {said}"):
        KINDS[kind](getattr(files, given), **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_sdxl_checkpoint_is_refused_by_every_loader(small_sdxl_file: Path, kind: str):
    with pytest.raises(ValueError, match=r"it seems to be an SDXL checkpoint; that is a file for sdxl_train_network\.py"):
        KINDS[kind](small_sdxl_file, **FP32)


def test_sdxl_refuses_every_file_of_anima(files: SmallFiles):
    for path, said in ((files.dit, "an Anima DiT"), (files.qwen3, "a Qwen3 text encoder"), (files.vae, "a Qwen-Image or Wan 2.1 VAE")):
        with pytest.raises(ValueError, match=rf"not an SDXL checkpoint: it seems to be {said}; that is a file for anima_train_network\.py"):
            load_checkpoint(path, **FP32)


def test_an_llm_adapter_alone_is_no_dit(files: SmallFiles, tmp_path: Path):
    for prefix in ("", "llm_adapter."):
        adapter = {
            prefix + key.removeprefix("net.llm_adapter."): tensor for key, tensor in load_tensors(files.dit).items() if "llm_adapter" in key
        }
        save_tensors(tmp_path / "adapter.safetensors", adapter)
        with pytest.raises(ValueError, match="it seems to be an llm adapter; give it to --llm_adapter_path"):
            load_denoiser(tmp_path / "adapter.safetensors", **FP32)


def test_an_llm_adapter_of_another_kind_is_refused(files: SmallFiles):
    with pytest.raises(ValueError, match=r"vae\.safetensors: not an llm adapter: .* seems to be a Qwen-Image"):
        load_denoiser(files.dit, **FP32, llm_adapter=files.vae)


# Broken


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_refused(files: SmallFiles, tmp_path: Path, kind: str):
    (tmp_path / "cut.safetensors").write_bytes(getattr(files, kind).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated"):
        KINDS[kind](tmp_path / "cut.safetensors", **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_refused(tmp_path: Path, kind: str):
    torch.save({"net.x_embedder.proj.1.weight": torch.zeros(4)}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"old\.pth: a PyTorch pickle"):
        KINDS[kind](tmp_path / "old.pth", **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named(kind: str):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors: no such file or folder; models are not downloaded"):
        KINDS[kind]("nowhere.safetensors", **FP32)


# Not fitting each other


def test_a_text_encoder_of_another_width_does_not_fit(files: SmallFiles, tmp_path: Path):
    from transformers import Qwen3Config, Qwen3Model

    sizes: dict[str, Any] = {
        "vocab_size": 9,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    encoder = Qwen3Model(Qwen3Config(hidden_size=48, head_dim=8, **sizes))
    save_tensors(tmp_path / "wide.safetensors", encoder.state_dict())
    with pytest.raises(
        ValueError, match=r"wide\.safetensors: .* the llm adapter reads 32 channels, the text encoder gives 48; Anima's is Qwen3-0.6B"
    ):
        check_files(files.dit, tmp_path / "wide.safetensors")


def test_an_llm_adapter_of_another_width_does_not_fit(models: SmallAnima, files: SmallFiles, tmp_path: Path):
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner

    other = AnimaTextConditioner(source_dim=32, target_dim=16, model_dim=16, num_layers=1, num_attention_heads=2, target_vocab_size=9)
    save_tensors(tmp_path / "adapter.safetensors", other.state_dict())
    with pytest.raises(ValueError, match="the transformer attends to 24 channels, the llm adapter gives 16"):
        load_denoiser(files.dit, **FP32, llm_adapter=tmp_path / "adapter.safetensors")


def test_a_transformer_without_a_channel_for_the_mask_does_not_fit(files: SmallFiles, tmp_path: Path):
    with pytest.raises(ValueError, match="the transformer takes 16 channels; Anima's takes its 16 and a mask"):
        load_denoiser(changed(files.dit, tmp_path, _put("net.x_embedder.proj.1.weight", 32, 64)), **FP32)
