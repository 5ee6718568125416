"""The layout of kohya-ss/sd-scripts and LyCORIS: `<adapter name>.<parameter>`, names being dotted paths with underscores.

Read: canonical names, names after the library's class tree (as LyCORIS and diffusers-based trainers write them), and `lora_te1_`
where a family with one text encoder says `lora_te_`. Written: canonical names.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from library.core.tensor_file import listing
from library.models.naming import Naming, Part, Target
from networks.layers import LayerShape

HINTS = (  # how the names of a family's adapters begin -> the family
    (("lora_unet_double_blocks_", "lora_unet_single_blocks_"), "FLUX"),
    (("lora_unet_blocks_", "lora_unet_llm_adapter_", "lora_te_layers_"), "Anima"),
    (("lora_unet_input_blocks_", "lora_unet_output_blocks_", "lora_unet_middle_block_", "lora_te1_", "lora_te2_"), "SDXL"),
    (("lora_te_text_model_",), "Stable Diffusion 1 or 2"),
    (("lora_unet_down_blocks_", "lora_unet_up_blocks_", "lora_unet_mid_block_"), "Stable Diffusion 1, 2 or SDXL"),
    (
        ("diffusion_model.", "transformer.", "unet.", "base_model.model.", "text_encoder", "lycoris_"),
        "another tool (dotted or prefixed names)",
    ),
)


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapter name, by parameter. Raises `ValueError` naming keys that have no parameter part."""
    bare = [key for key in tensors if "." not in key]
    if bare:
        raise ValueError(f"not an adapter: {listing(bare)} {'is' if len(bare) == 1 else 'are'} not of the form <name>.<parameter>")
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, parameter = key.split(".", 1)
        layers.setdefault(name, {})[parameter] = tensor
    return layers


class NameTable:
    """Every spelling of the adapter names of the models at hand. Canonical spellings win."""

    def __init__(self, naming: Naming, parts: Sequence[tuple[Part, nn.Module]]) -> None:
        self.naming = naming
        self.order: dict[str, tuple[Part, Target, nn.Module]] = {}  # canonical name -> its place, in table order
        self._spellings: dict[str, str] = {}
        encoders = [part for part in naming.parts if not part.is_denoiser]
        for part, module in parts:
            layers = dict(module.named_modules())
            targets = naming.targets(part, module)
            known = {target.module_path for target in targets}
            targets = targets + [
                _outside_the_table(part, path) for path, layer in layers.items() if path not in known and _is_adaptable(layer)
            ]
            for target in targets:
                self.order[target.name] = (part, target, layers[target.module_path])
                for prefix in _prefixes(part, encoders):
                    self._spellings.setdefault(underscored(prefix, target.module_path), target.name)
                    self._spellings.setdefault(prefix + target.name.removeprefix(part.prefix), target.name)
        given = {part.name for part, _ in parts}
        absent = [part for part in encoders if part.name not in given]
        self._absent_prefixes = tuple(f"{prefix}_" for part in absent for prefix in _prefixes(part, encoders))

    def canonical(self, name: str) -> str | None:
        """The canonical spelling of an adapter name, or None for a layer that these models have not."""
        return name if name in self.order else self._spellings.get(name)

    def resolve(self, layers: Mapping[str, dict[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """The layers of a file by canonical name in table order, and the names that belong to text encoders not at hand.

        Raises `ValueError` naming what these models have not, the family that the file seems to be for, and names that fall together.
        """
        found: dict[str, dict[str, Tensor]] = {}
        left_out, unknown, double = [], [], []
        for name, tensors in layers.items():
            known = self.canonical(name)
            if known is None:
                (left_out if self._absent_prefixes and name.startswith(self._absent_prefixes) else unknown).append(name)
            elif known in found:
                double.append(name)
            else:
                found[known] = tensors
        if double:
            raise ValueError(f"two spellings of the same layer: {listing(double)}")
        if unknown:
            raise ValueError(self._refusal(unknown, len(layers)))
        return {name: found[name] for name in self.order if name in found}, left_out

    def _refusal(self, unknown: Sequence[str], total: int) -> str:
        title = self.naming.title
        family = seems_for(unknown)
        hint = f"; the file seems to be for {family}" if family and family != title else ""
        example = next(iter(self.order), "none")
        return (
            f"{len(unknown)} of {total} adapters are for layers that this {title} model has not: {listing(unknown, 4)}{hint} "
            f"({title} names look like {example})"
        )


def underscored(prefix: str, path: str) -> str:
    """The adapter name of a dotted path."""
    return f"{prefix}_{path}".replace(".", "_")


def seems_for(names: Iterable[str]) -> str | None:
    """The family whose adapters are named like this, or None."""
    names = list(names)
    return next((family for starts, family in HINTS if any(name.startswith(starts) for name in names)), None)


def _prefixes(part: Part, encoders: Sequence[Part]) -> list[str]:
    return [part.prefix] if part.is_denoiser else [part.prefix, f"lora_te{encoders.index(part) + 1}"]


def _is_adaptable(layer: nn.Module) -> bool:
    try:
        LayerShape.of(layer)
    except ValueError:
        return False
    return True


def _outside_the_table(part: Part, path: str) -> Target:
    """A layer that the family's table does not list, though other tools may adapt it (LyCORIS: conv_in, time embedding)."""
    return Target(name=underscored(part.prefix, path), path=path, module_path=path, group="", container="")
