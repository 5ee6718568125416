"""Rewrite an adapter for another tool: `python -m tools.convert_adapter in.safetensors out.safetensors --to comfyui`.

Any supported file or folder in; kohya (sd-scripts), ComfyUI, LyCORIS, PEFT (a folder) or diffusers out. Every layer keeps its change of
the weight exactly, or the conversion is refused with the reason; with --rank or --max_error it may lose what the table says.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from library.core.command_line import parse_command_line, run_script
from library.core.log import set_up_logging
from library.core.options import option
from library.core.text_table import table
from networks.checkpoint_layers import CheckpointTensors
from networks.export import Export, check_place, export, narrowed, write_export, writer_named
from networks.files import read_adapter_file
from networks.formats.export.entry import Wishes
from networks.lokr import LoKr
from networks.network import Network
from networks.open_file import open_adapter
from networks.rewriting.algebra import check_wish
from networks.rewriting.factors import parameters
from tools.screen import spread, with_flags

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32, "fp32": torch.float32}
WORST = 10  # layers that are listed


@dataclass(kw_only=True, frozen=True)
class ConvertOptions:
    """What is converted, and to what."""

    adapter: Path = option(help="adapter file or PEFT folder of any supported format; may also stand first, without --adapter")
    out: Path = option(help="the .safetensors file to write, for PEFT the folder; may also stand second, without --out")
    to: Literal["kohya", "comfyui", "lycoris", "peft", "diffusers"] = option(
        help="the tool that shall read it: kohya (sd-scripts), comfyui, lycoris, peft or diffusers"
    )
    as_lora: bool = option(False, help="make every layer a LoRA: exactly, or of --rank at most, or with --max_error at most")
    rank: int | None = option(None, help="with --as_lora or --to diffusers: highest rank of a layer")
    max_error: float | None = option(None, help="with --as_lora or --to diffusers: lowest rank with this error, relative to the change")
    dotted: bool = option(False, help="with --to comfyui: dotted names (diffusion_model.) instead of kohya's")
    standalone: bool = option(False, help="with --to lycoris: names of LyCORIS' own wrapper on diffusers' denoiser (lycoris_)")
    keep_magnitudes: bool = option(
        False, help="with --to comfyui: leave DoRA's magnitudes alone, for a ComfyUI that measures its norm on the changed weight"
    )
    scale_whole: float | None = option(
        None,
        help="multiply the LoKr layers whose factors are both whole by this: for a file whose writer meant alpha / dim there (alpha 1, dim "
        "32: 0.03125), which readers ignore, or trained with LyCORIS' rs_lora and full_matrix (the square root of dim)",
    )
    base: Path | None = option(None, help="the base model: DoRA needs its weights; also tells the layer sizes of small models")
    family: str | None = option(None, help="the model family, such as sdxl, where the adapter's names do not tell it")
    precision: Literal["keep", "fp16", "bf16", "float", "fp32"] = option(
        "keep", help="of the tensors written; keep: as in the adapter file where that holds every number, else float"
    )
    allow_partial: bool = option(False, help="leave out what is not understood or cannot be written, and name it, instead of refusing")

    def check(self) -> Iterable[str]:
        """Problems of single options and between them."""
        for flag, fits in (("dotted", "comfyui"), ("keep_magnitudes", "comfyui"), ("standalone", "lycoris")):
            if getattr(self, flag) and self.to != fits:
                yield f"--{flag}: only with --to {fits}"
        if (self.rank is not None or self.max_error is not None) and not (self.as_lora or self.to == "diffusers"):
            yield "--rank, --max_error: only with --as_lora or --to diffusers; tools.resize_adapter keeps the algorithm"
        for check in (lambda: check_wish(self.rank, self.max_error), lambda: check_place(self.out, self.to)):
            try:
                check()
            except ValueError as error:
                yield str(error)
        if self.out.resolve() == self.adapter.resolve():
            yield f"--out {self.out}: would replace the adapter that is converted; give it another name"

    @property
    def wishes(self) -> Wishes:
        """What of them is for the writer."""
        return Wishes(
            as_lora=self.as_lora,
            rank=self.rank,
            max_error=self.max_error,
            dotted=self.dotted,
            standalone=self.standalone,
            keep_magnitudes=self.keep_magnitudes,
            allow_partial=self.allow_partial,
        )


def main(argv: list[str]) -> None:
    """Convert as the command line says, and print what was done. Raises `ValueError` for what the user has to mend."""
    set_up_logging()
    argv = with_flags(argv, ("--adapter", "--out"))
    options = parse_command_line(
        [ConvertOptions], argv, prog="python -m tools.convert_adapter", about="Rewrite an adapter for another tool."
    )
    convert(options[ConvertOptions])


def convert(options: ConvertOptions) -> None:
    """Read, rewrite, check, write and report."""
    network = open_adapter(options.adapter, family=options.family, base=options.base, allow_partial=options.allow_partial)
    file = read_adapter_file(options.adapter)
    if options.scale_whole is not None:
        scale_whole_factors(network, options.scale_whole)
    checkpoint = None if options.base is None else CheckpointTensors(options.base, network.naming, network.parts)
    exported = export(
        network,
        options.to,
        base=checkpoint,
        dtype=PRECISIONS.get(options.precision, torch.float32),
        metadata=file.metadata,
        wishes=options.wishes,
    )
    if options.precision == "keep":
        exported = narrowed(exported, stored_dtype(file.tensors))
    write_export(options.out, exported)
    print(report(exported))
    size = sum(path.stat().st_size for path in ([options.out] if options.out.is_file() else options.out.rglob("*.safetensors")))
    print(f"wrote {options.out}: {size:,} bytes")


@torch.no_grad()
def scale_whole_factors(network: Network, scale: float) -> None:
    """Multiply the deltas of LoKr layers whose factors are both whole. Raises `ValueError` where there are none."""
    whole = [adapter.lokr_w1 for adapter in network.adapters if isinstance(adapter, LoKr) and not adapter.has_rank]
    if not whole:
        raise ValueError(f"--scale_whole {scale:g}: the adapter has no LoKr layer whose factors are both whole")
    for w1 in whole:
        assert w1 is not None
        w1.mul_(scale)


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that most tensors of a file have, alphas aside; float32 where it has none of 16 bits or more."""
    dtypes = Counter(tensor.dtype for name, tensor in tensors.items() if not name.endswith("alpha"))
    return next((dtype for dtype, _ in dtypes.most_common() if dtype in PRECISIONS.values()), torch.float32)


def report(exported: Export) -> str:
    """What became of the layers, what was rewritten, and what it lost."""
    blocks = [table(["was", "is", "layers", "ranks", "now", "parameters", "now"], changes(exported))]
    if exported.notes:
        blocks.append(table(["rewritten", "layers"], [[note, str(count)] for note, count in exported.notes.most_common()]))
    blocks.append(losses(exported))
    reader = writer_named(exported.target).reader
    blocks.append(
        "\n".join(
            [
                f"{reader} uses all {len(exported.tensors)} keys",
                *(f"left out: {reason}" for reason in exported.left_out),
                *exported.hints,
            ]
        )
    )
    return "\n\n".join(blocks)


def changes(exported: Export) -> list[list[str]]:
    """A row for each pair of algorithms: layers, ranks and parameters, before and after."""
    rows = []
    kinds = Counter((entry.member.adapter.title, entry.adapter.title) for entry in exported.entries)
    for (before, after), count in kinds.items():
        pairs = [(entry.member.adapter, entry.adapter) for entry in exported.entries]
        pairs = [(old, new) for old, new in pairs if (old.title, new.title) == (before, after)]
        ranks = [spread([pair[n].rank for pair in pairs]) for n in (0, 1)]
        sizes = [f"{sum(parameters(pair[n].file_tensors()) for pair in pairs):,}" for n in (0, 1)]
        rows.append([before, after, str(count), *ranks, *sizes])
    return rows


def losses(exported: Export) -> str:
    """The errors at large, and where layers were truncated the worst of them."""
    errors = exported.errors
    total = (
        f"read back, relative error: {median(errors.values()):.1e} (median of {len(errors)} layers), {max(errors.values()):.1e} (largest)"
    )
    if not any(entry.error for entry in exported.entries):
        return total
    worst = sorted(exported.entries, key=lambda entry: -errors[entry.member.target.name])[:WORST]
    rows = [
        [entry.member.target.name, str(entry.member.adapter.rank), str(entry.adapter.rank), f"{errors[entry.member.target.name]:.4f}"]
        for entry in worst
    ]
    return f"{total}\n\n{table(['worst layers', 'rank', 'now', 'error'], rows)}"


if __name__ == "__main__":
    run_script(main)
