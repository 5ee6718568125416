"""The canonical names of Anima's adaptable layers: paths of the original checkpoint, in the order of sd-scripts.

The denoiser comes in three class trees: the original's, as sd-scripts has it, with `llm_adapter` inside; diffusers'
`CosmosTransformer3DModel` alone; and a module that holds that as `transformer` and an `AnimaTextConditioner` as `text_conditioner`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from library.models.naming import Naming, Part, Place, Target, plain_target, weighted

TRANSFORMER, CONDITIONER = "transformer", "text_conditioner"  # components of a diffusers pipeline, children of the wrapper
ADAPTER = "llm_adapter"

DIT = Part(
    name="transformer",
    prefix="lora_unet",
    is_denoiser=True,
    default_groups=("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
    extra_groups={"train_llm_adapter": ("LLMAdapterTransformerBlock",)},
    default_excludes=(".*(_modulation|_norm|_embedder|final_layer).*",),
    comfyui_prefix="diffusion_model",
    other_prefixes=("transformer", "lycoris", "lora_transformer", "net", "model.diffusion_model", "unet", "dit"),
)
TEXT = Part(
    name="text encoder",
    prefix="lora_te",
    is_denoiser=False,
    default_groups=("Qwen3Attention", "Qwen3MLP"),
    comfyui_prefix="text_encoders.qwen3_06b.transformer.model",
    other_prefixes=(
        *("text_encoders.transformer.model", "qwen3_06b.transformer.model", "qwen3_06b"),
        *("text_encoder", "text_encoder.model", "te", "lora_te1", "lora_te_model", "lora_te1_model"),
    ),
)
PARTS = (DIT, TEXT)


@dataclass(frozen=True)
class Section:
    """A container of layers: its group, its path in the original and in diffusers' transformer, and its layers in both."""

    group: str
    path: str
    in_library: str
    layers: dict[str, str]  # path below `path` -> path below `in_library`


ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
ATTENTION_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}
BLOCK = {
    **{f"self_attn.{name}": f"attn1.{own}" for name, own in ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{own}" for name, own in ATTENTION.items()},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{name}.{n}": f"norm{number}.linear_{n}"
        for number, name in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for n in (1, 2)
    },
}
BLOCK_NORMS = {
    f"{name}.{norm}": f"{own}.{to}"
    for name, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for norm, to in ATTENTION_NORMS.items()
}
STEM = (
    Section("PatchEmbed", "x_embedder", "patch_embed", {"proj.1": "proj"}),
    Section("TimestepEmbedding", "t_embedder.1", "time_embed.t_embedder", {"linear_1": "linear_1", "linear_2": "linear_2"}),
)
END = (
    Section(
        "FinalLayer",
        "final_layer",
        "",
        {"linear": "proj_out", "adaln_modulation.1": "norm_out.linear_1", "adaln_modulation.2": "norm_out.linear_2"},
    ),
)
TIME_NORM = {"t_embedding_norm": "time_embed.norm"}
ADAPTER_BLOCK = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *("mlp.0", "mlp.2"),
)
TEXT_LAYERS = (
    *(("Qwen3Attention", f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("Qwen3MLP", f"mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")),
)
IN_ORIGINAL = ("x_embedder.proj.1", "t_embedder.1.linear_1", "final_layer.linear", "blocks.0.cross_attn.output_proj", "blocks.0.mlp.layer1")
IN_LIBRARY = (
    "patch_embed.proj",
    "time_embed.t_embedder.linear_1",
    "proj_out",
    "transformer_blocks.0.attn2.to_out.0",
    "transformer_blocks.0.norm3.linear_1",
)


class AnimaNaming(Naming):
    """The names of Anima's layers."""

    name: ClassVar[str] = "anima"
    title: ClassVar[str] = "Anima"
    parts: ClassVar[tuple[Part, ...]] = PARTS
    network_aliases: ClassVar[Mapping[str, str]] = {"networks.lora_anima": "networks.lora"}
    marks: ClassVar[tuple[str, ...]] = (
        r"blocks_\d+_((self|cross)_attn_(q|k|v|output)_proj|mlp_layer\d|adaln_modulation)",
        r"(?<!\d_)transformer_blocks_\d+_(attn[12]_to|ff_net|norm[123]_linear)",
        r"llm_adapter_|text_conditioner_|qwen3_|(lora_te1?|^te|text_encoders?(_transformer)?)_(model_)?layers_\d+_",
    )

    def recognises(self, denoiser: nn.Module) -> bool:
        """Anima's diffusion transformer in one of its three class trees."""
        return _has(denoiser, IN_ORIGINAL) or _is_cosmos(_child(denoiser, TRANSFORMER) or denoiser)

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        return list(_dit_targets(module) if part.is_denoiser else _text_targets(module))

    def outside(self, part: Part, module: nn.Module) -> list[Target]:
        known = {target.module_path for target in self.targets(part, module)}
        every = _dit_layers(module) if part.is_denoiser else _text_layers(module)
        return [target for target in every if target.module_path not in known]

    def places(self, part: Part, module: nn.Module) -> dict[str, Place]:
        from library.models.anima.places import anima_places

        return anima_places(part, module)

    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        from library.models.anima.outline import anima_outline

        return list(zip(PARTS, anima_outline(checkpoint), strict=True))


NAMING = AnimaNaming()


@dataclass(frozen=True)
class Tree:
    """Where the three class trees have a layer of the transformer and one of the text conditioner."""

    is_original: bool
    transformer: str  # before diffusers' paths: `transformer.` in the wrapper
    conditioner: str

    @classmethod
    def of(cls, denoiser: nn.Module) -> "Tree":
        """The tree of this denoiser."""
        if _child(denoiser, TRANSFORMER) is not None:
            return cls(False, f"{TRANSFORMER}.", f"{CONDITIONER}.")
        return cls(_has(denoiser, IN_ORIGINAL), "", f"{ADAPTER}.")

    def of_transformer(self, path: str, in_library: str) -> tuple[str, str]:
        """Module path and diffusers path of a layer of the transformer."""
        return path if self.is_original else self.transformer + in_library, f"{TRANSFORMER}.{in_library}"

    def of_conditioner(self, inside: str) -> tuple[str, str]:
        """Module path and diffusers path of a layer of the text conditioner."""
        return self.conditioner + inside, f"{CONDITIONER}.{inside}"


# The denoiser


def _dit_targets(denoiser: nn.Module) -> Iterator[Target]:
    tree = Tree.of(denoiser)
    layers = {path for path, layer in denoiser.named_modules() if not isinstance(layer, nn.Identity)}
    for section in (*STEM, None, *_blocks(denoiser, tree), *END):
        if section is None:
            yield from _adapter_targets(denoiser, tree, layers)
            continue
        for layer, own in section.layers.items():
            path = f"{section.path}.{layer}"
            module_path, diffusers_path = tree.of_transformer(path, f"{section.in_library}.{own}".lstrip("."))
            if module_path in layers:
                yield _target(DIT, path, module_path, section.group, section.path, diffusers_path)


def _adapter_targets(denoiser: nn.Module, tree: Tree, layers: set[str]) -> Iterator[Target]:
    for n in range(_length(denoiser, f"{tree.conditioner}blocks")):
        for layer in ADAPTER_BLOCK:
            module_path, diffusers_path = tree.of_conditioner(f"blocks.{n}.{layer}")
            if module_path in layers:
                container = f"{ADAPTER}.blocks.{n}"
                yield _target(DIT, f"{container}.{layer}", module_path, "LLMAdapterTransformerBlock", container, diffusers_path)


def _blocks(denoiser: nn.Module, tree: Tree) -> list[Section]:
    depth = _length(denoiser, "blocks" if tree.is_original else f"{tree.transformer}transformer_blocks")
    return [Section("Block", f"blocks.{n}", f"transformer_blocks.{n}", BLOCK) for n in range(depth)]


def _dit_layers(denoiser: nn.Module) -> Iterator[Target]:
    """Every layer that has a weight, norms too, as a layer that no group lists."""
    tree = Tree.of(denoiser)
    names = dict(TIME_NORM)
    for section in (*STEM, *_blocks(denoiser, tree), *END):
        norms = BLOCK_NORMS if section.group == "Block" else {}
        for layer, own in (section.layers | norms).items():
            names[f"{section.path}.{layer}"] = f"{section.in_library}.{own}".lstrip(".")
    originals = {own: path for path, own in names.items()}
    for module_path in weighted(denoiser):
        if module_path.startswith(tree.conditioner):
            inside = module_path.removeprefix(tree.conditioner)
            yield plain_target(DIT, f"{ADAPTER}.{inside}", *tree.of_conditioner(inside))
        else:
            inside = module_path.removeprefix(tree.transformer)
            path = inside if tree.is_original else originals.get(inside, inside)
            yield plain_target(DIT, path, module_path, f"{TRANSFORMER}.{names.get(path, inside)}")


# The text encoder


def _text_targets(encoder: nn.Module) -> Iterator[Target]:
    level = _text_level(encoder)
    for n in range(_length(encoder, f"{level}layers")):
        for group, layer in TEXT_LAYERS:
            path = f"layers.{n}.{layer}"
            yield _target(TEXT, path, level + path, group, f"layers.{n}.{layer.partition('.')[0]}", f"text_encoder.{path}")


def _text_layers(encoder: nn.Module) -> Iterator[Target]:
    level = _text_level(encoder)
    for module_path in weighted(encoder):
        path = module_path.removeprefix(level)
        yield plain_target(TEXT, path, module_path, f"text_encoder.{path}")


def _text_level(encoder: nn.Module) -> str:
    """`model.` in a causal language model, nothing in the bare encoder."""
    return "model." if _child(encoder, "model") is not None else ""


# Structure


def _target(part: Part, path: str, module_path: str, group: str, container: str, diffusers_path: str) -> Target:
    name = f"{part.prefix}_{path.replace('.', '_')}"
    return Target(name=name, path=path, module_path=module_path, group=group, container=container, diffusers_path=diffusers_path)


def _is_cosmos(module: nn.Module) -> bool:
    """Cosmos-Predict2's transformer; the first Cosmos has learned positions besides."""
    return _has(module, IN_LIBRARY) and _child(module, "learnable_pos_embed") is None


def _has(module: nn.Module, paths: tuple[str, ...]) -> bool:
    layers = {path for path, _ in module.named_modules()}
    return layers.issuperset(paths)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return dict(module.named_children()).get(name)


def _length(module: nn.Module, path: str) -> int:
    found = dict(module.named_modules()).get(path)
    return 0 if found is None else len(list(found.children()))
