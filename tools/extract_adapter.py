"""Make an adapter of what a fine-tuned checkpoint changed: `python -m tools.extract_adapter --base a --tuned b --out c --rank 16`.

Layer by layer, so that memory holds one layer of each checkpoint. Which layers: those that training adapts, chosen by the same arguments.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from library.core.atomic import writable_folder
from library.core.command_line import parse_command_line, run_script
from library.core.log import get_logger, set_up_logging
from library.core.options import OptionError, declared, option, pairs
from library.core.tensor_file import listing
from library.core.text_table import table
from library.models.architecture import architecture_named, architecture_names
from library.models.naming import Naming, Part, Target, naming_named, naming_names
from networks.arguments import WHERE, NetworkArguments
from networks.base import Adapter
from networks.checkpoint_layers import CheckpointTensors, Parts
from networks.loha import LoHa
from networks.lokr import LoKr, is_factor
from networks.lora import LoRA
from networks.members import Member
from networks.network import Network
from networks.rewriting.algebra import check_wish, relative_error
from networks.rewriting.combination import structure
from networks.rewriting.extraction import EXTRACTORS, Extracted
from networks.selection import LayerPlan, plan_layers, read_arguments
from tools.resize_adapter import PRECISIONS, WORST
from tools.screen import spread

logger = get_logger(__name__)

ALGORITHMS: dict[str, type[Adapter]] = {"lora": LoRA, "lokr": LoKr, "loha": LoHa}
CHOOSING = (  # the network arguments that say which layers, and their ranks; the others are about training
    *("only_patterns", "exclude_patterns", "include_patterns", "target_modules"),
    *("conv_dim", "network_reg_dims", "block_dims", "conv_block_dims"),
)
UNLIMITED = 2**31  # the rank of a layer for which none was given


@dataclass(kw_only=True, frozen=True)
class ExtractOptions:
    """What is extracted, and as what."""

    base: Path = option(help="the checkpoint before fine-tuning: a .safetensors file or a diffusers folder")
    tuned: Path = option(help="the checkpoint after it")
    out: Path = option(help="the adapter to write, a .safetensors file")
    algorithm: Literal["lora", "lokr", "loha"] = option("lora", help="of the adapter; loha is slow, and usually further off than lora")
    rank: int | None = option(None, help="rank of a layer; for lokr of its second factor, which is whole without a rank and an error")
    max_error: float | None = option(
        None, help="give each layer the lowest rank with this error, relative to its change; --rank is the highest then"
    )
    conv_rank: int | None = option(None, help="rank of convolutions, which are left out without it, as in training without conv_dim")
    factor: int | Literal["search"] = option(
        -1,
        help="lokr: split of a weight, as in training; search: for each layer the one with the fewest parameters for --max_error, "
        "or the smallest error at the size of a lora of --rank",
    )
    text_encoders: bool = option(False, help="extract the text encoders too")
    network_args: tuple[str, ...] = option((), help="arguments that choose layers, as in training: exclude_patterns=..., only_patterns=...")
    precision: Literal["fp16", "bf16", "float"] = option("fp16", help="of the tensors written; errors are measured after rounding")
    family: str | None = option(None, help="the model family, such as sdxl, where the checkpoint does not tell it")

    def check(self) -> Iterable[str]:
        """Problems of single options and between them."""
        try:
            check_wish(self.rank, self.max_error)
        except ValueError as error:
            yield f"--{error}"
        if self.conv_rank is not None and self.conv_rank < 1:
            yield f"--conv_rank {self.conv_rank}: must be at least 1"
        may_be_whole = self.algorithm == "lokr" and self.factor != "search"
        if self.rank is None and self.max_error is None and not may_be_whole:
            yield "give --rank or --max_error; only a lokr of a given factor needs neither"
        if self.factor != -1 and self.algorithm != "lokr":
            yield f"--factor: only lokr has one, not {self.algorithm}"
        if isinstance(self.factor, int) and not is_factor(self.factor):
            yield f"--factor {self.factor}: must be -1 (as even as possible), at least 1, or search"
        if self.out.suffix != ".safetensors":
            yield f"--out {self.out}: only .safetensors files are written"
        if self.out.resolve() in (self.base.resolve(), self.tuned.resolve()):
            yield f"--out {self.out}: would replace a checkpoint; give it another name"


@dataclass
class Result:
    """What was found, layer by layer."""

    members: list[Member] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # by adapter name
    unchanged: list[str] = field(default_factory=list)  # chosen layers without a difference
    left_out: list[str] = field(default_factory=list)  # tensors with a difference that no adapter has


def main(argv: list[str]) -> None:
    """Extract as the command line says, and print how near it came. Raises `ValueError` for what the user has to mend."""
    set_up_logging()
    extract(parse_command_line([ExtractOptions], argv, prog="python -m tools.extract_adapter", about="Extract an adapter.")[ExtractOptions])


def extract(options: ExtractOptions) -> None:
    """Read both checkpoints, fit, write and report."""
    writable_folder(options.out.parent, "--out")  # now, not after an hour of fitting
    naming, parts = family_of(options.base, options.family)
    base, tuned = (CheckpointTensors(path, naming, parts) for path in (options.base, options.tuned))
    try:
        chosen = [(part, module) for part, module in parts if part.is_denoiser or options.text_encoders]
        plans = planned(options, naming, chosen)
        check_layers(plans, base, tuned)
        result = fit_layers(options, plans, base, tuned)
        result.left_out = list(changed_elsewhere(naming, parts, plans, base, tuned))
    finally:
        base.close()
        tuned.close()
    if not result.members:
        raise ValueError(f"{options.tuned}: none of the {len(plans)} layers differs from {options.base}{also_changed(result)}")
    network = Network(result.members, naming, parts)
    network.save_weights(options.out, PRECISIONS[options.precision], described(options, naming, network, result))
    print(report(network, result))
    print(f"wrote {options.out}: {options.out.stat().st_size:,} bytes")


# Which layers


def family_of(checkpoint: Path, family: str | None) -> tuple[Naming, Parts]:
    """The family that a checkpoint is of, and its models' outlines. Raises `ValueError` saying for each family why it is not."""
    problems = []
    for name in [family] if family else naming_names():
        naming = naming_named(name)
        try:
            parts = naming.outline(checkpoint)
            tensors = CheckpointTensors(checkpoint, naming, parts)
        except ValueError as error:
            problems.append(str(error))
            continue
        tensors.close()
        if any(tensors.has(part, target) for part, module in parts if part.is_denoiser for target in naming.targets(part, module)):
            return naming, parts
        problems.append(f"{checkpoint}: holds no layer of {naming.title}")
    raise ValueError("\n".join(dict.fromkeys(problems)))


def planned(options: ExtractOptions, naming: Naming, parts: Parts) -> list[LayerPlan]:
    """The layers to extract with their ranks. Raises `OptionError` for arguments that are wrong."""
    problems: list[str] = []
    given: dict[str, Any] = {entry.name: entry.value for entry in pairs(options.network_args, WHERE)}
    idle = {entry.name for entry in declared(NetworkArguments)}.difference(CHOOSING).intersection(given)
    problems += [f"{WHERE} {name}: has no effect on an extraction, which takes {', '.join(CHOOSING)}" for name in sorted(idle)]
    if options.conv_rank is not None and "conv_dim" in given:
        problems.append(f"{WHERE} conv_dim: --conv_rank says the same; give one of them")
    if options.conv_rank is not None:
        given["conv_dim"] = options.conv_rank
    arguments, turned_on = read_arguments(NetworkArguments, given, naming, problems)
    if problems or arguments is None:
        raise OptionError(problems)
    return plan_layers(naming, parts, dim=options.rank or UNLIMITED, alpha=0, arguments=arguments, turned_on=turned_on)


def check_layers(plans: Sequence[LayerPlan], base: CheckpointTensors, tuned: CheckpointTensors) -> None:
    """Raise `ValueError` naming the layers that a checkpoint lacks or that the two have in different shapes."""
    problems = []
    for tensors in (base, tuned):
        lacking = [plan.target.name for plan in plans if not tensors.has(plan.part, plan.target)]
        if lacking:
            problems.append(f"{tensors.path}: lacks {len(lacking)} of {len(plans)} layers: {listing(lacking, 3)}")
    for plan in plans if not problems else ():
        shapes = [tensors.shape(place) for tensors in (base, tuned) if (place := tensors.place(plan.part, plan.target)) is not None]
        if shapes[0] != shapes[1]:
            problems.append(f"{tuned.path}: {plan.target.name} has the shape {list(shapes[1])}, in {base.path} {list(shapes[0])}")
    if problems:
        raise ValueError("\n".join(problems))


# What they changed


def fit_layers(options: ExtractOptions, plans: Sequence[LayerPlan], base: CheckpointTensors, tuned: CheckpointTensors) -> Result:
    """The adapters of all layers that differ."""
    result = Result()
    algorithm = ALGORITHMS[options.algorithm]
    for number, plan in enumerate(plans, 1):
        delta = difference(base.weight(plan.part, plan.target), tuned.weight(plan.part, plan.target))
        if delta is None:
            result.unchanged.append(plan.target.name)
            continue
        if not torch.isfinite(delta).all():
            raise ValueError(
                f"{plan.target.name}: {options.base} or {options.tuned} holds NaN or infinity there; nothing can be fitted to it"
            )
        found = fitted(options, plan, delta)
        precision = PRECISIONS[options.precision]
        rounded = {name: tensor if name == "alpha" else tensor.to(precision) for name, tensor in found.tensors.items()}
        adapter = algorithm.from_tensors(plan.target.name, plan.layer, rounded)
        result.members.append(Member(adapter=adapter, part=plan.part, target=plan.target))
        result.errors[adapter.name] = relative_error(adapter.direction().detach(), delta)
        if number % 50 == 0:
            logger.info("%d of %d layers", number, len(plans))
    return result


def fitted(options: ExtractOptions, plan: LayerPlan, delta: Tensor) -> Extracted:
    """The adapter of one change, of the size that the options wish."""
    wish: dict[str, Any] = {"rank": None if plan.rank == UNLIMITED else plan.rank, "max_error": options.max_error}
    if options.algorithm == "lokr":
        wish["factor"] = None if options.factor == "search" else options.factor
    return EXTRACTORS[options.algorithm](delta, **wish)


def difference(base: Tensor, tuned: Tensor) -> Tensor | None:
    """What was changed, in float32; None where both are the same once the wider one is rounded as the narrower one is."""
    narrow = min(base.dtype, tuned.dtype, key=lambda dtype: dtype.itemsize)
    if torch.equal(base.to(narrow), tuned.to(narrow)):
        return None
    return tuned.float() - base.float()


def changed_elsewhere(
    naming: Naming, parts: Parts, plans: Sequence[LayerPlan], base: CheckpointTensors, tuned: CheckpointTensors
) -> Iterator[str]:
    """The tensors that differ but are not among the layers that were chosen: other layers, biases, norms."""
    chosen = {plan.target.name for plan in plans}
    for part, module in parts:
        for target in (*naming.targets(part, module), *naming.outside(part, module)):
            if target.name not in chosen and _differs(part, target, "weight", base, tuned):
                yield f"{target.name}.weight"
            if _differs(part, target, "bias", base, tuned):
                yield f"{target.name}.bias"


def _differs(part: Part, target: Target, leaf: str, base: CheckpointTensors, tuned: CheckpointTensors) -> bool:
    places = [tensors.place(part, target, leaf) for tensors in (base, tuned)]
    if places[0] is None or places[1] is None:
        return False
    read = CheckpointTensors.weight if leaf == "weight" else CheckpointTensors.bias
    before, after = read(base, part, target), read(tuned, part, target)
    return before.shape != after.shape or difference(before, after) is not None


# What is said of it


def described(options: ExtractOptions, naming: Naming, network: Network, result: Result) -> dict[str, str]:
    """Metadata: the structure as training writes it, the base model, and what was done."""
    arguments = {"factor": str(options.factor)} if options.algorithm == "lokr" and options.factor != "search" else {}
    arguments |= {} if options.conv_rank is None else {"conv_dim": str(options.conv_rank)}
    known = naming.name in architecture_names()
    version = {"ss_base_model_version": architecture_named(naming.name).base_model_version} if known else {}
    done = {
        "base": options.base.name,
        "tuned": options.tuned.name,
        "algorithm": options.algorithm,
        "rank": options.rank,
        "max_error": options.max_error,
        "largest_error": round(max(result.errors.values()), 6),
    }
    about = {"ss_sd_model_name": options.base.name, "ss_network_args": json.dumps(arguments), "ss_extracted": json.dumps(done)}
    return {**version, **structure(network), **about}


def report(network: Network, result: Result) -> str:
    """Layers, ranks and errors, and the layers with the largest ones."""
    errors = result.errors
    ranks = {adapter.name: adapter.rank for adapter in network.adapters}
    names = sorted(errors, key=lambda name: -errors[name])[:WORST]
    lines = [
        f"{network.summary()}; ranks {spread(list(ranks.values()))}",
        f"{len(result.unchanged)} more layers are the same in both checkpoints and left out{also_changed(result)}",
        f"relative error: {median(errors.values()):.4f} (median of {len(errors)} layers), {max(errors.values()):.4f} (largest)",
        "",
        table(["worst layers", "rank", "error"], [[name, str(ranks[name]), f"{errors[name]:.4f}"] for name in names]),
    ]
    return "\n".join(lines)


def also_changed(result: Result) -> str:
    """What differs and is in no adapter, as the end of a sentence."""
    if not result.left_out:
        return ""
    return f"; tensors that differ and are not in the adapter: {len(result.left_out)} ({listing(result.left_out, 3)})"


if __name__ == "__main__":
    run_script(main)
