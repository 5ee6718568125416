"""Written for diffusers 0.42.1, `pipeline.load_lora_weights`: LoRA only, without alpha."""

from collections.abc import Mapping

from torch import Tensor

from library.models.naming import Naming, Part, Target
from networks.formats.export.entry import Bases, Entry, Plan, Refusal, Wishes
from networks.formats.export.steps import converted
from networks.formats.export.writer import LORA, Writer, fold_scale

READ = ("lora_A.weight", "lora_B.weight")
COMPONENTS = ("unet", "transformer", "text_conditioner", "text_encoder", "text_encoder_2")
TEXT_GROUPS = ("CLIPAttention", "CLIPMLP")  # of the text encoders whose LoRA the loader looks for


class Diffusers(Writer):
    """diffusers' pipelines."""

    name = "diffusers"
    reader = "diffusers"
    has_alpha = False

    def rewrite(self, plan: Plan, naming: Naming, wishes: Wishes, bases: Bases) -> None:
        plan.each(check, lambda entry: converted(entry, wishes, bases))

    def layer_name(self, entry: Entry, naming: Naming, wishes: Wishes) -> str:
        return entry.member.target.diffusers_path

    def known_names(self, naming: Naming, part: Part, target: Target) -> Mapping[str, tuple[str, ...]]:
        if not is_loaded(part, target):
            return {}
        names: dict[str, tuple[str, ...]] = {target.diffusers_path: READ}
        component = target.diffusers_path.partition(".")[0]
        if target.group and (component == "unet" or target.group in TEXT_GROUPS):
            names[target.name] = LORA  # kohya's LoRA of a U-Net and its text encoders is converted on loading
        if part.is_denoiser and component != "unet":
            names[f"{part.comfyui_prefix}.{target.path}"] = READ  # as are dotted names of a transformer, but not their alphas
        return names

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        tensors = fold_scale(entry)
        return {"lora_A.weight": tensors["lora_down.weight"], "lora_B.weight": tensors["lora_up.weight"]}


def is_loaded(part: Part, target: Target) -> bool:
    """Whether a pipeline looks for a LoRA of this layer."""
    component = target.diffusers_path.partition(".")[0]
    return component in COMPONENTS and (part.is_denoiser or target.group in TEXT_GROUPS)


def check(entry: Entry) -> Entry:
    """Raises `Refusal` for layers for which diffusers loads no LoRA."""
    if not is_loaded(entry.member.part, entry.member.target):
        name = entry.member.part.name
        raise Refusal(f"layers of the {name} for which diffusers loads no LoRA; --allow_partial leaves them out, --to peft keeps them")
    if entry.adapter.shape.groups > 1:
        raise Refusal("grouped convolutions, for which PEFT's LoRA means something else; --to lycoris keeps them")
    return entry
