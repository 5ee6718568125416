"""What an adapter file holds, and which tools read it as it is: `python -m tools.inspect_adapter file.safetensors`."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.core.command_line import parse_command_line, run_script
from library.core.log import set_up_logging
from library.core.options import option
from library.core.tensor_file import listing
from library.core.text_table import table
from networks.base import Adapter
from networks.export import WRITERS, Verdict, judged
from networks.files import WRAPPER, AdapterFile, read_adapter_file
from networks.formats.export.steps import has_core
from networks.lokr import LoKr
from networks.members import Member
from networks.network import Network
from networks.open_file import open_adapter
from tools.screen import spread, with_flags

FORMATS = (  # how a name begins -> the layout
    ("base_model.model.", "PEFT"),
    ("lycoris_", "LyCORIS, standalone"),
    ("lora_", "kohya (sd-scripts, LyCORIS)"),
    (("diffusion_model.", "text_encoders."), "ComfyUI, dotted"),
    (("unet.", "transformer.", "text_conditioner.", "text_encoder.", "text_encoder_2."), "diffusers"),
)
TELLING = (
    *(
        "modelspec.title",
        "modelspec.author",
        "modelspec.date",
        "modelspec.description",
        "modelspec.trigger_phrase",
        "modelspec.architecture",
    ),
    *("ss_output_name", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim", "ss_network_alpha"),
    *("ss_network_args", "ss_optimizer", "ss_learning_rate", "ss_num_train_images", "ss_epoch", "ss_steps", "ss_training_comment"),
    *("ss_merged_adapters", "ss_resized", "ss_extracted", "dora_norm", "sshs_model_hash"),
)
LARGEST = 5  # layers that are listed


@dataclass(kw_only=True, frozen=True)
class InspectOptions:
    """What is looked at."""

    adapter: Path = option(help="adapter file or PEFT folder of any supported format; may also stand first, without --adapter")
    layers: bool = option(False, help="list every layer")
    json: bool = option(False, help="print JSON, with all metadata")
    base: Path | None = option(None, help="checkpoint whose layer sizes the adapter has, where that is not the full-size model")
    family: str | None = option(None, help="the model family, such as sdxl, where the adapter's names do not tell it")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer, in numbers."""

    name: str
    part: str
    algorithm: str
    shape: tuple[int, ...]
    rank: int
    alpha: float
    details: tuple[str, ...]  # factors, Tucker, DoRA
    parameters: int
    norm: float  # of the change of the weight before DoRA, Frobenius
    rms: float

    @classmethod
    def of(cls, member: Member) -> "Layer":
        """The numbers of a member."""
        adapter = member.adapter
        norm = float(adapter.delta_norm())
        return cls(
            name=member.target.name,
            part=member.part.name,
            algorithm=adapter.title,
            shape=adapter.shape.weight,
            rank=adapter.rank,
            alpha=float(adapter.alpha),
            details=details_of(adapter),
            parameters=sum(parameter.numel() for parameter in adapter.parameters()),
            norm=norm,
            rms=norm / math.sqrt(math.prod(adapter.shape.weight)),
        )


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is found in a file."""

    file: AdapterFile
    size: int  # bytes on disk
    network: Network
    layers: list[Layer]
    broken: list[str]  # keys with values that are not finite
    verdicts: list[Verdict]


def main(argv: list[str]) -> None:
    """Look at a file and print what is in it. Raises `ValueError` for a file that is not read."""
    set_up_logging()
    argv = with_flags(argv, ("--adapter",))
    about = "What an adapter file holds, and which tools read it as it is."
    options = parse_command_line([InspectOptions], argv, prog="python -m tools.inspect_adapter", about=about)[InspectOptions]
    findings = look_at(options)
    print(json.dumps(as_json(findings, options.layers), indent=2) if options.json else report(findings, options))


@torch.no_grad()
def look_at(options: InspectOptions) -> Findings:
    """Read the file and count. Layers that are not understood are left out and named; the others are described."""
    file = read_adapter_file(options.adapter)
    network = open_adapter(options.adapter, family=options.family, base=options.base, allow_partial=True)
    is_folder = options.adapter.is_dir()
    keys = [stored_key(key) if is_folder else key for key in file.tensors]
    return Findings(
        file=file,
        size=sum(path.stat().st_size for path in _stored(options.adapter)),
        network=network,
        layers=[Layer.of(member) for member in network.members],
        broken=[key for key, tensor in file.tensors.items() if not _is_finite(key, tensor)],
        verdicts=[judged(target, keys, network, is_folder) for target in WRITERS],
    )


def stored_key(key: str) -> str:
    """The key in a PEFT folder, of which several are read with their component before the path."""
    return key if key.startswith(WRAPPER) else f"{WRAPPER}{key.partition('.')[2]}"


def details_of(adapter: Adapter) -> tuple[str, ...]:
    """What there is besides factors of a rank: LoKr's split, Tucker cores, DoRA."""
    found = []
    if isinstance(adapter, LoKr):
        split = adapter.split
        found.append(f"{split.a}x{split.b} by {split.c}x{split.d}")
        found += ["w1 of a rank"] if split.rank1 is not None else []
        found += ["whole w2"] if split.rank2 is None else []
    if has_core(adapter):
        found.append("Tucker")
    if adapter.dora_scale is not None:
        found.append(f"DoRA over {adapter.extras.magnitude}puts")
    if adapter.scalar is not None:
        found.append("scalar")
    return tuple(found)


# On the screen


def report(findings: Findings, options: InspectOptions) -> str:
    """The findings for people."""
    blocks = [heading(findings), algorithms(findings.layers), parts(findings.layers), largest(findings.layers)]
    if options.layers:
        blocks.append(every_layer(findings.layers))
    told = {key: findings.file.metadata[key] for key in TELLING if key in findings.file.metadata}
    if told:
        more = len(findings.file.metadata) - len(told)
        lines = [f"{key}: {value:.200}" for key, value in told.items()]
        blocks.append("\n".join([*lines, *([f"{more} more entries of metadata (--json)"] if more else [])]))
    blocks.append(readers(findings, options))
    return "\n\n".join(blocks)


def heading(findings: Findings) -> str:
    """File, layout, family, sizes and what is wrong."""
    layers, tensors = findings.layers, findings.file.tensors.values()
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    lines = [
        f"{findings.file.path}: {findings.network.naming.title}, {layout(findings.file)}, {findings.size:,} bytes",
        f"{len(layers)} layers, {sum(layer.parameters for layer in layers):,} parameters in {len(findings.file.tensors)} tensors "
        f"({', '.join(f'{count} {dtype}' for dtype, count in dtypes.most_common())})",
    ]
    if findings.broken:
        lines.append(f"NaN or infinity in {len(findings.broken)} tensors: {listing(findings.broken)}")
    return "\n".join(lines)


def layout(file: AdapterFile) -> str:
    """The layout of a file by its first name."""
    if file.config and file.path is not None and file.path.is_dir():
        return "PEFT folder"
    first = next(iter(file.tensors))
    return next((title for start, title in FORMATS if first.startswith(start)), "names of a library's modules")


def algorithms(layers: Sequence[Layer]) -> str:
    """A row for each algorithm: layers, ranks, alphas, structure."""
    rows = []
    for title in dict.fromkeys(layer.algorithm for layer in layers):
        own = [layer for layer in layers if layer.algorithm == title]
        alphas = sorted({layer.alpha for layer in own})
        alpha = f"{alphas[0]:g}" if len(alphas) == 1 else f"{alphas[0]:g} to {alphas[-1]:g}"
        structure = Counter(_kind(detail) for layer in own for detail in layer.details)
        rows.append([title, str(len(own)), spread([layer.rank for layer in own]), alpha, _counted(structure)])
    return table(["algorithm", "layers", "rank", "alpha", "structure"], rows)


def parts(layers: Sequence[Layer]) -> str:
    """A row for each model: layers, parameters, size of the change."""
    rows = []
    for part in dict.fromkeys(layer.part for layer in layers):
        own = [layer for layer in layers if layer.part == part]
        norm = math.sqrt(sum(layer.norm**2 for layer in own))
        weights = sum(math.prod(layer.shape) for layer in own)
        size = f"{norm:.3g}", f"{norm / math.sqrt(weights):.2e}"
        rows.append([part, str(len(own)), f"{sum(layer.parameters for layer in own):,}", *size])
    return table(["part", "layers", "parameters", "norm of the change", "rms"], rows)


def largest(layers: Sequence[Layer]) -> str:
    """The layers that change most, element by element."""
    rows = [[layer.name, f"{layer.rms:.2e}", f"{layer.norm:.3g}"] for layer in sorted(layers, key=lambda layer: -layer.rms)[:LARGEST]]
    return table(["largest changes", "rms", "norm"], rows)


def every_layer(layers: Sequence[Layer]) -> str:
    """A row for each layer."""
    return table(
        ["layer", "algorithm", "weight", "rank", "alpha", "rms", "structure"],
        [
            [
                layer.name,
                layer.algorithm,
                _sides(layer.shape),
                str(layer.rank),
                f"{layer.alpha:g}",
                f"{layer.rms:.2e}",
                "; ".join(layer.details),
            ]
            for layer in layers
        ],
    )


def readers(findings: Findings, options: InspectOptions) -> str:
    """Which tools read the file as it is, and the command for those that do not."""
    rows = []
    for verdict in findings.verdicts:
        reasons = verdict.objections or verdict.hints or [""]
        rows += [[verdict.reader, "no" if verdict.objections else "yes", reasons[0]], *(["", "", reason] for reason in reasons[1:])]
    commands = [command(verdict, options) for verdict in findings.verdicts if verdict.objections]
    return "\n\n".join(filter(None, [table(["reader", "as it is", "because"], rows), "\n".join(commands)]))


def command(verdict: Verdict, options: InspectOptions) -> str:
    """The command that rewrites the file for a tool, with the base model and the family that were given here."""
    path = options.adapter
    suffix = WRITERS[verdict.target].suffix
    out = path.with_name(f"{path.name.removesuffix('.safetensors')}-{verdict.target}{suffix}")
    text = " ".join(verdict.objections)
    needed = [f"--base {options.base or 'CHECKPOINT'}"] if options.base or "--base" in text else []
    needed += [f"--family {options.family}"] if options.family else []
    needed += ["--as_lora"] if "--as_lora" in text and "add --base" not in text else []
    return " ".join([f"python -m tools.convert_adapter {path} {out} --to {verdict.target}", *needed])


# For programs


def as_json(findings: Findings, with_layers: bool) -> dict[str, Any]:
    """The findings as plain values; metadata that is JSON is unpacked."""
    verdicts = {
        verdict.target: {"as_it_is": not verdict.objections, "objections": verdict.objections, "hints": verdict.hints}
        for verdict in findings.verdicts
    }
    by_algorithm = Counter(layer.algorithm for layer in findings.layers)
    return {
        "path": str(findings.file.path),
        "family": findings.network.naming.name,
        "layout": layout(findings.file),
        "bytes": findings.size,
        "tensors": len(findings.file.tensors),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in findings.file.tensors.values())),
        "parameters": sum(layer.parameters for layer in findings.layers),
        "algorithms": dict(by_algorithm),
        "parts": dict(Counter(layer.part for layer in findings.layers)),
        "ranks": dict(sorted(Counter(layer.rank for layer in findings.layers).items())),
        "norm": math.sqrt(sum(layer.norm**2 for layer in findings.layers)),
        "not_finite": findings.broken,
        "readers": verdicts,
        "metadata": {key: _unpacked(value) for key, value in findings.file.metadata.items()},
    } | ({"layers": [vars(layer) for layer in findings.layers]} if with_layers else {})


def _unpacked(value: str) -> Any:
    if not value.startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _counted(structure: Mapping[str, int]) -> str:
    kinds = [f"{kind} ({count})" for kind, count in Counter(structure).most_common()]
    return listing(kinds, 5)


def _kind(detail: str) -> str:
    """A detail without the sizes of one layer: of LoKr's split, those of the first factor stay."""
    return re.sub(r"^(\d+x\d+) by \d+x\d+$", r"w1 \1", detail)


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _is_finite(key: str, tensor: Tensor) -> bool:
    values = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 2 else tensor
    return key.endswith("alpha") or bool(torch.isfinite(values).all())


def _stored(path: Path) -> Iterable[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


if __name__ == "__main__":
    run_script(main)
