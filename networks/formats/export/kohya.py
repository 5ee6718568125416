"""Written for kohya-ss/sd-scripts: `networks.lora`, `networks.loha`, `networks.lokr`.

A file has one algorithm, LoKr one factor for all layers; w1 is whole; Linear and Conv2d only; no DoRA, no differences.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from library.models.naming import Naming, Part, Target
from networks.difference import Difference
from networks.formats.export.entry import Bases, Entry, Plan, Refusal, Wishes, kinds
from networks.formats.export.steps import AS_LORA, BAKE, common_factor, cores, with_low_rank, with_whole_w1, without_core
from networks.formats.export.writer import LOHA, LOKR, LORA, Writer, without_alpha
from networks.lokr import factorise
from networks.lora import LoRA

READ = tuple(dict.fromkeys((*LORA, *LOHA, *(name for name in LOKR if not name.startswith("lokr_w1_")))))


class Kohya(Writer):
    """sd-scripts."""

    name = "kohya"
    reader = "sd-scripts"

    def rewrite(self, plan: Plan, naming: Naming, wishes: Wishes, bases: Bases) -> None:
        plan.each(check, with_whole_w1)
        titles = kinds(plan.entries)
        if len(titles) > 1:
            plan.refuse(plan.entries, f"{' and '.join(titles)} in one file, of which sd-scripts' modules read one each; {AS_LORA}")
        if titles == [LoRA.title] or len(cores(plan.entries)) > 1:  # use_tucker is one switch for all layers, and LoRA has none
            plan.each(without_core)
        plan.each(with_low_rank)
        if plan.entries and factor_of(plan.entries) is None:
            plan.refuse(plan.entries, f"LoKr split by several factors, of which sd-scripts takes one a file; {AS_LORA}")

    def layer_name(self, entry: Entry, naming: Naming, wishes: Wishes) -> str:
        return entry.member.target.name

    def known_names(self, naming: Naming, part: Part, target: Target) -> Mapping[str, tuple[str, ...]]:
        return {target.name: READ} if target.group else {}

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        tensors = entry.adapter.file_tensors()
        if "lokr_w2" in tensors:
            w2 = tensors["lokr_w2"]
            tensors["alpha"] = tensors["alpha"].new_tensor(max(w2.shape[:2]))  # what sd-scripts takes for the rank
            tensors["lokr_w2"] = w2.flatten(1) if entry.adapter.shape.is_pointwise else w2
        return tensors

    def network_arguments(self, entries: Sequence[Entry]) -> dict[str, str]:
        factor = factor_of(entries)
        return {} if factor in (None, -1) else {"factor": str(factor)}

    def lacking_keys(self, keys: Iterable[str]) -> list[str]:
        return without_alpha(keys, (*LOHA, *LOKR))


def check(entry: Entry) -> Entry:
    """Raises `Refusal` for what none of sd-scripts' modules can hold."""
    adapter, shape = entry.adapter, entry.adapter.shape
    if isinstance(adapter, Difference):
        raise Refusal(f"whole differences, which sd-scripts does not read; {AS_LORA}")
    if adapter.dora_scale is not None:
        raise Refusal(f"DoRA, which sd-scripts ignores; {BAKE}, --to lycoris keeps it")
    if len(shape.kernel) not in (0, 2) or shape.groups > 1:
        raise Refusal("Conv1d, Conv3d or grouped convolutions, which sd-scripts does not adapt; --to lycoris keeps them")
    if not entry.member.target.group:
        raise Refusal("layers that sd-scripts does not adapt; --to comfyui keeps them, --allow_partial leaves them out")
    return entry


def factor_of(entries: Sequence[Entry]) -> int | None:
    """The `factor` argument that gives every LoKr its split."""
    return common_factor(entries, lambda size, factor: factorise(size, factor)[0])
