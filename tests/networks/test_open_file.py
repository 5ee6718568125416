"""Any adapter file as a network, without a model at hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from library.core.tensor_file import save_tensors
from library.models.anima.names import DIT
from library.models.anima.names import NAMING as ANIMA
from networks import lora
from networks.open_file import open_adapter


def adapter_file(path: Path, layers: dict[str, tuple[int, int]]) -> Path:
    """A LoRA on these layers: name -> (out, in)."""
    tensors: dict[str, Tensor] = {}
    for name, (out, inner) in layers.items():
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, inner), f"{name}.lora_up.weight": torch.ones(out, 2)}
    save_tensors(path, tensors)
    return path


def test_a_network_of_the_size_that_a_base_checkpoint_says(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path):
    encoders = [small_sdxl_modules.text_encoder_1, small_sdxl_modules.text_encoder_2]
    network = lora.create_network(1.0, 2, 1.0, None, encoders, small_sdxl_modules.unet)
    network.save_weights(tmp_path / "a.safetensors")
    found = open_adapter(tmp_path / "a.safetensors", base=small_sdxl_file)
    assert found.naming.name == "sdxl" and list(found.state_dict()) == list(network.state_dict())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in found.state_dict().items())
    assert all(member.adapter.layer.weight.is_meta for member in found.members)


def test_an_anima_file_is_told_by_its_names(small_anima_modules: SimpleNamespace, tmp_path: Path):
    denoiser: nn.Module = small_anima_modules.denoiser
    targets = [*ANIMA.targets(DIT, denoiser), *ANIMA.outside(DIT, denoiser)]
    state = {f"net.{t.path}.{kind}": f"{t.module_path}.{kind}" for t in targets for kind in ("weight", "bias")}
    own = denoiser.state_dict()
    save_tensors(tmp_path / "base.safetensors", {key: own[place] for key, place in state.items() if place in own})
    path = adapter_file(
        tmp_path / "a.safetensors", {"diffusion_model.blocks.0.cross_attn.k_proj": (32, 24), "lora_te1_layers_3_mlp_up_proj": (3072, 1024)}
    )
    found = open_adapter(path, base=tmp_path / "base.safetensors")
    assert [member.target.name for member in found.members] == ["lora_unet_blocks_0_cross_attn_k_proj", "lora_te_layers_3_mlp_up_proj"]


def test_at_full_size_without_a_base(tmp_path: Path):
    path = adapter_file(tmp_path / "a.safetensors", {"lora_unet_input_blocks_4_1_proj_in": (640, 640), "unet.conv_out": (4, 320 * 9)})
    found = open_adapter(path)
    assert [member.target.path for member in found.members] == ["input_blocks.4.1.proj_in", "out.2"]
    with pytest.raises(
        ValueError, match=r"a.safetensors: the file seems to be for SDXL: 2 of 2 adapters are for layers that this Anima model has not: "
    ):
        open_adapter(path, family="anima")


def test_what_does_not_fit_can_be_skipped(tmp_path: Path):
    path = adapter_file(
        tmp_path / "a.safetensors", {"lora_unet_input_blocks_4_1_proj_in": (640, 640), "lora_unet_input_blocks_99_x": (4, 4)}
    )
    with pytest.raises(ValueError, match="lora_unet_input_blocks_99_x"):
        open_adapter(path)
    assert len(open_adapter(path, allow_partial=True).members) == 1


@pytest.mark.parametrize("allow_partial", [False, True])
def test_an_adapter_of_a_smaller_model_is_refused_once_with_the_option_to_give(tmp_path: Path, allow_partial: bool):
    names = [f"lora_te1_text_model_encoder_layers_{number}_mlp_fc1" for number in range(12)]
    names += [f"lora_te2_text_model_encoder_layers_{number}_mlp_fc1" for number in range(12)]
    path = adapter_file(tmp_path / "a.safetensors", dict.fromkeys(names, (16, 8)))
    with pytest.raises(ValueError, match=r"a.safetensors: .* and \d+ more \(SDXL was taken at full size; give the checkpoint .* --base"):
        open_adapter(path, allow_partial=allow_partial)


def test_a_file_of_no_known_family_is_refused_with_the_families_there_are(tmp_path: Path):
    path = adapter_file(tmp_path / "a.safetensors", {"lora_unet_double_blocks_0_img_attn_proj": (4, 4)})
    with pytest.raises(ValueError, match=r"a.safetensors: .*anima \(Anima\), sdxl \(SDXL\): .* it seems to be for FLUX"):
        open_adapter(path)
    with pytest.raises(ValueError, match="unknown model family 'flux'"):
        open_adapter(path, family="flux")


def test_a_file_whose_names_do_not_tell_the_family_is_refused_with_what_to_give(tmp_path: Path):
    path = adapter_file(tmp_path / "a.safetensors", {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (3072, 768)})
    with pytest.raises(ValueError, match=r"a.safetensors: not an adapter of a known family.*give its family \(--family\)"):
        open_adapter(path)
    assert [member.part.name for member in open_adapter(path, family="sdxl").members] == ["text encoder 1"]
