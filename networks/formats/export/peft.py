"""Written for PEFT 0.21.2, `PeftModel.from_pretrained`: a folder a component, of one algorithm each.

PEFT derives the shapes of LoHa and LoKr from r, `decompose_factor` and `use_effective_conv2d` of the folder, and the scale from alpha / r.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.models.naming import Naming, Part, Target
from networks.base import Adapter
from networks.difference import Difference
from networks.formats.export.entry import Bases, Entry, Plan, Refusal, Wishes, kinds
from networks.formats.export.steps import AS_LORA, BAKE, common_factor, cores, is_whole, with_low_rank, with_whole_w1, without_core
from networks.formats.export.writer import LOHA, LOKR, Writer, Written, most_common, plainly
from networks.loha import LoHa
from networks.lokr import LoKr, factorise
from networks.lora import LoRA

OUTER = "base_model.model"
MAIN = {"unet", "transformer"}  # alone, these are the folder itself
RENAMED = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}
READ = tuple(dict.fromkeys((*RENAMED.values(), *(name for name in (*LOHA, *LOKR) if name != "alpha"))))
KINDS: dict[type[Adapter], str] = {LoRA: "LORA", LoHa: "LOHA", LoKr: "LOKR"}
LAYERS = {
    LoRA: (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    LoHa: (nn.Linear, nn.Conv1d, nn.Conv2d),
    LoKr: (nn.Linear, nn.Conv1d, nn.Conv2d),
}


class PEFT(Writer):
    """PEFT."""

    name = "peft"
    reader = "PEFT"
    suffix = ""
    has_alpha = False

    def rewrite(self, plan: Plan, naming: Naming, wishes: Wishes, bases: Bases) -> None:
        plan.each(check, with_whole_w1)
        for entries in by_component(plan.entries).values():
            titles = kinds(entries)
            if len(titles) > 1:
                plan.refuse(entries, f"{' and '.join(titles)} in one component, of which a PEFT folder has one; {AS_LORA}")
            if len({entry.adapter.dora_scale is None for entry in entries}) > 1:
                plan.refuse(entries, f"DoRA on some layers of a component, which PEFT has on all or on none; {BAKE}")
        flat = {component for component, entries in by_component(plan.entries).items() if not is_effective(entries)}
        plan.each(lambda entry: without_core(entry) if place(entry)[0] in flat else entry, with_read_rank)
        for entries in by_component(plan.entries).values():
            if factor_of(entries) is None:
                plan.refuse(entries, f"LoKr split by factors that PEFT's one decompose_factor a folder does not give; {AS_LORA}")

    def layer_name(self, entry: Entry, naming: Naming, wishes: Wishes) -> str:
        return f"{OUTER}.{place(entry)[1]}"

    def known_names(self, naming: Naming, part: Part, target: Target) -> Mapping[str, tuple[str, ...]]:
        return {f"{OUTER}.{path_of(part, target)[1]}": READ}

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        tensors = entry.adapter.file_tensors()
        tensors.pop("alpha", None)
        shape = entry.adapter.shape
        for name, tensor in tensors.items():
            if name in ("hada_t1", "hada_t2", "lokr_t2") and len(shape.kernel) == 1:
                tensors[name] = tensor.unsqueeze(-1)
            if name == "dora_scale":
                tensors[name] = tensor.flatten() if not shape.kernel else tensor.reshape(1, -1, *(1 for _ in shape.kernel))
        return {RENAMED.get(name, name): tensor for name, tensor in tensors.items()}

    def files(self, entries: Sequence[Entry], naming: Naming, wishes: Wishes) -> dict[str, Written]:
        components = by_component(entries)
        is_alone = set(components) <= MAIN and len(components) == 1
        return {
            "" if is_alone else component: Written(
                {f"{OUTER}.{place(entry)[1]}.{key}": tensor for entry in own for key, tensor in self.tensors(entry).items()},
                configuration(own),
            )
            for component, own in components.items()
        }


def by_component(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries of each model of a pipeline."""
    components: dict[str, list[Entry]] = {}
    for entry in entries:
        components.setdefault(place(entry)[0], []).append(entry)
    return components


def place(entry: Entry) -> tuple[str, str]:
    """Component and path of an entry."""
    return path_of(entry.member.part, entry.member.target)


def path_of(part: Part, target: Target) -> tuple[str, str]:
    """The component of a layer, and its path in the component's class: a text encoder's as the installed transformers has it."""
    component, _, path = target.diffusers_path.partition(".")
    return component, path if part.is_denoiser else target.module_path


def check(entry: Entry) -> Entry:
    """Raises `Refusal` for what PEFT has no layer for."""
    adapter, shape = entry.adapter, entry.adapter.shape
    if isinstance(adapter, Difference):
        raise Refusal(f"whole differences, which PEFT does not read; {AS_LORA}")
    if adapter.dora_scale is not None and not isinstance(adapter, LoRA):
        raise Refusal(f"DoRA on LoHa or LoKr, which PEFT has not; {BAKE}")
    if adapter.dora_scale is not None and adapter.extras.magnitude == "in":
        raise Refusal(f"DoRA over the inputs, which PEFT has not; {BAKE}")
    if not isinstance(adapter.layer, LAYERS[type(adapter)]):
        raise Refusal(f"{adapter.title} on {type(adapter.layer).__name__}, which PEFT has not; {AS_LORA}")
    if isinstance(adapter, LoRA) and shape.groups > 1:
        raise Refusal("LoRA on grouped convolutions, where PEFT's means something else; --to lycoris keeps it")
    if isinstance(adapter, LoKr) and len(shape.kernel) == 1 and adapter.split.rank2 is None:
        raise Refusal(f"LoKr with a whole second factor on Conv1d, whose indices PEFT mixes up; {AS_LORA}")
    return entry


def is_effective(entries: Sequence[Entry]) -> bool:
    """Whether every convolution that could have a Tucker core has one, as `use_effective_conv2d` wants it."""
    return cores(entries) == {True} and not isinstance(entries[0].adapter, LoRA)


def with_read_rank(entry: Entry) -> Entry:
    """LoKr's second factor whole where its rank is so high that PEFT takes it for whole, which on Conv1d it mixes up."""
    changed = with_low_rank(entry)
    if changed is not entry and len(entry.adapter.shape.kernel) == 1:
        raise Refusal(f"LoKr of a high rank on Conv1d, which PEFT takes for a whole factor and mixes up; {AS_LORA}")
    return changed


def factor_of(entries: Sequence[Entry]) -> int | None:
    """The `decompose_factor` that gives every LoKr its split."""
    return common_factor(entries, split)


def split(size: int, factor: int) -> int:
    """The side of w1 that PEFT derives: a factor that divides is taken as it is, also where it is the larger one."""
    return factor if factor > 0 and size % factor == 0 else factorise(size, factor)[0]


def configuration(entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of `adapter_config.json`: what most layers have, and patterns for the others."""
    first = entries[0].adapter
    ranks = {place(entry)[1]: float(_rank(entry.adapter)) for entry in entries}
    alphas = {place(entry)[1]: entry.adapter.scale * _rank(entry.adapter) for entry in entries}
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    config: dict[str, Any] = {
        "peft_type": KINDS[type(first)],
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": plainly(rank),
        "lora_alpha" if isinstance(first, LoRA) else "alpha": plainly(alpha),
        "rank_pattern": {pattern(path): plainly(value) for path, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern(path): plainly(value) for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }
    if isinstance(first, LoRA):
        return config | {"use_dora": first.dora_scale is not None, "bias": "none", "lora_dropout": 0.0, "use_rslora": False}
    config |= {"use_effective_conv2d": is_effective(entries), "rank_dropout": 0.0, "module_dropout": 0.0}
    return config | ({"decompose_both": False, "decompose_factor": factor_of(entries)} if isinstance(first, LoKr) else {})


def pattern(path: str) -> str:
    """A regex of one layer only: PEFT also matches the end of a path."""
    return f"^{re.escape(path)}"


def _rank(adapter: Adapter) -> int:
    """The r from which PEFT derives the layer; a whole second factor of LoKr is one of any rank that is high enough."""
    return max(adapter.split.c, adapter.split.d) if is_whole(adapter) and isinstance(adapter, LoKr) else adapter.rank
