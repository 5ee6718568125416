"""The real lycoris-lora, peft and diffusers read our exports and compute the same change."""

import copy
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from adapter_cases import filled, relative_error
from export_cases import CASES, NAME, Model, case_named, network_of, output_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks.canonical_view import canonical_view
from networks.export import Export, Wishes, export, write_export
from networks.lokr import LoKr, Split
from networks.network import Network

ALGORITHMS = {"lora": {}, "loha": {}, "lokr": {"factor": 4}}
AS_LORA = Wishes(as_lora=True)


def export_case(key: str, target: str, is_refused: bool) -> Export | None:
    """The export of a case; of one that the target cannot be told, once it is refused, that of its LoRA, or None where no LoRA helps."""
    network = network_of(case_named(key)[0])
    if not is_refused:
        return export(network, target)
    with pytest.raises(ValueError, match=f"--to {target}: .* cannot be told .*--(as_lora|to)"):
        export(network, target)
    return None if "grouped" in key and target == "peft" else export(network, target, wishes=AS_LORA)


@pytest.mark.parametrize("key", CASES)
def test_lycoris_computes_the_same(key: str):
    modules = pytest.importorskip("lycoris.modules")
    exported = export_case(key, "lycoris", "dora-in" in key)
    assert exported is not None
    adapter, x = case_named(key)
    kind, parameters = modules.get_module(exported.tensors, NAME)
    module = modules.make_module(kind, parameters, NAME, adapter.layer.double()).double().eval()
    assert output_error(module, adapter.float(), x) < 1e-5


def peft_has_not(key: str) -> bool:
    algorithm, mode, *kind = key.split("-")
    has_dora = "dora" in key or mode == "all"
    if algorithm == "LoRA":
        return "dora-in" in key or "grouped" in key
    whole_conv1d = algorithm == "LoKr" and mode == "8" and kind == ["conv1d"]
    return has_dora or "conv3d" in key or whole_conv1d or (mode == "unbalanced" and "conv3x3" in key)


@pytest.mark.parametrize("key", CASES)
def test_peft_computes_the_same(key: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    exported = export_case(key, "peft", peft_has_not(key))
    if exported is None:
        return
    write_export(tmp_path / "adapter", exported)
    adapter, x = case_named(key)
    model = peft.PeftModel.from_pretrained(Model(copy.deepcopy(adapter.layer)), tmp_path / "adapter").double().eval()
    assert output_error(model, adapter, x) < 1e-5


@st.composite
def lokrs(draw: st.DrawFn) -> LoKr:
    """A LoKr with factors of any sides and ranks, as no training makes them, on a Linear or Conv2d."""
    a, b, c, d = (draw(st.integers(1, 7)) for _ in range(4))
    kernel = draw(st.sampled_from([None, (1, 1), (3, 2)]))
    layer: nn.Module = nn.Linear(b * d, a * c) if kernel is None else nn.Conv2d(b * d, a * c, kernel)
    rank1, rank2 = draw(st.sampled_from([None, 1, 2, 3])), draw(st.sampled_from([None, 1, 2, 3]))
    split = Split(a=a, b=b, c=c, d=d, rank1=rank1, rank2=rank2)
    adapter = LoKr(NAME, layer.requires_grad_(False), split=split, rank=rank2 or rank1 or 2, alpha=3)
    return filled(adapter, 1.0).eval()  # pyright: ignore[reportReturnType]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(lokrs())
def test_lycoris_and_peft_read_a_lokr_of_any_split(adapter: LoKr):
    modules, peft = pytest.importorskip("lycoris.modules"), pytest.importorskip("peft")
    expected = adapter.delta_weight()
    exported = export(network_of(adapter), "lycoris")
    kind, parameters = modules.get_module(exported.tensors, NAME)
    module = modules.make_module(kind, parameters, NAME, adapter.layer)
    x = torch.randn(2, adapter.shape.inner, *(5 for _ in adapter.shape.kernel), generator=torch.Generator().manual_seed(0))
    reference = adapter.shape.apply(x, expected)
    assert relative_error(module(x) - adapter.layer.forward(x), reference) < 1e-4
    try:
        exported = export(network_of(adapter), "peft")
    except ValueError as error:
        assert "LoKr split by factors" in str(error)
        return
    with TemporaryDirectory() as folder:
        write_export(Path(folder) / "adapter", exported)
        model = peft.PeftModel.from_pretrained(Model(copy.deepcopy(adapter.layer)), Path(folder) / "adapter")
    assert relative_error(model.base_model.model.m.get_delta_weight("default"), expected) < 1e-5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_diffusers_pipeline_loads_every_layer(sdxl: Any, algorithm: str, tmp_path: Path):
    lora = pytest.importorskip("peft.tuners.lora")
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    members = sdxl.members(algorithm, part=None, **ALGORITHMS[algorithm])
    write_export(tmp_path / "a.safetensors", export(Network(members, sdxl.naming, sdxl.parts), "diffusers"))
    models = [copy.deepcopy(module) for _, module in sdxl.parts]
    pipeline = StableDiffusionXLPipeline(None, models[1], models[2], None, None, models[0], EulerDiscreteScheduler())  # pyright: ignore[reportArgumentType]
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="ours")
    for member in members:
        model = models[sdxl.naming.parts.index(member.part)]
        layer = model.get_submodule(member.target.module_path)
        assert isinstance(layer, lora.LoraLayer), member.target.name
        assert relative_error(layer.get_delta_weight("ours"), member.adapter.delta_weight()) < 1e-5
    found = sum(isinstance(module, lora.LoraLayer) for model in models for module in model.modules())
    assert found == len(members)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_diffusers_loads_both_models_of_anima(anima: Any, algorithm: str, tmp_path: Path):
    lora = pytest.importorskip("peft.tuners.lora")
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    members = anima.members(algorithm, **ALGORITHMS[algorithm])
    write_export(tmp_path / "a.safetensors", export(Network(members, anima.naming, anima.parts), "diffusers"))
    denoiser: nn.Module = copy.deepcopy(anima.parts[0][1])
    loader = loaders.AnimaLoraLoaderMixin
    state = loader.lora_state_dict(str(tmp_path), weight_name="a.safetensors")
    loader.load_lora_into_transformer(state, denoiser.get_submodule("transformer"), adapter_name="ours")
    loader.load_lora_into_text_conditioner(state, denoiser.get_submodule("text_conditioner"), adapter_name="ours")
    for member in members:
        layer: Any = denoiser.get_submodule(member.target.module_path)
        assert isinstance(layer, lora.LoraLayer), member.target.name
        assert relative_error(layer.get_delta_weight("ours"), member.adapter.delta_weight()) < 1e-5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_peft_loads_each_component_from_its_folder(sdxl: Any, algorithm: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    members = sdxl.members(algorithm, part=None, **ALGORITHMS[algorithm])
    write_export(tmp_path / "adapter", export(Network(members, sdxl.naming, sdxl.parts), "peft"))
    for (part, module), folder in zip(sdxl.parts, ("unet", "text_encoder", "text_encoder_2"), strict=True):
        model = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "adapter" / folder)
        for member in members:
            if member.part is part:
                layer = model.base_model.model.get_submodule(member.target.module_path)
                assert relative_error(layer.get_delta_weight("default"), member.adapter.delta_weight()) < 1e-5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lycoris_makes_a_module_of_every_layer(sdxl: Any, algorithm: str, monkeypatch: pytest.MonkeyPatch):
    kohya = pytest.importorskip("lycoris.kohya")
    members = sdxl.members(algorithm, part=None, **ALGORITHMS[algorithm])
    exported = export(Network(members, sdxl.naming, sdxl.parts), "lycoris")
    views = [canonical_view(sdxl.naming, part, copy.deepcopy(module)) for part, module in sdxl.parts]
    monkeypatch.setattr(kohya.LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    network, _ = kohya.create_network_from_weights(1.0, None, None, views[1:], views[0], weights_sd=exported.tensors)
    made = {module.lora_name for module in network.unet_loras + network.text_encoder_loras}
    assert made == {member.target.name for member in members}


def test_lycoris_wrapper_makes_a_module_of_every_layer(sdxl: Any):
    wrapper = pytest.importorskip("lycoris.wrapper")
    members = sdxl.members("loha")
    exported = export(Network(members, sdxl.naming, sdxl.parts), "lycoris", wishes=Wishes(standalone=True))
    unet = copy.deepcopy(sdxl.parts[0][1])
    network, _ = wrapper.create_lycoris_from_weights(1.0, None, unet, weights_sd=exported.tensors)
    assert len(network.loras) == len(members)


def test_a_lora_baked_from_dora_is_the_whole_change():
    adapter, _ = case_named("LoKr-dora-conv3x3")
    exported = export(network_of(adapter), "diffusers")
    up, down = exported.tensors["unet.m.lora_B.weight"], exported.tensors["unet.m.lora_A.weight"]
    change = (up.flatten(1) @ down.flatten(1)).reshape(adapter.shape.weight)
    assert relative_error(change, adapter.delta_weight()) < 1e-5
