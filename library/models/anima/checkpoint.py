"""Anima's files: denoiser, text encoder and VAE, each from a file in the original layout or a diffusers folder, and back.

Everything is read offline; tensors are memory-mapped and cast one by one. A pickle is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.core.log import get_logger, warn_once
from library.core.tensor_file import listing
from library.models.anima import names
from library.models.anima.components import (
    ADAPTER_LAYOUTS,
    CONDITIONER,
    CONSTANTS,
    DIT_LAYOUTS,
    ENCODER,
    ENCODER_LAYOUTS,
    PARTS,
    TRANSFORMER,
    UNUSED,
    VAE,
    VAE_LAYOUTS,
    Marked,
)
from library.models.anima.denoiser import AnimaDiT
from library.models.anima.folder import folder_component, folder_weights, subfolder
from library.models.anima.lookalikes import seems_to_be
from library.models.filling import Component, Plan, plan
from library.models.weights import Shapes, Weights, leave_out

logger = get_logger(__name__)

MEANINGFUL = leave_out(CONSTANTS, UNUSED)


@dataclass(frozen=True)
class Found:
    """One model, found in a file or folder: the component as it stands there, and its tensors' shapes without the prefix."""

    path: Path
    component: Component
    weights: Weights
    shapes: Shapes


def load_denoiser(path: Path | str, *, dtype: torch.dtype, device: torch.device, llm_adapter: Path | str | None = None) -> AnimaDiT:
    """The diffusion transformer with its text conditioner, which `llm_adapter` (a file or a folder) gives or replaces.

    Raises `ValueError` that names the file and every missing, extra or misshapen tensor, or says which other model it seems to be.
    """
    found = find_denoiser(Path(path), None if llm_adapter is None else Path(llm_adapter))
    plans = plan_all(found)  # every fault is found before the first tensor is read
    _check_together(found, plans)
    transformer, conditioner = (planned.fill(one.weights, dtype, device) for one, planned in zip(found, plans, strict=True))
    return AnimaDiT(cast(Any, transformer), cast(Any, conditioner)).eval().requires_grad_(False)


def load_text_encoder(path: Path | str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The `Qwen3Model` of a file, with or without `model.` before its keys, or of a folder. Raises `ValueError` as `load_denoiser` does."""
    return _load(find_text_encoder(Path(path)), dtype, device)


def load_vae(path: Path | str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The `AutoencoderKLQwenImage` of a file in the original layout or diffusers', or of a folder. Raises `ValueError` as above."""
    return _load(find_vae(Path(path)), dtype, device)


def check_files(dit: Path, text_encoder: Path, vae: Path | None = None, llm_adapter: Path | None = None) -> None:
    """Read the headers only: are the files complete, and do the models in them fit each other? `ValueError` says all that is wrong."""
    found = [*find_denoiser(dit, llm_adapter), find_text_encoder(text_encoder), *([] if vae is None else [find_vae(vae)])]
    _check_together(found, plan_all(found))


# Back into files


def denoiser_state_dict(denoiser: nn.Module, dtype: torch.dtype, prefix: str = "net.") -> dict[str, Tensor]:
    """The tensors of an original DiT file, the llm adapter inside, in `dtype`: the inverse of `load_denoiser`."""
    transformer, conditioner = (denoiser.get_submodule(name) for name in (names.TRANSFORMER, names.CONDITIONER))
    return {
        **_written(replace(TRANSFORMER, prefix=prefix), transformer, dtype),
        **_written(replace(CONDITIONER, prefix=f"{prefix}{names.ADAPTER}."), conditioner, dtype),
    }


def text_encoder_state_dict(encoder: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a Qwen3 file, without `model.` before their names, in `dtype`: the inverse of `load_text_encoder`."""
    return _written(ENCODER, encoder, dtype)


def vae_state_dict(vae: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a VAE file in the original layout, in `dtype`: the inverse of `load_vae`."""
    return _written(VAE, vae, dtype)


def _written(component: Component, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    state = module.state_dict()
    sources = component.sources(module)
    return {component.prefix + source.key: state[name].detach().to(dtype).contiguous() for name, source in sources.items()}


# What stands where


def find_denoiser(path: Path, llm_adapter: Path | None = None) -> tuple[Found, Found]:
    """Transformer and text conditioner. Raises `ValueError` where the adapter is in neither place, or a file is of another kind."""
    if path.is_dir():
        transformer = _in_folder(path, TRANSFORMER)
        return transformer, _in_folder(path, CONDITIONER) if llm_adapter is None else _find_adapter(llm_adapter)
    dit = _in_file(path, DIT_LAYOUTS)
    level = f"{names.ADAPTER}."
    inside = {key.removeprefix(level): shape for key, shape in dit.shapes.items() if key.startswith(level)}
    transformer = replace(dit, shapes={key: shape for key, shape in dit.shapes.items() if not key.startswith(level)})
    if llm_adapter is not None:
        return transformer, _find_adapter(llm_adapter)
    prefix = dit.component.prefix + level
    if not inside:
        raise ValueError(f"{path}: has no llm adapter (no tensor under '{prefix}'); give one with --llm_adapter_path")
    return transformer, Found(path, replace(CONDITIONER, prefix=prefix), dit.weights, inside)


def find_text_encoder(path: Path) -> Found:
    """The text encoder. Raises `ValueError` for a file of another kind."""
    return _in_folder(path, ENCODER) if path.is_dir() else _in_file(path, ENCODER_LAYOUTS)


def find_vae(path: Path) -> Found:
    """The VAE. Raises `ValueError` for a file of another kind."""
    return _in_folder(path, VAE) if path.is_dir() else _in_file(path, VAE_LAYOUTS)


def plan_all(found: Sequence[Found]) -> list[Plan]:
    """An empty module for each. Raises one `ValueError` with the faults of all."""
    plans: list[Plan] = []
    problems: list[str] = []
    for one in found:
        try:
            plans.append(plan(one.component, one.shapes))
        except ValueError as error:
            problems.append(f"{one.path}: not a complete {one.component.title} of Anima\n{error}")
    if problems:
        raise ValueError("\n".join(problems))
    return plans


def _find_adapter(path: Path) -> Found:
    return _in_folder(path, CONDITIONER) if path.is_dir() else _in_file(path, ADAPTER_LAYOUTS)


def _in_folder(path: Path, component: Component) -> Found:
    folder = subfolder(component, path)
    described = folder_component(component, folder)
    weights = folder_weights(folder)
    return Found(folder, described, weights, weights.shapes)


def _in_file(path: Path, layouts: tuple[Marked, ...]) -> Found:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; models are not downloaded")
    weights = Weights([path], MEANINGFUL)
    for layout in layouts:
        prefix = next((prefix for prefix in layout.prefixes if prefix + layout.mark in weights.shapes), None)
        if prefix is not None:
            _check_rest(path, weights, prefix, layout.component.title)
            weights.check_plain(prefix)
            return Found(path, replace(layout.component, prefix=prefix), weights, weights.under(prefix))
    kind, mark = layouts[0].kind, layouts[0].mark
    other = seems_to_be(weights.shapes, kind)
    raise ValueError(f"{path}: not {kind.what}: it has no tensor '{mark}'" + (f"; {other}" if other else ""))


def _check_rest(path: Path, weights: Weights, prefix: str, title: str) -> None:
    """What else does the file hold? The other models of a file of several are left out with a word, all else is refused."""
    rest = [key for key in weights.shapes if not key.startswith(prefix)]
    dit = prefix.removesuffix(f"{names.ADAPTER}.")  # whose prefix may be empty
    is_inside = dit != prefix and dit + DIT_LAYOUTS[0].mark in weights.shapes
    unknown = [] if is_inside else [key for key in rest if not key.startswith(PARTS)]
    if unknown:
        raise ValueError(f"{path}: holds {len(unknown)} tensors that belong to no part of Anima: {listing(unknown)}")
    if rest:
        warn_once(logger, f"{path}: only its {title} is used, not its {len(rest)} other tensors")


# Checks


def _check_together(found: Sequence[Found], plans: Sequence[Plan]) -> None:
    """Do transformer, llm adapter and, where it is the third, text encoder fit each other? If not, fail here and not in the first step."""
    transformer, conditioner, *others = (_config(planned.module) for planned in plans)
    claims = [
        (
            transformer["in_channels"] == transformer["out_channels"] + 1,
            f"the transformer takes {transformer['in_channels']} channels; Anima's takes its {transformer['out_channels']} and a mask",
        ),
        (
            transformer["text_embed_dim"] == conditioner["target_dim"],
            f"the transformer attends to {transformer['text_embed_dim']} channels, the llm adapter gives {conditioner['target_dim']}",
        ),
    ]
    if others:
        width = others[0]["hidden_size"]
        claims.append(
            (
                width == conditioner["source_dim"],
                f"the llm adapter reads {conditioner['source_dim']} channels, the text encoder gives {width}; Anima's is Qwen3-0.6B",
            )
        )
    problems = [problem for holds, problem in claims if not holds]
    if problems:
        files = " and ".join(dict.fromkeys(str(one.path) for one in found))
        raise ValueError(f"{files}: these models do not fit each other: {'; '.join(problems)}")


def _config(module: nn.Module) -> Mapping[str, Any]:
    config: Any = module.config
    return config.to_dict() if hasattr(config, "to_dict") else config


def _load(found: Found, dtype: torch.dtype, device: torch.device) -> nn.Module:
    (planned,) = plan_all([found])
    return planned.fill(found.weights, dtype, device)
