"""Written for ComfyUI: flat factors, and DoRA's magnitudes over the norms that it divides by."""

from collections.abc import Mapping

import torch

from library.models.naming import Naming, Part, Target
from networks.formats.export.entry import Bases, Entry, Plan, Refusal, Wishes
from networks.formats.export.steps import BAKE, with_identity, without_core
from networks.formats.export.writer import DIFFERENCE, LOHA, LOKR, LORA, Writer
from networks.lokr import LoKr

SPELLINGS = (  # of LoRA's factors; an alpha that is not there means a scale of 1
    *("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.default.weight"),
    *("lora.down.weight", "lora.up.weight", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "lora_mid.weight"),
)
READ = tuple(dict.fromkeys((*LORA, *SPELLINGS, *LOHA, *LOKR, *DIFFERENCE, "dora_scale")))
UNNUMBERED = "lora_te"  # before May 2026 known for Stable Diffusion 1 only


class ComfyUI(Writer):
    """ComfyUI."""

    name = "comfyui"
    reader = "ComfyUI"

    def rewrite(self, plan: Plan, naming: Naming, wishes: Wishes, bases: Bases) -> None:
        plan.each(without_core, without_volume)
        if not wishes.keep_magnitudes:
            plan.each(lambda entry: with_base_norms(entry, bases))

    def layer_name(self, entry: Entry, naming: Naming, wishes: Wishes) -> str:
        part, target = entry.member.part, entry.member.target
        has_flat_name = target.name in self.known_names(naming, part, target) and part.prefix != UNNUMBERED
        return target.name if has_flat_name and not wishes.dotted else f"{part.comfyui_prefix}.{target.path}"

    def known_names(self, naming: Naming, part: Part, target: Target) -> Mapping[str, tuple[str, ...]]:
        names = [f"{part.comfyui_prefix}.{target.path}"]
        if part.is_denoiser or target.group or target.path == "text_projection":
            names.append(target.name)
        component, _, path = target.diffusers_path.partition(".")
        if part.is_denoiser and component == "unet":
            names += [f"{prefix}_{path.replace('.', '_')}" for prefix in (part.prefix, "lycoris")]
        return dict.fromkeys(names, READ)


def without_volume(entry: Entry) -> Entry:
    """A whole second factor of LoKr on Conv1d and Conv3d, whose indices ComfyUI mixes up, as the product of an identity and itself."""
    return with_identity(entry) if isinstance(entry.adapter, LoKr) and len(entry.adapter.shape.kernel) in (1, 3) else entry


def with_base_norms(entry: Entry, bases: Bases) -> Entry:
    """DoRA over the outputs with magnitudes m |W| / |W + dW|: ComfyUI divides them by |W|, where |W + dW| is meant."""
    adapter = entry.adapter
    if adapter.dora_scale is None or adapter.extras.magnitude != "out":
        return entry
    base = bases.weight(entry.member)
    if base is None:
        raise Refusal(
            "DoRA over the outputs, which ComfyUI divides by the norm of the base weight; "
            f"add --base with the checkpoint and it is rescaled, or {BAKE}"
        )
    epsilon = torch.finfo(base.dtype).eps
    norms = torch.linalg.vector_norm(base.flatten(1), dim=1) + epsilon
    magnitudes = (adapter.gain(base).detach() * norms).to(torch.float32).view_as(adapter.dora_scale)
    tensors = adapter.file_tensors() | {"dora_scale": magnitudes}
    return entry.remade(tensors, "DoRA's magnitudes over the base's norms", magnitudes_moved=True)
