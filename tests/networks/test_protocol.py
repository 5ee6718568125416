"""Network modules of others: found, wrapped once, named canonically, saved atomically."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_cases import predict
from torch import nn

from library.core.tensor_file import load_tensors
from library.models.architecture import Models, architecture_named
from networks.network import Network
from networks.protocol import ForeignNetwork, NetworkRequest, TrainableNetwork, build_network, load_network_module, network_modules


def test_a_misspelt_name_of_sd_scripts_is_answered_with_it() -> None:
    with pytest.raises(ValueError, match="did you mean 'networks.lora_anima'"):
        load_network_module("networks.lora_anmia")


def test_our_modules_are_found():
    assert network_modules() == ["networks.loha", "networks.lokr", "networks.lora"]
    assert load_network_module("networks.loha").__name__ == "networks.loha"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("networks.lohaa", "--network_module networks.lohaa: no such module; did you mean 'networks.loha'?"),
        ("lokr", "did you mean 'networks.lokr'?"),
        ("networks.base", "--network_module networks.base: has no create_network; there are networks.loha, networks.lokr, networks.lora"),
    ],
)
def test_a_module_that_is_none_is_refused(name: str, words: str):
    with pytest.raises(ValueError, match="network_module") as caught:
        load_network_module(name)
    assert words in str(caught.value)


def test_a_module_that_lacks_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "needs_more.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="it needs the package 'no_such_package_anywhere', which is not installed"):
        load_network_module("needs_more")


@pytest.mark.parametrize("name", ["networks.lora", "networks.loha", "networks.lokr"])
def test_our_networks_are_built_as_they_are(sdxl: Models, name: str, tmp_path: Path):
    module = load_network_module(name)
    network = build_network(module, NetworkRequest(models=sdxl, dim=2, alpha=1.0, dropout=0.1, arguments={"conv_dim": "2"}))
    assert isinstance(network, Network) and network.adapters[0].dropouts.neuron == 0.1
    network.save_weights(tmp_path / "a.safetensors")
    again = build_network(module, NetworkRequest(models=sdxl, dropout=0.2, weights=tmp_path / "a.safetensors"))
    assert isinstance(again, Network) and again.adapters[0].dropouts.neuron == 0.2
    assert again.state_dict().keys() == network.state_dict().keys()


# A network that has little more than the names of the contract


class Bare(nn.Module):
    def __init__(self, text_encoders: list[nn.Module], unet: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        seen = {"lora_unet": unet, "lora_te1": text_encoders[0], "lora_te2": text_encoders[1]}
        self.names = [f"{prefix}.{path}".replace(".", "_") for prefix, model in seen.items() for path, _ in model.named_modules()]
        self.unet_loras = [SimpleNamespace(multiplier=1.0)]

    def apply_to(self, *_: Any) -> None:
        pass

    def prepare_optimizer_params(self, text_encoder_lr: float, unet_lr: float) -> list[dict[str, Any]]:
        return [{"params": iter([self.weight]), "lr": unet_lr + text_encoder_lr}]

    def save_weights(self, file: str, dtype: Any, metadata: Any) -> None:
        assert file.endswith(".safetensors")
        Path(file).write_bytes(b"written")
        if metadata.get("fail"):
            raise OSError(28, "No space left on device")


def bare(models: Models) -> ForeignNetwork:
    module = ModuleType("bare")
    vars(module)["create_network"] = lambda multiplier, dim, alpha, vae, text_encoder, unet: Bare(text_encoder, unet)
    network = build_network(module, NetworkRequest(models=models, dim=4))
    assert isinstance(network, ForeignNetwork)
    return network


def test_a_bare_network_gets_what_it_lacks(sdxl: Models):
    network = bare(sdxl)
    network.set_multiplier(0.5)
    network.on_epoch_start()
    network.on_step_start()
    network.enable_gradient_checkpointing()
    network.prepare_grad_etc()
    assert network.network.unet_loras[0].multiplier == 0.5
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([0.25], None, 0.5)
    assert groups == [{"params": [network.network.weight], "lr": 0.75}] and names == ["group 0"]
    assert network.get_trainable_params() == [network.network.weight]


def test_one_rate_cannot_serve_two_text_encoders(sdxl: Models):
    with pytest.raises(ValueError, match="--text_encoder_lr: Bare takes one rate"):
        bare(sdxl).prepare_optimizer_params_with_multiple_te_lrs([0.1, 0.2], None, 0.5)


def test_others_see_canonical_names(sdxl: Models):
    names = bare(sdxl).network.names
    assert {"lora_unet_input_blocks_3_1_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"} <= set(names)
    assert not any("down_blocks" in name for name in names)


def test_a_failed_save_of_others_leaves_the_earlier_file_whole(sdxl: Models, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    network = bare(sdxl)
    network.save_weights(path)
    assert path.read_bytes() == b"written"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match="No space left on device"):
        network.save_weights(path, None, {"fail": "1"})
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


# The real LyCORIS


def step(network: TrainableNetwork, models: Models) -> None:
    """One training step on the denoiser, large enough to be seen."""
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 0.05)
    optimizer = torch.optim.AdamW(groups)
    network.on_epoch_start(models.text_encoders, models.denoiser)
    predict(models.denoiser).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("algo", ["loha", "lokr", "lora"])
def test_lycoris_trains_saves_and_its_file_means_the_same_here(sdxl: Models, tmp_path: Path, algo: str):
    pytest.importorskip("lycoris")
    base = predict(sdxl.denoiser)
    module = load_network_module("lycoris.kohya")
    network = build_network(module, NetworkRequest(models=sdxl, dim=4, alpha=2.0, arguments={"algo": algo, "preset": "attn-mlp"}))
    network.apply_to(sdxl.text_encoders, sdxl.denoiser, True, True)
    step(network, sdxl)
    network.eval()
    with torch.no_grad():
        trained = predict(sdxl.denoiser)
        path = tmp_path / "lycoris.safetensors"
        network.save_weights(path, torch.float32, {"ss_network_module": "lycoris.kohya"})
        for adapter in network.network.loras:
            adapter.restore()
        assert torch.equal(predict(sdxl.denoiser), base)

        ours = Network.from_file(path, sdxl.denoiser, sdxl.text_encoders).eval()
        ours.attach()
        assert not torch.allclose(trained, base, atol=1e-2)
        torch.testing.assert_close(predict(sdxl.denoiser), trained, rtol=1e-4, atol=1e-4)
    names = {key.split(".")[0] for key in load_tensors(path)}
    known = {t.name for part, m in zip(architecture_named("sdxl").parts, [sdxl.denoiser, *sdxl.text_encoders], strict=True)
             for t in architecture_named("sdxl").targets(part, m)}  # fmt: skip
    assert names <= known and any(name.startswith("lora_te2_text_model_") for name in names)
    assert len(ours.adapters) == len(names) == len(network.network.loras)


@pytest.mark.parametrize("from_weights", [True, False])
def test_lycoris_goes_on_from_its_own_file(sdxl: Models, tmp_path: Path, from_weights: bool):
    pytest.importorskip("lycoris")
    module = load_network_module("lycoris.kohya")
    arguments = {"algo": "loha", "preset": "attn-mlp"}
    network = build_network(module, NetworkRequest(models=sdxl, dim=4, alpha=2.0, arguments=arguments))
    network.apply_to(sdxl.text_encoders, sdxl.denoiser, True, True)
    step(network, sdxl)
    path = tmp_path / "a.safetensors"
    network.save_weights(path, None, {})
    for adapter in network.network.loras:
        adapter.restore()
    weights = path if from_weights else None
    again = build_network(module, NetworkRequest(models=sdxl, dim=4, alpha=2.0, arguments=arguments, weights=weights))
    again.apply_to(sdxl.text_encoders, sdxl.denoiser, True, True)
    if not from_weights:
        again.load_weights(path)
    assert isinstance(again, ForeignNetwork)
    expected = load_tensors(path)
    assert again.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in again.network.state_dict().items())
