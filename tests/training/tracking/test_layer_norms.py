"""Norms by kind of layer, for networks of ours and of others."""

import pytest
import torch
from small_family import SmallFamily

from library.models.architecture import Models
from library.models.naming import Part, Target
from library.training.adapters import NetworkOptions, TrainedNetwork, build_trained_network
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.tracking.norms import LayerKinds, kind_of, unclipped


def trained(family: SmallFamily, tmp_path, images, module: str = "networks.lora", *extra: str) -> tuple[TrainedNetwork, LayerKinds]:
    options = family.options(images, tmp_path, *extra, module=module)
    models: Models = family.arch.load(options[family.arch.ModelOptions], device=torch.device("cpu"), dtype=torch.float32)
    network = build_trained_network(models, options[NetworkOptions], options[OptimizerOptions], text_is_cached=False)
    return network, LayerKinds.of(network.network, network.parameters, family.arch, models)


@pytest.mark.parametrize(
    ("group", "path", "kind"),
    [
        ("Transformer2DModel", "blocks.0.attn1.to_q", "attention"),
        ("Transformer2DModel", "blocks.0.ff.net.0.proj", "mlp"),
        ("Transformer2DModel", "proj_in", "projection"),
        ("ResnetBlock2D", "emb_layers.1", "resnet"),
        ("Downsample2D", "op", "sampling"),
        ("CLIPAttention", "q_proj", "attention"),
        ("CLIPMLP", "fc1", "mlp"),
        ("Block", "cross_attn.output_proj", "attention"),
        ("Block", "adaln_modulation_self_attn.1", "modulation"),
        ("Block", "mlp.layer2", "mlp"),
        ("PatchEmbed", "proj.1", "embedding"),
        ("", "norm", "other"),
    ],
)
def test_a_layer_has_the_kind_that_its_names_say(group: str, path: str, kind: str) -> None:
    part = Part(name="text encoder 1", prefix="te", is_denoiser=False, default_groups=())
    target = Target(name="te_x", path=f"x.attn.{path}", module_path="", group=group, container="x.attn")
    assert kind_of(part, target) == f"text_encoder_1/{kind}"


@pytest.mark.parametrize("module", ["networks.lora", "networks.lokr", "lycoris.kohya"])
def test_every_trained_parameter_has_one_kind_whoever_made_the_network(module: str, family: SmallFamily, images, tmp_path) -> None:
    if module.startswith("lycoris"):
        pytest.importorskip("lycoris")
    network, kinds = trained(family, tmp_path, images, module)
    assert sum(map(len, kinds.paths.values())) == len(network.parameters)
    denoiser = family.arch.parts[0].name
    assert {f"{denoiser}/attention", f"{denoiser}/mlp"} <= set(kinds.paths)
    assert any(kind.startswith("text_encoder") for kind in kinds.paths) and "other" not in kinds.paths


def test_norms_of_the_kinds_make_up_the_norm_of_all(sdxl: SmallFamily, images, tmp_path) -> None:
    network, kinds = trained(sdxl, tmp_path, images)
    for number, parameter in enumerate(network.parameters):
        parameter.grad = torch.full_like(parameter, 0.01 * (number % 7))
    for norms, tensors in (
        (kinds.weight_norms(), network.parameters),
        (kinds.gradient_norms(), [one.grad for one in network.parameters if one.grad is not None]),
    ):
        every = torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors])
        torch.testing.assert_close(torch.stack(list(norms.values())).norm(), every)
    assert all(key.startswith("norm/gradient/") for key in kinds.gradient_norms())


def test_what_is_not_trained_has_no_norm(sdxl: SmallFamily, images, tmp_path) -> None:
    _, kinds = trained(sdxl, tmp_path, images, "networks.lora", "--network_train_unet_only")
    assert not any(kind.startswith("text_encoder") for kind in kinds.paths)


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_norms_are_those_before_clipping(limit: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
    total = torch.nn.utils.clip_grad_norm_([weight], limit) if limit else weight.grad.norm()
    found = unclipped({"norm/gradient/a": weight.grad.norm()}, float(total), limit)
    torch.testing.assert_close(found["norm/gradient/a"], torch.tensor(5.0))
