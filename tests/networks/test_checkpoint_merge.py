"""What is merged on disk is what merging into the loaded model gives, bit for bit; the rest of the file stays as it was."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import filled
from torch import Tensor, nn

from library.core.tensor_file import load_tensors, read_header, save_tensors
from library.models.anima.outline import build_denoiser, build_encoder
from library.models.architecture import Models
from library.models.sdxl.checkpoint import load_checkpoint
from networks import loha, lokr, lora
from networks.checkpoint_merge import Merge, merge_into
from networks.network import Network

MODULES = {"lora": lora, "loha": loha, "lokr": lokr}
NAMES = ("unet", "text_encoder_1", "text_encoder_2")
PROJ_IN = "model.diffusion_model.input_blocks.3.1.proj_in.weight"


def create(models: Models, module: Any = lora, size: float = 0.1, text: bool = True, **arguments: Any) -> Network:
    network = module.create_network(1.0, 2, 1.0, None, models.text_encoders if text else [], models.denoiser, **arguments)
    for adapter in network.adapters:
        filled(adapter, size)
    return network


def modules_of(file: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    loaded = load_checkpoint(file, dtype=dtype, device=torch.device("cpu"))
    return {name: getattr(loaded, name) for name in NAMES}


def merge(file: Path, out: Path, *merges: tuple[Network, float], **options: Any) -> list[Merge]:
    """Merge on disk."""
    made = [Merge(members=network.members, strength=strength) for network, strength in merges]
    network = merges[0][0]
    merge_into(file, out, network.naming, network.parts, made, **options)
    return made


def merged_in_memory(file: Path, dtype: torch.dtype, *merges: tuple[Network, float]) -> dict[str, nn.Module]:
    """The loaded models, with the same adapters merged into them: summed in float32, rounded once."""
    modules = modules_of(file, dtype)
    for network, strength in merges:
        for member in network.members:
            name = NAMES[[part.prefix for part in network.naming.parts].index(member.part.prefix)]
            adapter = copy.copy(member.adapter)
            object.__setattr__(adapter, "layer", modules[name].get_submodule(member.target.module_path))
            adapter.multiplier, adapter.is_merged = strength, False
            adapter.merge()
    return modules


def assert_same(file: Path, expected: dict[str, nn.Module], dtype: torch.dtype) -> None:
    for name, module in modules_of(file, dtype).items():
        state = expected[name].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


def half(source: Path, path: Path, dtype: torch.dtype) -> Path:
    save_tensors(path, {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in load_tensors(source).items()})
    return path


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("loha", {}),
    ("lokr", {"factor": 4}),
    ("lora", {"conv_dim": 2}),
    ("lokr", {"conv_dim": 2, "use_tucker": True}),
    ("loha", {"dora_wd": True}),
    ("lokr", {"dora_wd": True, "wd_on_output": False, "conv_dim": 2}),
]


@pytest.mark.parametrize(("module", "arguments"), VARIANTS, ids=lambda value: value if isinstance(value, str) else ",".join(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_on_disk_is_merged_in_memory(
    sdxl: Models, small_sdxl_file: Path, tmp_path: Path, module: str, arguments: dict[str, Any], dtype: torch.dtype
):
    file = half(small_sdxl_file, tmp_path / "base.safetensors", dtype)
    network = create(sdxl, MODULES[module], **arguments)
    merge(file, tmp_path / "merged.safetensors", (network, 0.7))
    assert_same(tmp_path / "merged.safetensors", merged_in_memory(file, dtype, (network, 0.7)), dtype)


def test_several_adapters_of_all_algorithms_are_summed_and_rounded_once(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    file = half(small_sdxl_file, tmp_path / "base.safetensors", torch.bfloat16)
    merges = ((create(sdxl, lora), 0.7), (create(sdxl, loha, conv_dim=2), -0.4), (create(sdxl, lokr, dora_wd=True, text=False), 0.5))
    merge(file, tmp_path / "merged.safetensors", *merges)
    assert_same(tmp_path / "merged.safetensors", merged_in_memory(file, torch.bfloat16, *merges), torch.bfloat16)


def test_what_no_adapter_changes_stays_byte_for_byte(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    network = create(sdxl, text=False, only_patterns="input_blocks.*")
    merge(small_sdxl_file, tmp_path / "merged.safetensors", (network, 1.0))
    before, after = load_tensors(small_sdxl_file), load_tensors(tmp_path / "merged.safetensors")
    assert list(read_header(tmp_path / "merged.safetensors").tensors) == list(read_header(small_sdxl_file).tensors)
    changed = {key for key, tensor in before.items() if raw(tensor) != raw(after[key])}
    assert changed == {f"model.diffusion_model.{member.target.path}.weight" for member in network.members}


def test_an_adapter_of_strength_zero_changes_no_bit(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    merge(small_sdxl_file, tmp_path / "merged.safetensors", (create(sdxl), 0.0))
    after = load_tensors(tmp_path / "merged.safetensors")
    assert all(torch.equal(tensor, after[key]) for key, tensor in load_tensors(small_sdxl_file).items())


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_that_of_all_floating_tensors(sdxl: Models, small_sdxl_file: Path, tmp_path: Path, precision: torch.dtype):
    network = create(sdxl)
    merge(small_sdxl_file, tmp_path / "wide.safetensors", (network, 0.5))
    merge(small_sdxl_file, tmp_path / "merged.safetensors", (network, 0.5), precision=precision)
    wide, merged = load_tensors(tmp_path / "wide.safetensors"), load_tensors(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[key], tensor.to(precision) if tensor.is_floating_point() else tensor) for key, tensor in wide.items())


def test_an_fp8_checkpoint_is_merged_through_float32(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    file = half(small_sdxl_file, tmp_path / "base.safetensors", torch.float8_e4m3fn)
    network = create(sdxl, text=False)
    merge(file, tmp_path / "merged.safetensors", (network, 1.0))
    base, merged = load_tensors(file), load_tensors(tmp_path / "merged.safetensors")
    for member in network.members:
        key = f"model.diffusion_model.{member.target.path}.weight"
        expected = (base[key].float() + member.adapter.delta_weight().view_as(base[key])).to(torch.float8_e4m3fn)
        assert raw(merged[key]) == raw(expected)


def test_values_that_the_dtype_cannot_hold_are_refused(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    network = create(sdxl, size=50.0)
    with pytest.raises(ValueError, match=r"small.safetensors: '.*' would hold .*, which float16 cannot; lower the strengths, or"):
        merge(small_sdxl_file, tmp_path / "merged.safetensors", (network, 100.0), precision=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_the_checkpoint_lacks_are_refused_or_left_out_by_name(
    sdxl: Models, small_sdxl_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    network = create(sdxl)
    base = tmp_path / "base.safetensors"
    save_tensors(base, {key: tensor for key, tensor in load_tensors(small_sdxl_file).items() if key != PROJ_IN})
    with pytest.raises(ValueError, match=r"base.safetensors: lacks 1 of the adapted layers: lora_unet_input_blocks_3_1_proj_in"):
        merge(base, tmp_path / "merged.safetensors", (network, 1.0))
    assert list(tmp_path.iterdir()) == [base]
    merge(base, tmp_path / "merged.safetensors", (network, 1.0), allow_partial=True)
    assert "has no place for 1 adapters, which are left out: lora_unet_input_blocks_3_1_proj_in" in caplog.text


def test_a_failure_halfway_leaves_an_earlier_file_whole(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    out = tmp_path / "merged.safetensors"
    out.write_bytes(b"earlier")
    network = create(sdxl)
    with torch.no_grad():
        next(network.adapters[-1].parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="would hold nan"):
        merge(small_sdxl_file, out, (network, 1.0))
    assert out.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [out]
    merge(small_sdxl_file, out, (create(sdxl), 1.0))
    assert len(read_header(out).tensors) == len(read_header(small_sdxl_file).tensors)


def test_metadata_is_kept_and_hashes_are_made_anew(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    base, out = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_tensors(base, load_tensors(small_sdxl_file), {"modelspec.title": "Base", "modelspec.hash_sha256": "0x1", "sshs_model_hash": "2"})
    merge(base, out, (create(sdxl), 1.0), metadata={"modelspec.merged_from": "Base, a"})
    content = out.read_bytes()
    body = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert read_header(out).metadata == {
        "modelspec.title": "Base",
        "modelspec.merged_from": "Base, a",
        "modelspec.hash_sha256": f"0x{body}",
    }


def test_the_size_of_each_change_is_told(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    network = create(sdxl)
    (made,) = merge(small_sdxl_file, tmp_path / "merged.safetensors", (network, -0.5))
    sizes = []
    for member in network.members:
        layer: Any = member.adapter.layer
        sizes.append(float(0.5 * member.adapter.delta_weight().detach().norm() / layer.weight.norm()))
    assert sorted(made.relative_changes) == pytest.approx(sorted(sizes), rel=1e-5)


def test_a_diffusers_folder_becomes_a_folder(sdxl: Models, small_sdxl_file: Path, tmp_path: Path):
    folder, out = tmp_path / "base", tmp_path / "merged"
    modules: tuple[Any, ...] = (sdxl.denoiser, *sdxl.text_encoders)
    for name, module in zip(("unet", "text_encoder", "text_encoder_2"), modules, strict=True):
        module.save_pretrained(folder / name)
    (folder / "model_index.json").write_text("{}")
    network = create(sdxl, lokr)
    merge(folder, out, (network, 0.7))
    network.set_multiplier(0.7)
    network.merge()
    for name, module in zip(("unet", "text_encoder", "text_encoder_2"), modules, strict=True):
        (file,) = (out / name).glob("*.safetensors")
        stored = load_tensors(file)
        state = module.state_dict()
        assert (out / name / "config.json").is_file()
        assert all(torch.equal(tensor, state[key if key in state else key.removeprefix("text_model.")]) for key, tensor in stored.items())
    assert (out / "model_index.json").is_file() and {path.name for path in tmp_path.iterdir()} == {"base", "merged"}
    with pytest.raises(ValueError, match="merged: exists already; a folder is not overwritten"):
        merge(folder, out, (network, 0.7))


# Another family


ANIMA = {
    "in_channels": 17, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2.0,
    "text_embed_dim": 32, "adaln_lora_dim": 8,
}  # fmt: skip
CONDITIONER = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_attention_heads": 2, "target_vocab_size": 8}
QWEN = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_anima_is_merged_below_every_prefix_and_the_text_encoder_into_its_own_file(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
):
    torch.manual_seed(2)
    denoiser, encoder = build_denoiser(ANIMA, CONDITIONER), build_encoder(QWEN)
    network = lora.create_network(1.0, 2, 1.0, None, encoder, denoiser, train_llm_adapter=True)
    for adapter in network.adapters:
        filled(adapter)
    for part, _ in network.parts:
        path, level = (tmp_path / "dit.safetensors", prefix) if part.is_denoiser else (tmp_path / "qwen.safetensors", "model.")
        own = [member for member in network.members if member.part is part]
        before = {f"{level}{member.target.path}.weight": torch.randn(member.adapter.shape.weight) for member in own}
        save_tensors(path, before | {"other": torch.ones(3)})
        out = path.with_suffix(".merged.safetensors")
        merge(path, out, (network, 0.5), allow_partial=True)
        after = load_tensors(out)
        for member in own:
            key = f"{level}{member.target.path}.weight"
            assert torch.equal(after[key], torch.add(before[key], member.adapter.delta_weight().detach(), alpha=0.5))
        assert torch.equal(after["other"], torch.ones(3)) and len(own) > 6
        assert f"{path} has no place for {len(network.members) - len(own)} adapters" in caplog.text
