"""Third-party modules see the layers under the checkpoint's names and in the documented classes."""

from types import SimpleNamespace

import torch

from library.models.architecture import architecture_named
from networks.canonical_view import canonical_view

SDXL = architecture_named("sdxl")


def test_a_view_holds_the_models_own_layers_in_canonical_order(small_sdxl_modules: SimpleNamespace) -> None:
    models = [small_sdxl_modules.unet, small_sdxl_modules.text_encoder_1, small_sdxl_modules.text_encoder_2]
    for part, model in zip(SDXL.parts, models, strict=True):
        targets = SDXL.targets(part, model)
        leaves = dict(canonical_view(SDXL, part, model).named_modules())
        assert all(leaves[target.path] is model.get_submodule(target.module_path) for target in targets)
        assert all(type(leaves[target.container]).__name__ == target.group for target in targets)
        assert sum(isinstance(leaf, torch.nn.Linear | torch.nn.Conv2d) for leaf in leaves.values()) == len(targets)


def test_a_container_is_no_ancestor_of_another(small_sdxl_modules: SimpleNamespace) -> None:
    containers = {target.container for target in SDXL.targets(SDXL.parts[0], small_sdxl_modules.unet)}
    assert not [(inner, outer) for inner in containers for outer in containers if inner.startswith(f"{outer}.")]
