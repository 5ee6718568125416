"""Written for lycoris-lora 4.1.3, whose `create_network_from_weights` derives a layer's structure anew.

A LoKr that it would not derive is put otherwise; DoRA over the inputs it takes for one over the outputs.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from library.models.naming import Naming, Part, Target
from networks.difference import Difference, NormShape
from networks.formats.export.entry import Bases, Entry, Plan, Refusal, Wishes
from networks.formats.export.steps import BAKE, as_small_lora, has_core, with_whole_w1, with_whole_w2, without_core
from networks.formats.export.writer import DIFFERENCE, LOHA, LOKR, LORA, Writer, without_alpha
from networks.lokr import LoKr, LoKrArguments, Split, factorise, given

READ = tuple(dict.fromkeys((*LORA, "lora_mid.weight", *LOHA, *LOKR, *DIFFERENCE, "dora_scale")))
STANDALONE = "lycoris"


class LyCORIS(Writer):
    """lycoris-lora."""

    name = "lycoris"
    reader = "LyCORIS"

    def rewrite(self, plan: Plan, naming: Naming, wishes: Wishes, bases: Bases) -> None:
        plan.each(check, with_weight, as_derived)
        if wishes.standalone:
            others = [entry for entry in plan.entries if not entry.member.part.is_denoiser]
            if others:
                plan.refuse(others, "text encoders, which LyCORIS' wrapper of one model does not reach; leave out --standalone")

    def layer_name(self, entry: Entry, naming: Naming, wishes: Wishes) -> str:
        part, target = entry.member.part, entry.member.target
        return standalone_name(target) if wishes.standalone else f"{prefix(naming, part)}_{target.path.replace('.', '_')}"

    def known_names(self, naming: Naming, part: Part, target: Target) -> Mapping[str, tuple[str, ...]]:
        names = [f"{prefix(naming, part)}_{target.path.replace('.', '_')}"]
        return dict.fromkeys([*names, standalone_name(target)] if part.is_denoiser else names, READ)

    def lacking_keys(self, keys: Iterable[str]) -> list[str]:
        return without_alpha(keys, (*LORA, *LOHA, *LOKR))


def prefix(naming: Naming, part: Part) -> str:
    """LyCORIS numbers text encoders from a list, also a single one, and sd-scripts hands it a list."""
    encoders = [other for other in naming.parts if not other.is_denoiser]
    return part.prefix if part.is_denoiser else f"lora_te{encoders.index(part) + 1}"


def standalone_name(target: Target) -> str:
    """The name that LyCORIS' wrapper gives a layer of the denoiser in diffusers' class tree."""
    _, _, path = target.diffusers_path.partition(".")
    return f"{STANDALONE}_{(path or target.module_path).replace('.', '_')}"


def check(entry: Entry) -> Entry:
    """Raises `Refusal` for what LyCORIS does not read back."""
    adapter = entry.adapter
    if adapter.dora_scale is not None and adapter.extras.magnitude == "in":
        raise Refusal(f"DoRA over the inputs, which LyCORIS saves but takes for one over the outputs; {BAKE}")
    if isinstance(adapter.shape, NormShape) and not isinstance(adapter.layer, nn.LayerNorm | nn.GroupNorm):
        raise Refusal("differences of norms other than LayerNorm and GroupNorm; --to comfyui keeps them")
    return entry


def with_weight(entry: Entry) -> Entry:
    """A difference of a bias alone beside a weight's difference of zero, by which LyCORIS knows it."""
    adapter = entry.adapter
    if not isinstance(adapter, Difference):
        return entry
    tensors = adapter.file_tensors()
    name = "w_norm" if isinstance(adapter.shape, NormShape) else "diff"
    if name in tensors:
        return entry
    return entry.remade({name: adapter.direction().detach()} | tensors, "zero difference of the weight added")


def as_derived(entry: Entry) -> Entry:
    """LoKr as LyCORIS derives it from the tensors: factors multiplied out as far as needed, else as LoRA or whole difference."""
    if not isinstance(entry.adapter, LoKr):
        return entry
    entry = without_core(entry)
    first = with_whole_w1(entry)
    for candidate in (entry, first, with_whole_w2(entry), with_whole_w2(first)):
        if isinstance(candidate.adapter, LoKr) and derived_split(candidate.adapter) == candidate.adapter.split:
            return candidate
    return as_small_lora(entry)


def derived_split(adapter: LoKr) -> Split:
    """The structure that LyCORIS gives a LoKr when it reads it: factor and rank by its own rules, the rest as in training."""
    split, shape, tensors = adapter.split, adapter.shape, adapter.file_tensors()
    assert not has_core(adapter)
    rank = split.rank1 or split.rank2 or 1
    is_full = split.rank1 is None and split.rank2 is None
    arguments = LoKrArguments(
        factor=_derived_factor(split, tensors),
        decompose_both=split.rank1 is not None and split.rank2 is not None,
        full_matrix=is_full,
    )
    return Split.asked(shape, rank, arguments)


def _derived_factor(split: Split, tensors: Mapping[str, Tensor]) -> int:
    """-1 where w1 has the smaller of evenly split sides, else a side of w1 or w2; for flat convolutions the kernel counts as columns."""
    second = tensors.get("lokr_w2")
    c, d = second.shape[:2] if second is not None else (split.c, given(tensors.get("lokr_w2_b")).shape[1])
    out, inner = split.a * c, split.b * d
    if (split.a, split.b) == (factorise(out, -1)[0], factorise(inner, -1)[0]):
        return -1
    sides = (max(split.a, split.b), max(second.shape) if second is not None else max(c, d))
    for side in sides:
        if out % side == 0 and inner % side == 0 and side in (split.a, c) and side in (split.b, d):
            return side
    return min(sides)
